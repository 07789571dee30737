"""Where the experts of a running engine lie: what its routers choose, and when experts move.

Experts of one layer move between two steps, all at once, and the steps after them find them there; the next layer's
move between the next two. So no step waits for more than one layer's move, and every step sees each layer whole.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from jaxdual.engine.mesh_programs import MeshPrograms
from jaxdual.engine.router_counts import RouterCounts
from jaxdual.engine.runner import Runner
from jaxdual.engine.warm_up import timed
from jaxdual.scheduling.expert_figures import imbalance
from jaxdual.scheduling.expert_policies import WINDOW, ExpertPolicy, RouterWindow
from jaxdual.scheduling.experts import INTERVAL, Move, Placement, keep_slots, moves


class ExpertBalancer:
    """Counts what routers choose, window by window, and moves experts as a policy says.

    Args:
      runner: whose model has experts on several devices, and counts what its routers choose.
      programs: of the runner.
      placement: where experts are now.
      policy: where experts should be; None moves nothing by itself.
      interval: steps between two relocations.
      window: steps whose choices each relocation looks at, the latest ones.

    Attributes:
      placement: where experts are, or will be when all that is under way has moved.
      window: what routers chose in the last full window; None before the first.
    """

    def __init__(
        self,
        runner: Runner,
        programs: MeshPrograms,
        placement: Placement,
        *,
        policy: ExpertPolicy | None,
        interval: int = INTERVAL,
        window: int = WINDOW,
    ) -> None:
        self._runner, self._programs, self._policy = runner, programs, policy
        self._interval, self._window_steps = interval, min(window, interval)
        self._steps = 0
        self._moves: deque[tuple[int, list[Move]]] = deque()
        self.placement = placement
        self.window: RouterWindow | None = None
        self._counts = {"expert_relocations": 0, "experts_moved": 0}

    def before_step(self) -> None:
        """Is called before each step, and moves what is due."""
        self._steps += 1
        if self._steps % self._window_steps == 0:
            counts = self._runner.take_router_counts()
            self.window = None if counts is None else router_window(counts, self.placement.devices)
        if self._policy is not None and self._steps % self._interval == 0 and self.window is not None:
            self.relocate(self._policy(self.window))
        if self._moves:
            row, of_layer = self._moves.popleft()
            self._programs.move_experts(row, of_layer, self.placement)

    def relocate(self, placement: Placement) -> None:
        """Has experts move, from the next step on, to where a placement has them; those that stay keep their slots.

        Raises:
          ValueError: a placement of another shape.
        """
        while self._moves:  # what is under way is not planned anew
            row, of_layer = self._moves.popleft()
            self._programs.move_experts(row, of_layer, self.placement)
        before, self.placement = self.placement, keep_slots(self.placement, placement)
        by_layer: dict[int, list[Move]] = {}
        for move in moves(before, self.placement):
            by_layer.setdefault(move.layer, []).append(move)
        self._moves.extend(by_layer.items())
        self._counts["expert_relocations"] += 1
        self._counts["experts_moved"] += sum(map(len, by_layer.values()))

    def warm_ups(self) -> Iterator[tuple[str, Callable[[], float]]]:
        """Name of every program that moves experts, and a call that compiles it and returns the seconds it took."""
        return timed(self._programs.warm_up_moves() if self._policy is not None else ())

    @property
    def is_moving(self) -> bool:
        """Whether experts are still to move."""
        return bool(self._moves)

    def stats(self) -> Mapping[str, float]:
        """Figures named as in `EngineStats`."""
        uneven = np.ones(1) if self.window is None else imbalance(self.window.activations, self.placement)
        return {
            **self._counts,
            "expert_imbalance": float(uneven.mean()),
            "expert_imbalance_worst": float(uneven.max()),
        }


def router_window(counts: RouterCounts, devices: int) -> RouterWindow:
    """Counts of all ranks, by the device along the expert axis that each rank is on."""
    activations = np.asarray(counts.activations)
    by_device = activations.reshape(-1, devices, *activations.shape[1:]).sum(axis=0)
    transitions = None if counts.transitions is None else np.asarray(counts.transitions).sum(axis=0)
    return RouterWindow(int(np.sum(counts.tokens)), by_device.transpose(1, 0, 2), transitions)
