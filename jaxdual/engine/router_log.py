"""What the routers of a running engine choose, window by window."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxdual.engine.router_counts import RouterCounts
from jaxdual.engine.runner import Runner
from jaxdual.outputs import RouterFigures
from jaxdual.scheduling.expert_policies import RouterWindow
from jaxdual.scheduling.experts import Placement


class RouterLog:
    """What routers choose, window by window.

    Args:
      runner: that counts it.
      devices: along the expert axis.
      window: steps of a window.
      layers: with experts, by number.
      period: steps from the end of a window to that of the next one; those between are not looked at.

    Attributes:
      window: the last full one; None before the first.
    """

    def __init__(
        self, runner: Runner, devices: int, window: int, period: int | None = None, layers: Sequence[int] = ()
    ) -> None:
        self._runner, self._devices, self._window = runner, devices, window
        self._layers = tuple(layers)
        self._fixed: tuple[RouterWindow, RouterFigures] | None = None
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

    def figures(self, placement: Placement | None) -> RouterFigures:
        """Figures of `window`, which is there.

        Args:
          placement: where experts lie, on several devices.
        """
        window = self.window
        if window is None:
            raise ValueError("no window is full yet")
        if self._fixed is None or self._fixed[0] is not window:
            self._fixed = (window, _fixed_figures(window, self._layers))
        figures = self._fixed[1]
        if placement is None or placement.devices == 1:
            return figures
        return dataclasses.replace(figures, traffic=_traffic(window, placement))

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


def _fixed_figures(window: RouterWindow, layers: tuple[int, ...]) -> RouterFigures:
    """All but those of where experts lie."""
    activations = window.activations.astype(float)
    loads = activations / np.maximum(activations.mean(axis=1, keepdims=True), 1e-9)
    pairs: tuple[float, ...] = ()
    if window.transitions is not None:
        pairs = tuple((window.transitions.max(axis=(1, 2)) / max(window.tokens, 1)).tolist())
    return RouterFigures(layers, window.tokens, tuple(map(tuple, loads.round(4).tolist())), pairs)


def _traffic(window: RouterWindow, placement: Placement) -> tuple[tuple[float, ...], ...]:
    """Copies of an expert share its tokens."""
    share = placement.device_shares()
    chosen = np.einsum("lse,led->sd", window.sources.astype(float), share)
    return tuple(map(tuple, (chosen / np.maximum(chosen.sum(axis=1, keepdims=True), 1e-9)).round(4).tolist()))
