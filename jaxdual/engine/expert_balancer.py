"""Where the experts of a running engine lie, and when they move.

Experts of one layer move between two steps, all at once, and the steps after them find them there; the next layer's
move between the next two. So no step waits for more than one layer's moves, and every step sees each layer whole.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from jaxdual.engine.router_log import RouterLog
from jaxdual.engine.runner import Runner
from jaxdual.scheduling.expert_figures import imbalance
from jaxdual.scheduling.expert_policies import ExpertPolicy, RouterWindow
from jaxdual.scheduling.experts import Move, Placement, keep_slots, moves


class ExpertBalancer:
    """Moves experts as a policy says, whenever a window of choices ends.

    Args:
      runner: whose model has experts on several devices.
      placement: where experts are now.
      log: of the runner; None where nothing is counted.
      policy: where experts should be; None moves nothing by itself.

    Attributes:
      placement: where experts are, or will be when all that is under way has moved.
    """

    def __init__(
        self,
        runner: Runner,
        placement: Placement,
        *,
        log: RouterLog | None = None,
        policy: ExpertPolicy | None = None,
    ) -> None:
        self._runner, self._policy, self._log = runner, policy, log
        self._moves: deque[tuple[int, list[Move]]] = deque()
        self._now = placement.experts.copy()
        self.placement = placement
        self._counts = {"expert_relocations": 0, "experts_moved": 0}

    def before_step(self, window: RouterWindow | None) -> None:
        """Is called before each step, and moves what is due.

        Args:
          window: what routers chose, if a window of it has just ended. It is passed over while experts still move.
        """
        if self._policy is not None and window is not None and window.tokens and not self._moves:
            self.relocate(self._policy(window))
        if self._moves:
            self._move_next()

    def relocate(self, placement: Placement) -> None:
        """Has experts move, from the next step on, to where a placement has them; those that stay keep their slots.

        What is still under way to an earlier placement moves at once.

        Raises:
          ValueError: a placement of another shape.
        """
        while self._moves:
            self._move_next()
        before, self.placement = self.placement, keep_slots(self.placement, placement)
        by_layer: dict[int, list[Move]] = {}
        for move in moves(before, self.placement):
            by_layer.setdefault(move.layer, []).append(move)
        self._moves.extend(by_layer.items())
        self._counts["expert_relocations"] += 1
        self._counts["experts_moved"] += sum(map(len, by_layer.values()))

    def _move_next(self) -> None:
        row, of_layer = self._moves.popleft()
        self._runner.move_experts(row, of_layer, self.placement.experts[row].tolist())
        self._now[row] = self.placement.experts[row]

    @property
    def decides(self) -> bool:
        """Whether it moves experts by itself."""
        return self._policy is not None

    @property
    def is_moving(self) -> bool:
        """Whether experts are still to move."""
        return bool(self._moves)

    def stats(self) -> Mapping[str, float]:
        """Figures named as in `EngineStats`."""
        window = None if self._log is None else self._log.window
        if window is None:
            return self._counts
        uneven = imbalance(window.activations, self.now)
        return {
            **self._counts,
            "expert_imbalance": float(uneven.mean()),
            "expert_imbalance_worst": float(uneven.max()),
        }

    @property
    def now(self) -> Placement:
        """Where experts lie."""
        return Placement(self._now, self.placement.devices, self.placement.num_experts)
