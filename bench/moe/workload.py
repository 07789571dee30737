"""Requests shaped like BurstGPT's, in the five length distributions that arXiv 2602.21626 compares.

The trace itself is not shipped; a copy of it gives the lengths where there is one. Else prompts and outputs are
log-normal with its conversation log's medians and spreads, and 1.5 % of prompts are long, so that about 2.4 % have more
than 3,000 tokens. The paper's shapes are pictures only; these
are target densities of the prompt's length, drawn by importance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxdual.offline.trace_files import read_sessions

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
class Lengths:
    """Prompt and output tokens of the requests that shapes are drawn from, `[requests]` each."""

    prompts: np.ndarray
    outputs: np.ndarray


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request.

    Attributes:
      time: seconds from the start.
      prompt, output: tokens.
      user: who asks; None if that is not known.
      tokens: of the prompt; None where only their number matters.
    """

    time: float
    prompt: int
    output: int
    user: str | None = None
    tokens: Sequence[int] | None = None


def read_lengths(path: Path) -> Lengths:
    """Lengths of a trace's turns, one by one: BurstGPT's, or any that `jaxdual.offline` reads.

    Raises:
      TraceError: it can't be read, or is none.
    """
    sessions = read_sessions(path)
    prompts = [prompt for session in sessions for prompt in session.prompt_lengths()]
    outputs = [turn.generate for session in sessions for turn in session.turns]
    return Lengths(np.array(prompts), np.array(outputs))


def arrivals(
    shape: str, rate: float, count: int, seed: int, *, variation: float = 1.0, lengths: Lengths | None = None
) -> list[Arrival]:
    """Requests of a shape, the first at 0; the same lengths at any rate.

    Args:
      shape: of `SHAPES`.
      rate: requests a second.
      variation: standard deviation of the gaps by their mean (they are Gamma distributed); 1 for Poisson arrivals.
      lengths: to draw from; BurstGPT's distribution where left out.

    Raises:
      ValueError: an unknown shape, or fewer lengths than requests.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape {shape!r} must be one of {', '.join(SHAPES)}")
    rng = np.random.default_rng((seed, SHAPES.index(shape)))
    pool = _fitted(rng) if lengths is None else lengths
    if shape == "random":
        if len(pool.prompts) < count:
            raise ValueError(f"a trace of {len(pool.prompts)} requests is too short for {count}")
        chosen = rng.choice(len(pool.prompts), count, replace=False)
    else:
        inside = np.flatnonzero(pool.prompts <= _LONGEST)
        x = pool.prompts[inside] / _LONGEST
        bins = np.minimum((x * _BINS).astype(int), _BINS - 1)
        have = np.bincount(bins, minlength=_BINS) / len(inside)
        want = _DENSITIES[shape]((np.arange(_BINS) + 0.5) / _BINS)
        weights = (want / want.sum() / np.where(have > 0, have, math.inf))[bins]
        chosen = inside[rng.choice(len(inside), count, p=weights / weights.sum())]
    gaps = rng.gamma(1 / variation**2, variation**2, count)
    times = np.concatenate([[0.0], np.cumsum(gaps[1:])]) / rate
    drawn = zip(times, pool.prompts[chosen], pool.outputs[chosen], strict=True)
    return [Arrival(float(time), int(prompt), int(output)) for time, prompt, output in drawn]


def _fitted(rng: np.random.Generator) -> Lengths:
    """Prompt and output tokens, independent."""
    prompts = np.exp(rng.normal(math.log(353), 0.933, _POOL))
    long = rng.random(_POOL) < 0.015
    prompts[long] = np.exp(rng.normal(math.log(4500), 0.4, int(long.sum())))
    outputs = np.exp(rng.normal(math.log(238), 0.767, _POOL))
    return Lengths(np.clip(prompts, 4, 16000).astype(int), np.clip(outputs, 2, 4000).astype(int))
