"""What an experiment is given, and what it hands back: tables, curves and a verdict, all of which JSON can hold."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scipy import stats

from bench.report import table


@dataclass(frozen=True, slots=True)
class Setting:
    """How much is to be done.

    Attributes:
      seeds: runs of each arm, from seed 0.
      full: the whole protocol, which is meant for a GPU, in place of what two CPU cores can do in minutes.
      keep: folder of training runs that are done, where experiments of many runs go on; None for none.
    """

    seeds: int = 3
    full: bool = False
    keep: Path | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under a head.

    Attributes:
      title: what it shows, in one line.
      head: names of the columns.
      rows: cells: texts, numbers, or None for nothing.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[object]]

    def text(self) -> str:
        return f"{self.title}\n{table(self.head, self.rows)}"


@dataclass(frozen=True, slots=True)
class Curves:
    """Lines over one axis.

    Attributes:
      title, x, y: of the picture and its axes.
      log: whether the vertical axis is logarithmic.
      lines: by arm, and within it by seed, points `(x, y)`.
      levels: horizontal lines by name: the trivial baselines.
    """

    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[Sequence[tuple[float, float]]]]
    log: bool = False
    levels: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Result:
    """Of one experiment.

    Attributes:
      tables: in the order in which they are printed.
      verdict: one line: what was seen, and whether it is what was expected.
      holds: whether it is.
      curves: of what was trained.
      figures: everything behind the tables.
    """

    tables: Sequence[Table]
    verdict: str
    holds: bool
    curves: Sequence[Curves] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


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
