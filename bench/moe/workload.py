"""Requests shaped like BurstGPT's, in the five length distributions that arXiv 2602.21626 compares.

The trace itself is not shipped: prompts and outputs are log-normal with its conversation log's medians and spreads, and
1.5 % of prompts are long, so that about 2.4 % have more than 3,000 tokens. The paper's shapes are pictures only; these
are target densities of the prompt's length, drawn by importance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

SHAPES = ("random", "central", "descending", "two_end", "average")
_LONGEST = 3000  # tokens of the shapes but "random"
_BINS = 30
_POOL = 40_000
_DENSITIES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "central": lambda x: np.exp(-0.5 * ((x - 0.5) / 0.15) ** 2),
    "descending": lambda x: 2 * (1 - x),
    "two_end": lambda x: np.exp(-x / 0.08) + np.exp(-(1 - x) / 0.08),
    "average": np.ones_like,
}


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request: seconds from the start, and tokens."""

    time: float
    prompt: int
    output: int


def arrivals(shape: str, rate: float, count: int, seed: int) -> list[Arrival]:
    """Poisson arrivals of a shape, the first at 0; the same lengths at any rate.

    Raises:
      ValueError: an unknown shape.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape {shape!r} must be one of {', '.join(SHAPES)}")
    rng = np.random.default_rng((seed, SHAPES.index(shape)))
    prompts, outputs = _pool(rng)
    if shape == "random":
        chosen = rng.choice(len(prompts), count, replace=False)
    else:
        inside = np.flatnonzero(prompts <= _LONGEST)
        x = prompts[inside] / _LONGEST
        bins = np.minimum((x * _BINS).astype(int), _BINS - 1)
        have = np.bincount(bins, minlength=_BINS) / len(inside)
        want = _DENSITIES[shape]((np.arange(_BINS) + 0.5) / _BINS)
        weights = (want / want.sum() / np.where(have > 0, have, math.inf))[bins]
        chosen = inside[rng.choice(len(inside), count, p=weights / weights.sum())]
    gaps = rng.exponential(1.0, count)
    times = np.concatenate([[0.0], np.cumsum(gaps[1:])]) / rate
    return [Arrival(float(t), int(p), int(o)) for t, p, o in zip(times, prompts[chosen], outputs[chosen], strict=True)]


def _pool(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Prompt and output tokens, independent."""
    prompts = np.exp(rng.normal(math.log(353), 0.933, _POOL))
    long = rng.random(_POOL) < 0.015
    prompts[long] = np.exp(rng.normal(math.log(4500), 0.4, int(long.sum())))
    outputs = np.exp(rng.normal(math.log(238), 0.767, _POOL))
    return np.clip(prompts, 4, 16000).astype(int), np.clip(outputs, 2, 4000).astype(int)
