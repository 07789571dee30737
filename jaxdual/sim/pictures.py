"""Pictures of a simulation: what each storage card carried over time, and how many requests waited where."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_MOST_LINES = 16  # of a kind of card; above, the middle and the outermost are drawn


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draws a report's figures over time; see `result_files.check_picture`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    window, series = report["config"]["window_seconds"], report["over_time"]
    figure, (cards, queues) = plt.subplots(2, 1, figsize=(10, 8), sharex=True, layout="constrained")
    rate = report["config"]["cluster"]["snic"] * window
    for side, color in (("prefill", "tab:blue"), ("decode", "tab:orange")):
        used = np.array(series["storage_read_bytes"][side]) / rate
        times = np.arange(used.shape[1]) * window
        lines = used if len(used) <= _MOST_LINES else np.quantile(used, [0.0, 0.5, 1.0], axis=0)
        for number, line in enumerate(lines):
            cards.plot(times, line, color=color, linewidth=0.8, label=None if number else f"{side} nodes")
    cards.set(ylabel="storage card: part of its rate read", ylim=(0, 1.05))
    cards.legend()
    for name, counts in series["requests"].items():
        queues.plot(np.arange(len(counts)) * window, counts, label=name)
    queues.set(xlabel="simulated seconds", ylabel="requests")
    queues.legend()
    cluster = report["config"]["cluster"]
    name = f"{report['config']['model']['name']}, {cluster['prefill_nodes']}P{cluster['decode_nodes']}D"
    figure.suptitle(f"{name}, {report['mode']}: {report['jct_s']:.0f} s")
    figure.savefig(path, dpi=120)
    plt.close(figure)
