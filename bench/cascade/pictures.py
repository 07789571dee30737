"""Cost and accuracy of all ways to answer, in one picture."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_STYLES = {
    "random model": ("black", ":"),
    "random gate": ("tab:gray", ":"),
    "P(T)": ("tab:blue", "-"),
    "P(IK)": ("tab:orange", "-"),
    "margin": ("tab:green", "--"),
    "entropy": ("tab:olive", "--"),
    "P(True)": ("tab:brown", "--"),
    "cascade routing": ("tab:purple", "-."),
}


def check_drawing() -> None:
    """Raises `ValueError` if pictures cannot be drawn here."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--picture needs matplotlib: pip install 'jaxdual[plot]'")


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draws the multiple-choice test questions; `check_drawing` comes first."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    judged = report["multiple_choice"]
    figure, axes = plt.subplots(figsize=(7.5, 5), layout="constrained")
    for name, curve in judged["curves"].items():
        color, line = _STYLES.get(name, ("tab:cyan", "-"))
        points = [(point["cost"], point["accuracy"]) for point in curve["points"]]
        axes.plot(*zip(*points, strict=True), color=color, linestyle=line, linewidth=1.2, label=name)
    for name, color in (("chosen", "tab:red"), ("paper", "tab:pink")):
        chain = judged["chains"][name]
        axes.plot(chain["cost"], chain["accuracy"], "*", color=color, markersize=13, label=f"both scores, {name}")
    oracle = judged["oracle"]
    axes.plot(oracle["cost"], oracle["accuracy"], "k^", label="oracle")
    axes.set(xlabel="compute of all passes, of the larger model's", ylabel="right")
    axes.set_xlim(0, max(1.25, *(chain["cost"] * 1.05 for chain in judged["chains"].values())))
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=90)
    plt.close(figure)
