"""Ways to decode that are compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxdual import DyscoParams

type Heads = Sequence[tuple[int, int]]

RANDOM_SEEDS = 5


@dataclass(frozen=True, slots=True)
class Arm:
    """A way to decode.

    Attributes:
      name: of it.
      dysco: fields of `DyscoParams` beside the heads; None for attention that is not raised.
      random_heads: as many heads as the retrieval heads, drawn from the others, in `RANDOM_SEEDS` draws; their scores
        are averaged item by item.
      uniform: divides all attention logits, in prefill too, by the temperature that the command is given.
    """

    name: str
    dysco: Mapping[str, Any] | None = None
    random_heads: bool = False
    uniform: bool = False

    @property
    def draws(self) -> int:
        """How often the items are run."""
        return RANDOM_SEEDS if self.random_heads else 1


ARMS = (
    Arm("vanilla"),
    Arm("uniform", uniform=True),
    Arm("dysco", dysco={}),
    Arm("dysco_32", dysco={"top_k": 32}),
    Arm("random", dysco={}, random_heads=True),
    Arm("static", dysco={"static": True}),
    *(Arm(mode, dysco={"mode": mode}) for mode in ("tail_chunk", "lag", "split", "lag_fresh", "refresh")),
)
BASELINE = ARMS[0]


@dataclass(frozen=True, slots=True)
class Setting:
    """What all arms share.

    Attributes:
      heads: the retrieval heads.
      num_layers, num_heads: of the model.
      seed: of random heads.
      limits: fields of `DyscoParams` for all arms that raise attention, such as `strength`.
    """

    heads: Heads
    num_layers: int
    num_heads: int
    seed: int
    limits: Mapping[str, Any] = field(default_factory=dict)

    def params(self, arm: Arm, draw: int) -> DyscoParams | None:
        """Of an arm's draw; None where no attention is raised."""
        if arm.dysco is None:
            return None
        heads = self.random_heads(draw) if arm.random_heads else self.heads
        return DyscoParams(**{"heads": heads, **self.limits, **arm.dysco})

    def random_heads(self, draw: int) -> Heads:
        """As many others as there are retrieval heads, or all others if they are fewer."""
        chosen = set(self.heads)
        others = [
            (layer, head)
            for layer in range(self.num_layers)
            for head in range(self.num_heads)
            if (layer, head) not in chosen
        ]
        rng = np.random.default_rng([self.seed, draw])
        places = rng.choice(len(others), min(len(self.heads), len(others)), replace=False)
        return [others[place] for place in sorted(places)]


def with_selection(params: DyscoParams) -> DyscoParams:
    """The same, with what is selected told."""
    return dataclasses.replace(params, return_selection=True)
