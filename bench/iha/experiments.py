"""The experiments by name: what `python -m bench.iha` knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bench.iha import composition, constructions, costs, cpm3, filters, lm, masks, upcycle
from bench.iha.results import Result, Setting


@dataclass(frozen=True, slots=True)
class Experiment:
    """What the command runs under a name.

    Attributes:
      about: in one line.
      run: gives tables, curves and a verdict.
      paired: it compares arms seed by seed, for which one seed is not enough.
    """

    about: str
    run: Callable[[Setting], Result]
    paired: bool = False


EXPERIMENTS: Mapping[str, Experiment] = {
    "masks": Experiment("who sees whom, and where copies of heads are plain attention", masks.experiment),
    "tables": Experiment("operations and bytes, counted", costs.experiment),
    "constructions": Experiment("weights by hand that the theorems promise", constructions.experiment),
    "filter": Experiment("four powers of a matrix, learned by two heads", filters.experiment),
    "cpm3": Experiment("counts of pairs, learned", cpm3.experiment),
    "composition": Experiment("composition of relations, learned", composition.experiment),
    "lm": Experiment("small language models at equal operations; 25 minutes", lm.experiment, paired=True),
    "upcycle": Experiment(
        "trained models given pseudo heads, and trained on; 10 minutes", upcycle.experiment, paired=True
    ),
}
