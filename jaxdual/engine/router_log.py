"""What the routers of a running engine choose, window by window."""

from __future__ import annotations

import numpy as np

from jaxdual.engine.router_counts import RouterCounts
from jaxdual.engine.runner import Runner
from jaxdual.scheduling.expert_policies import RouterWindow


class RouterLog:
    """What routers choose, window by window.

    Args:
      runner: that counts it.
      devices: along the expert axis.
      window: steps of a window.
      period: steps from the end of a window to that of the next one; those between are not looked at.

    Attributes:
      window: the last full one; None before the first.
    """

    def __init__(self, runner: Runner, devices: int, window: int, period: int | None = None) -> None:
        self._runner, self._devices, self._window = runner, devices, window
        self._period = window if period is None else period
        self._begin = (self._period - window) % self._period
        self._steps = 0
        self.window: RouterWindow | None = None

    def before_step(self) -> RouterWindow | None:
        """Is called before each step; the window that ends with the step before, if one does."""
        phase = self._steps % self._period
        ends = phase == 0 and self._steps > 0
        if ends:
            counts = self._runner.take_router_counts()
            self.window = None if counts is None else _window(counts, self._devices, self._window)
        elif phase == self._begin:
            self._runner.take_router_counts()
        self._steps += 1
        return self.window if ends else None

    def end_early(self) -> RouterWindow | None:
        """Ends the window under way after the steps that it has had; None where none is under way.

        The period begins anew with the next step, and `window` stays the last full one.
        """
        steps = (self._steps - 1) % self._period - self._begin + 1
        if not self._steps or steps <= 0:
            return None
        self._steps = 0
        counts = self._runner.take_router_counts()
        return None if counts is None else _window(counts, self._devices, steps)


def _window(counts: RouterCounts, devices: int, steps: int) -> RouterWindow:
    """Counts of all ranks, by the device along the expert axis that each rank is on."""
    activations = np.asarray(counts.activations)
    by_device = activations.reshape(-1, devices, *activations.shape[1:]).sum(axis=0)
    transitions = None if counts.transitions is None else np.asarray(counts.transitions).sum(axis=0)
    return RouterWindow(int(np.sum(counts.tokens)), by_device.transpose(1, 0, 2), transitions, steps)
