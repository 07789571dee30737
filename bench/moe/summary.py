"""What runs of several arms say: changes against a baseline, their intervals, and tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

type Runs = Sequence[dict[str, Any]]

_RESAMPLES = 2000
_SERIES = ("ttft_s", "tpot_s")  # kept seed by seed
_MEANS = ("ttft_p50_s", "ttft_p95_s", "ttft_p99_s", "ttft_most_s", "tpot_p50_s", "tpot_p95_s", "tpot_p99_s")
_MEANS += ("waited_most_s", "tokens_per_s", "steps", "preemptions", "relocations", "aged", "imbalance", "kv_full_share")


def changes(runs: Runs, arm: str, baseline: str, figure: str) -> np.ndarray:
    """Relative changes against the baseline, `[shapes, seeds]`, at one rate."""
    values, base = (_by_shape(runs, name, figure) for name in (arm, baseline))
    return values / base - 1


def change_of_means(runs: Runs, arm: str, baseline: str, figure: str) -> tuple[float, float, float]:
    """Change of the mean over seeds, on average over shapes, and its interval: what a few very slow runs weigh."""
    values, base = (_by_shape(runs, name, figure) for name in (arm, baseline))
    shapes, seeds = values.shape
    chosen = np.random.default_rng(0).integers(0, seeds, (_RESAMPLES, shapes, seeds))
    resampled = [np.take_along_axis(one[None], chosen, axis=2).mean(axis=2) for one in (values, base)]
    low, high = np.percentile((resampled[0] / resampled[1] - 1).mean(axis=1), [2.5, 97.5])
    return float((values.mean(axis=1) / base.mean(axis=1) - 1).mean()), float(low), float(high)


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of all values, drawn within each row."""
    rows = np.atleast_2d(values)
    chosen = np.random.default_rng(0).integers(0, rows.shape[1], (_RESAMPLES, *rows.shape))
    means = np.take_along_axis(rows[None], chosen, axis=2).mean(axis=(1, 2))
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _by_shape(runs: Runs, arm: str, figure: str) -> np.ndarray:
    rows: dict[str, dict[int, float]] = {}
    for one in runs:
        if one["arm"] == arm:
            rows.setdefault(one["shape"], {})[one["seed"]] = one[figure]
    return np.array([[of_seed[seed] for seed in sorted(of_seed)] for _, of_seed in sorted(rows.items())])


def compare(runs: Runs, arm: str, baseline: str, rate: float) -> dict[str, Any]:
    """An arm against a baseline at one rate: means of changes seed by seed, changes of means, and intervals."""
    at = [one for one in runs if one["rate"] == rate]
    found: dict[str, Any] = {"arm": arm, "baseline": baseline, "rate": rate}
    for figure in ("ttft_s", "tpot_s", "tokens_per_s", "ttft_p99_s"):
        values = changes(at, arm, baseline, figure)
        of_means = change_of_means(at, arm, baseline, figure)
        found[figure] = {
            "change": round(float(values.mean()), 4),
            "interval": [round(bound, 4) for bound in interval(values)],
            "of_means": round(of_means[0], 4),
            "interval_of_means": [round(bound, 4) for bound in of_means[1:]],
            "shapes_better": int((values.mean(axis=1) < 0).sum()),
            "runs_better": round(float((values < 0).mean()), 3),
        }
    return found


def cells(runs: Runs) -> list[dict[str, Any]]:
    """Each arm at each rate and shape: the mean over seeds of all figures, and TTFT and TPOT of each seed."""
    groups: dict[tuple[float, str, str], list[dict[str, Any]]] = {}
    for one in runs:
        groups.setdefault((one["rate"], one["shape"], one["arm"]), []).append(one)
    return [{"rate": rate, "shape": shape, "arm": arm, **_mean(group)} for (rate, shape, arm), group in groups.items()]


def _mean(group: Runs) -> dict[str, Any]:
    ordered = sorted(group, key=lambda one: one["seed"])
    means: dict[str, Any] = {figure: [round(one[figure], 4) for one in ordered] for figure in _SERIES}
    means |= {figure: round(float(np.mean([one[figure] for one in group])), 4) for figure in _MEANS}
    total: Counter[str] = Counter()
    for one in group:
        total.update(one["branches"])
    return means | {"branches": dict(total)}


def change_rows(compared: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Rows of the table whose head is `CHANGE_COLUMNS`."""
    rows = []
    for one in compared:
        row = [one["arm"], f"{one['rate']}"]
        for figure in _SERIES:
            change = one[figure]
            row += [f"{change['change']:+.1%}", _span(change["interval"])]
            row += [f"{change['of_means']:+.1%}", _span(change["interval_of_means"])]
        row += [f"{one['tokens_per_s']['change']:+.1%}", f"{one['ttft_s']['runs_better']:.0%}"]
        rows.append(row)
    return rows


CHANGE_COLUMNS = ("arm", "rate", "TTFT", "95 %", "of means", "95 %", "TPOT", "95 %", "of means", "95 %", "tokens/s")
CHANGE_COLUMNS += ("runs better",)
FIGURE_COLUMNS = ("arm", "TTFT, s", "P50", "P95", "P99", "TPOT, ms", "P99", "most waited, s", "aged", "preempted")
FIGURE_COLUMNS += ("relocations", "phi", "KV full", "rules")


def figure_rows(runs: Runs, rate: float) -> list[list[str]]:
    """Rows of the table whose head is `FIGURE_COLUMNS`: means over shapes and seeds; the longest wait of all."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for one in runs:
        if one["rate"] == rate:
            groups.setdefault(one["arm"], []).append(one)
    return [_figure_row(arm, group) for arm, group in groups.items()]


def _figure_row(arm: str, group: Runs) -> list[str]:
    mean = {name: np.mean([one[name] for one in group]) for name, value in group[0].items() if isinstance(value, float)}
    counts = {name: np.mean([one[name] for one in group]) for name in ("aged", "preemptions", "relocations")}
    rules: Counter[str] = Counter()
    for one in group:
        rules.update(one["branches"])
    return [
        arm,
        *(f"{mean[f'ttft_{part}s']:.3f}" for part in ("", "p50_", "p95_", "p99_")),
        *(f"{1000 * mean[f'tpot_{part}s']:.1f}" for part in ("", "p99_")),
        f"{max(one['waited_most_s'] for one in group):.1f}",
        *(f"{count:.1f}" for count in counts.values()),
        f"{mean['imbalance']:.3f}",
        f"{mean['kv_full_share']:.1%}",
        " ".join(f"{rule} {count / rules.total():.1%}" for rule, count in sorted(rules.items())),
    ]


def better_points(compared: Sequence[dict[str, Any]]) -> dict[tuple[str, str], tuple[int, int]]:
    """Of each arm and baseline, at how many shapes and rates the mean TTFT and TPOT are better."""
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for one in compared:
        ttft, tpot = found.get((one["arm"], one["baseline"]), (0, 0))
        better = one["ttft_s"]["shapes_better"], one["tpot_s"]["shapes_better"]
        found[one["arm"], one["baseline"]] = (ttft + better[0], tpot + better[1])
    return found


def _span(bounds: Sequence[float]) -> str:
    return f"{bounds[0]:+.1%} to {bounds[1]:+.1%}"
