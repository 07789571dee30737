"""A picture of what pruners cost, with and without learned scales."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from bench.pruning.claims import perplexities
from bench.pruning.quality import INDUCED, Run


def check_drawing() -> None:
    """Raises `ValueError` if pictures cannot be drawn here."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--picture needs matplotlib: pip install 'jaxdual[plot]'")


def draw(runs: Sequence[Run], patterns: Sequence[str], dense: float, path: Path) -> None:
    """Draws a panel for each pattern, with a point for each seed; `check_drawing` comes first."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, len(patterns), figsize=(3.4 * len(patterns), 3.6), layout="constrained", sharey=True, squeeze=False
    )
    pruners = list(dict.fromkeys(run.pruner for run in runs))
    for axes, pattern in zip(panels[0], patterns, strict=True):
        for place, pruner in enumerate(pruners):
            for induced, color in ((False, "tab:gray"), (True, "tab:blue"))[: 2 if pruner in INDUCED else 1]:
                values = perplexities(runs, pattern, pruner, induced=induced)
                at = [place + (0.15 if induced else -0.15)] * len(values)
                axes.scatter(
                    at, values, color=color, s=14, label=("with SI" if induced else "alone") if place == 0 else None
                )
        axes.axhline(dense, color="gray", linestyle=":", linewidth=1)
        axes.set_xticks(range(len(pruners)), pruners, rotation=60, ha="right")
        axes.set_title(pattern)
    panels[0][0].set_ylabel("perplexity (dotted: dense)")
    panels[0][0].legend()
    figure.savefig(path, dpi=80)
    plt.close(figure)
