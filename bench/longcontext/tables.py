"""A report's tables, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.report import table


def arm_table(report: Mapping[str, Any]) -> str:
    """Each arm's figures, and their differences to the baseline, with 95 % intervals."""
    rows: list[Sequence[object]] = []
    for cell in report["cells"]:
        for figure, arms in cell["figures"].items():
            for arm, one in arms.items():
                rows.append(
                    [
                        f"{cell['task']} {cell['length']}",
                        figure,
                        arm,
                        f"{one['mean']:.3f}",
                        _span(one["interval"], "{:.3f}"),
                        *(
                            [f"{one['difference']:+.3f}", _span(one["difference_interval"], "{:+.3f}")]
                            if "difference" in one
                            else ["", ""]
                        ),
                    ]
                )
    return table(["cell", "figure", "arm", "mean", "95 %", "to vanilla", "95 %"], rows)


def selection_table(report: Mapping[str, Any]) -> str:
    """What was selected, as means over steps."""
    columns = ("size", "relevance", "limited", "jaccard", "gold")
    rows = [
        [f"{cell['task']} {cell['length']}", arm, *(one[column] for column in columns)]
        for cell in report["cells"]
        for arm, one in cell["selection"].items()
    ]
    return table(
        [
            "cell",
            "arm",
            "selected",
            "of the relevance",
            "limited by top_k",
            "Jaccard to the step before",
            "of gold lines",
        ],
        rows,
    )


def time_table(report: Mapping[str, Any]) -> str:
    """Time to the first token of a request alone, and tokens per second of several."""
    rows = [
        [f"{cell['task']} {cell['length']}", arm, 1000 * one["ttft_s"], one["output_tokens_per_s"]]
        for cell in report["cells"]
        for arm, one in cell["times"].items()
    ]
    return table(["cell", "arm", "TTFT, ms", "output tokens/s"], rows)


def _span(bounds: Sequence[float], form: str) -> str:
    return " to ".join(form.format(bound) for bound in bounds)
