"""Means of several seeds with intervals, and what a difference says by its own."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats


@dataclass(frozen=True, slots=True)
class Summary:
    """Of values of several seeds.

    Attributes:
      mean: of the values.
      interval: of the mean, 95 %, by Student's t; None for a single value.
      lowest, highest: of the values.
    """

    mean: float
    interval: tuple[float, float] | None
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        mean, interval = statistics.fmean(values), None
        if len(values) > 1:
            error = statistics.stdev(values) / len(values) ** 0.5
            half = float(stats.t.ppf(0.975, len(values) - 1)) * error
            interval = (mean - half, mean + half)
        return cls(mean, interval, min(values), max(values))

    def text(self, form: str = "{:.4f}") -> str:
        """Mean and interval."""
        mean = form.format(self.mean)
        return mean if self.interval is None else f"{mean} ({' to '.join(form.format(end) for end in self.interval)})"

    def span(self, form: str = "{:.1e}") -> str:
        """The lowest value to the highest."""
        return f"{form.format(self.lowest)} to {form.format(self.highest)}"


def compared(difference: Summary) -> str:
    """What a difference to something else says, by its interval: for a sentence that goes on with the other's name."""
    if difference.interval is None:
        return "has too few seeds to compare with"
    low, high = difference.interval
    return "is ahead of" if low > 0 else "is behind" if high < 0 else "shows no separation from"
