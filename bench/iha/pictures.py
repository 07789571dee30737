"""Pictures of curves."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bench.iha.results import Curves


def draw(curves: Curves, path: Path) -> None:
    """Draws each arm's mean over seeds, between its lowest and highest. See `result_files.check_picture`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for name, seeds in curves.lines.items():
        # Seeds that stopped early end their arm's line.
        points = np.array([seed[: min(len(one) for one in seeds)] for seed in seeds], np.float64)
        places, values = points[0, :, 0], points[:, :, 1]
        middle = np.exp(np.log(values).mean(axis=0)) if curves.log else values.mean(axis=0)
        (line,) = axes.plot(places, middle, label=name)
        axes.fill_between(places, values.min(axis=0), values.max(axis=0), color=line.get_color(), alpha=0.2)
    names: dict[float, list[str]] = {}
    for name, level in curves.levels.items():
        names.setdefault(round(level, 3), []).append(name)
    for level, alike in names.items():
        axes.axhline(level, color="gray", linestyle=":", linewidth=1)
        place = (1, level)
        axes.annotate(", ".join(alike), place, xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    axes.set(title=curves.title, xlabel=curves.x, ylabel=curves.y, yscale="log" if curves.log else "linear")
    axes.legend()
    figure.savefig(path, dpi=80)
    plt.close(figure)
