"""Times of several calls that take turns, so that what else the machine does falls on all of them alike."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

_LEAST_ROUNDS, _MOST_ROUNDS = 5, 1000


def medians(calls: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Median seconds of each call, which returns arrays that are waited for; else as `medians_of`."""

    def timed(call: Callable[[], Any]) -> float:
        begin = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - begin

    return medians_of({name: functools.partial(timed, call) for name, call in calls.items()}, seconds)


def medians_of(measurements: Mapping[str, Callable[[], float]], seconds: float) -> dict[str, float]:
    """Median result of each measurement.

    Args:
      measurements: by name; each is made once before, for nothing, and then in turn.
      seconds: that all may take together, about; at least five rounds are made, and at most a thousand.
    """
    for measure in measurements.values():
        measure()
    found: dict[str, list[float]] = {name: [] for name in measurements}
    end = time.perf_counter() + seconds
    for turn in range(_MOST_ROUNDS):
        if turn >= _LEAST_ROUNDS and time.perf_counter() > end:
            break
        for name, measure in measurements.items():
            found[name].append(measure())
    return {name: statistics.median(each) for name, each in found.items()}
