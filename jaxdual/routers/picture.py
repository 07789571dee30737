"""A picture of what routers choose, a row for each workload."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxdual.routers.figures import pair_shares, relative_loads
from jaxdual.scheduling.expert_policies import RouterWindow
from jaxdual.scheduling.experts import PAIR_SHARE

_PAIRS = 16  # of each two neighbouring layers that are drawn
_MOST_LABELS = 16  # of layers


def draw(workloads: Mapping[str, RouterWindow], layers: Sequence[int], path: Path) -> None:
    """Draws the load of each expert by the mean of its layer, and the pairs that most tokens choose in neighbouring
    layers; where several devices had sequences, also the devices that these would send their tokens to if experts lay
    in order. See `result_files.check_picture`.

    Args:
      workloads: by name, with transitions, from equally many devices.
      layers: numbers of their layers in the model.
      path: of the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    several = next(iter(workloads.values())).sources.shape[1] > 1
    rows, columns = len(workloads), 3 if several else 2
    figure, axes = plt.subplots(rows, columns, figsize=(4.5 * columns, 3.5 * rows), squeeze=False, layout="constrained")
    highest = max(relative_loads(window).max() for window in workloads.values())
    for (name, window), of_row in zip(workloads.items(), axes, strict=True):
        _draw_loads(of_row[0], name, relative_loads(window), layers, highest)
        _draw_pairs(of_row[1], name, pair_shares(window), layers)
        if several:
            _draw_devices(of_row[2], name, window)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def device_traffic(window: RouterWindow) -> np.ndarray:
    """Part `[devices, devices]` of the choices of each device's tokens that fall on each device's experts, over all
    layers, if experts lie in order."""
    _, devices, experts = window.sources.shape
    chosen = window.sources.sum(axis=0).reshape(devices, devices, experts // devices).sum(axis=2).astype(float)
    parts: np.ndarray = chosen / np.maximum(chosen.sum(axis=1, keepdims=True), 1)
    return parts


def _draw_loads(axes: Any, name: str, loads: np.ndarray, layers: Sequence[int], highest: float) -> None:
    from matplotlib.colors import TwoSlopeNorm

    norm = TwoSlopeNorm(1.0, 0.0, max(highest, 1.01))
    image = axes.imshow(loads, cmap="coolwarm", norm=norm, aspect="auto", interpolation="nearest")
    axes.set(title=f"{name}: load of experts / even load", xlabel="expert", ylabel="layer")
    _label(axes.yaxis, [str(layer) for layer in layers])
    axes.figure.colorbar(image, ax=axes)


def _draw_pairs(axes: Any, name: str, shares: np.ndarray, layers: Sequence[int]) -> None:
    strongest = -np.sort(-shares.reshape(len(shares), shares.shape[1] ** 2), axis=1)[:, :_PAIRS]
    at = np.repeat(np.arange(len(shares)), strongest.shape[1])
    axes.plot(at, strongest.reshape(-1), "_", color="tab:blue", markersize=10)
    axes.axhline(PAIR_SHARE, color="tab:red", linestyle="--", linewidth=1, label=f"{PAIR_SHARE}: the paper's pool")
    axes.set(title=f"{name}: strongest pairs", xlabel="layers", ylabel="part of all tokens", ylim=(0, 1))
    _label(axes.xaxis, [f"{before}-{after}" for before, after in itertools.pairwise(layers)])
    axes.legend(loc="upper right")


def _draw_devices(axes: Any, name: str, window: RouterWindow) -> None:
    traffic = device_traffic(window)
    image = axes.imshow(traffic, cmap="viridis", vmin=0, interpolation="nearest")
    axes.set(title=f"{name}: part of choices", xlabel="device of the expert", ylabel="device of the sequence")
    for axis in (axes.xaxis, axes.yaxis):
        _label(axis, [str(device) for device in range(len(traffic))])
    axes.figure.colorbar(image, ax=axes)


def _label(axis: Any, names: Sequence[str]) -> None:
    step = -(-len(names) // _MOST_LABELS) or 1
    axis.set_ticks(range(0, len(names), step), names[::step])
