"""Candidates for an operating point at which TTFT and TPOT change as published, both at once.

Only the cluster's constants, KV memory and how uneven routers are differ; the factor on all times is fitted to the
baseline, and policies have the published thresholds. Candidates are compared on seeds of their own, so that what is
said of the chosen one later is measured on others.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any

import numpy as np

from bench.moe.arms import ARMS
from bench.moe.campaign import FITTED_RATE, Case, Load, calibrate_all, run, run_all
from bench.moe.points import Point, make_point
from bench.moe.summary import changes
from bench.moe.workload import SHAPES
from bench.report import table

SEEDS = (2000, 2001, 2002)
_NAMES = ("rr", "Gimbal", "Gimbal relaxed")
# Profile of step times, KV memory by that of `kv_tight` (None for ample), tilt of the routers.
CANDIDATES: tuple[tuple[str, float | None, float], ...] = (
    ("fixed", 1.0, 0.65),
    ("mid", None, 0.65),
    ("moe", None, 0.4),
    ("moe", 1.0, 0.4),
    ("moe", 2.0, 0.25),
)


def measure(pool: Executor, point: Point, load: Load, shapes: Sequence[str] = SHAPES) -> dict[str, Any]:
    """A candidate's baseline, and what both readings of the paper's algorithm change in it."""
    slow = calibrate_all(pool, point, load, shapes)
    arms = [arm for arm in ARMS if arm.name in _NAMES]
    cases = [
        Case(point, load, shape, FITTED_RATE, arm, seed, slow[shape])
        for shape in shapes
        for arm in arms
        for seed in SEEDS
    ]
    runs = run_all(pool, run, cases)
    base = [one for one in runs if one["arm"] == _NAMES[0]]
    row: dict[str, Any] = {
        "phi": round(float(np.mean([one["imbalance"] for one in base])), 3),
        "KV full": f"{np.mean([one['kv_full_share'] for one in base]):.1%}",
        "P99, s": round(float(np.mean([one["ttft_p99_s"] for one in base])), 2),
    }
    for name in _NAMES[1:]:
        for figure, short in (("ttft_s", "TTFT"), ("tpot_s", "TPOT")):
            row[f"{name}: {short}"] = f"{changes(runs, name, _NAMES[0], figure).mean():+.1%}"
    return row


def search_report(pool: Executor, requests: int) -> list[dict[str, Any]]:
    """All candidates, printed and returned."""
    rows = []
    for profile, memory, tilt in CANDIDATES:
        row = measure(pool, make_point(profile, memory, tilt), Load(requests))
        rows.append({"profile": profile, "KV memory": memory, "tilt": tilt} | row)
    print(table(list(rows[0]), [list(row.values()) for row in rows]))
    return rows
