"""Figures of arms with intervals: bootstrap over items, the same draws for all arms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.longcontext.items import Ratio

_RESAMPLES = 2000
_BOUNDS = (2.5, 97.5)


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of an arm in a cell, item by item.

    Attributes:
      values, of: `[items]`, numerators and denominators.
    """

    values: np.ndarray
    of: np.ndarray

    @classmethod
    def mean_of_draws(cls, draws: Sequence[Sequence[Ratio]]) -> Figure:
        """Of `[draws][items]`: sums over an item's draws, so that an item weighs what it weighs in one draw."""
        pairs = np.array([[(one.value, one.of) for one in draw] for draw in draws], np.float64)
        values, of = np.moveaxis(pairs.sum(axis=0), -1, 0)
        return cls(values, of)

    @property
    def mean(self) -> float:
        """Sum of numerators by sum of denominators."""
        return float(self.values.sum() / self.of.sum())

    def resampled(self, chosen: np.ndarray) -> np.ndarray:
        """`[resamples]` means, of items `chosen` `[resamples, items]`."""
        means: np.ndarray = self.values[chosen].sum(axis=1) / self.of[chosen].sum(axis=1)
        return means


def compare(figures: Mapping[str, Figure], baseline: str, seed: int) -> dict[str, dict[str, Any]]:
    """Mean of each arm and its difference to the baseline, each with a 95 % bootstrap interval.

    Args:
      figures: by arm, of the same items in the same order.
      baseline: one of the arms; without it there are no differences.
      seed: of the draws.

    Raises:
      ValueError: arms with different numbers of items.
    """
    counts = {len(figure.values) for figure in figures.values()}
    if len(counts) != 1:
        raise ValueError(f"figures of {sorted(counts)} items: all arms must have the same ones")
    (count,) = counts
    chosen = np.random.default_rng(seed).integers(0, count, (_RESAMPLES, count))
    base = figures.get(baseline)
    found: dict[str, dict[str, Any]] = {}
    for name, figure in figures.items():
        means = figure.resampled(chosen)
        found[name] = {"mean": figure.mean, "interval": _interval(means)}
        if base is not None and name != baseline:
            found[name] |= {
                "difference": figure.mean - base.mean,
                "difference_interval": _interval(means - base.resampled(chosen)),
            }
    return found


def _interval(values: np.ndarray) -> list[float]:
    low, high = np.percentile(values, _BOUNDS)
    return [float(low), float(high)]
