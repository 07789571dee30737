"""Seeded prompts and loads, the same for every side that is measured."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LoadItem:
    """A request of a load.

    Attributes:
      arrival: seconds after the load's start.
      prompt: token ids.
      output: tokens to generate.
    """

    arrival: float
    prompt: list[int]
    output: int


def prompts(count: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """`count` prompts of `length` random tokens; no two share a prefix but by chance."""
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(length)] for _ in range(count)]


def mixed_load(
    count: int,
    vocab_size: int,
    *,
    seed: int,
    prompt_range: tuple[int, int] = (16, 512),
    output_range: tuple[int, int] = (8, 256),
    arrive_within: float = 0.0,
) -> list[LoadItem]:
    """Requests whose prompt and output lengths are log-uniform.

    Args:
      count: requests.
      vocab_size: prompt tokens are below it.
      seed: of everything; lengths don't depend on `arrive_within`.
      prompt_range, output_range: shortest and longest, in tokens.
      arrive_within: seconds over which arrivals are spread evenly at random.

    Returns:
      Requests in order of arrival, the first at 0.
    """
    rng = random.Random(seed)
    lengths = [(_log_uniform(rng, *prompt_range), _log_uniform(rng, *output_range)) for _ in range(count)]
    arrivals = sorted(rng.random() for _ in range(count))
    scale = arrive_within / (arrivals[-1] - arrivals[0]) if count > 1 else 0.0
    return [
        LoadItem((arrival - arrivals[0]) * scale, [rng.randrange(vocab_size) for _ in range(prompt)], output)
        for arrival, (prompt, output) in zip(arrivals, lengths, strict=True)
    ]


def _log_uniform(rng: random.Random, low: int, high: int) -> int:
    return round(math.exp(rng.uniform(math.log(low), math.log(high))))
