"""The experiments by name: what `python -m bench.iha` knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bench.iha import composition, constructions, costs, cpm3, filters, masks
from bench.iha.results import Result, Setting


@dataclass(frozen=True, slots=True)
class Experiment:
    """What the command runs under a name.

    Attributes:
      about: in one line.
      run: gives tables, curves and a verdict.
    """

    about: str
    run: Callable[[Setting], Result]


EXPERIMENTS: Mapping[str, Experiment] = {
    "masks": Experiment("who sees whom, and where copies of heads are plain attention", masks.experiment),
    "tables": Experiment("operations and bytes, counted", costs.experiment),
    "constructions": Experiment("weights by hand that the theorems promise", constructions.experiment),
    "filter": Experiment("four powers of a matrix, learned by two heads", filters.experiment),
    "cpm3": Experiment("counts of pairs, learned", cpm3.experiment),
    "composition": Experiment("composition of relations, learned", composition.experiment),
}
