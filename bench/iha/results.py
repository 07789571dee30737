"""What an experiment is given, and what it hands back: tables, curves and a verdict, all of which JSON can hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
