"""Placements of experts by name, from what routers have chosen lately."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from jaxdual.scheduling.expert_activity import DECODE_TOKENS, metro
from jaxdual.scheduling.experts import Placement, build_pool, by_column, by_source, edr, eplb

EXPERT_PLACEMENTS = ("linear", "eplb", "edr", "edr_column", "source", "metro")
COPYING = ("eplb", "metro")  # placements that have a use for redundant slots
WINDOW = 1000  # steps that a relocation looks at, as vLLM's


@dataclass(frozen=True, slots=True)
class RouterWindow:
    """What routers chose in some steps.

    Attributes:
      tokens: that were routed.
      sources: `[layers, devices, experts]` tokens of each device's sequences that chose each expert.
      transitions: `[layers - 1, experts, experts]` tokens that chose expert i in a layer and j in the next; None where
        they were not counted.
      steps: in which they were routed; None where that is not known.
    """

    tokens: int
    sources: np.ndarray
    transitions: np.ndarray | None = None
    steps: int | None = None

    @property
    def activations(self) -> np.ndarray:
        """`[layers, experts]` tokens that chose each expert."""
        total: np.ndarray = self.sources.sum(axis=1)
        return total

    @property
    def step_tokens(self) -> float:
        """Tokens of a step, on average; `DECODE_TOKENS` where steps were not counted."""
        return self.tokens / self.steps if self.steps else DECODE_TOKENS


type ExpertPolicy = Callable[[RouterWindow], Placement]


def expert_policy(
    name: str, devices: int, *, redundant: int = 0, anchor: int = 0, profile: RouterWindow | None = None
) -> ExpertPolicy | None:
    """The policy that a configuration names; None for "linear", which never moves anything.

    Args:
      name: one of `EXPERT_PLACEMENTS`.
      devices: that share each layer's experts.
      redundant: slots of a layer beyond one for each expert, which those of `COPYING` have a use for.
      anchor: the device of the pool, of "edr" and "edr_column".
      profile: transitions that the pool is made of, counted before; without, those of the first window.

    Raises:
      ValueError: another name, or redundant slots for a policy without a use for them.
    """
    if name not in EXPERT_PLACEMENTS:
        raise ValueError(f"expert placement {name!r} must be one of {', '.join(EXPERT_PLACEMENTS)}")
    if redundant and name not in ("linear", *COPYING):
        raise ValueError(
            f"expert placement {name!r} has no use for {redundant} redundant slots: {' and '.join(COPYING)} have"
        )
    if name == "linear":
        return None
    if name == "eplb":
        return lambda window: eplb(window.activations, devices, redundant=redundant)
    if name == "metro":
        return lambda window: metro(
            window.activations, window.tokens, devices, step_tokens=window.step_tokens, redundant=redundant
        )
    if name == "source":
        return lambda window: by_source(window.sources)
    return _Pinned(devices, anchor, profile, column=name == "edr_column")


class _Pinned:
    """Algorithm 3: the pool is made once, so that its experts never move again."""

    def __init__(self, devices: int, anchor: int, profile: RouterWindow | None, *, column: bool) -> None:
        self._devices, self._anchor, self._column = devices, anchor, column
        self._pool: np.ndarray | None = None if profile is None else self._pool_of(profile)

    def __call__(self, window: RouterWindow) -> Placement:
        if self._pool is None:
            self._pool = self._pool_of(window)
        place = by_column if self._column else edr
        return place(window.activations, self._pool, self._devices, anchor=self._anchor)

    def _pool_of(self, window: RouterWindow) -> np.ndarray:
        layers, _, experts = window.sources.shape
        if window.transitions is None:
            raise ValueError("a pool is made of transitions, which were not counted")
        room = experts // self._devices
        if not self._column:
            return build_pool(window.transitions, window.tokens, room).experts
        # Both ends of the pairs, of all layers together, lie on the anchor: each may have half of its slots.
        pairs = window.transitions.sum(axis=0, keepdims=True)
        both = build_pool(pairs, window.tokens * len(window.transitions), room // 2).experts.any(axis=0)
        return np.tile(both, (layers, 1))
