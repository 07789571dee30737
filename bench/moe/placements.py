"""What placements of experts are worth on choices that they were not made from, and what it costs to come to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.moe.routing import RouterTrace, draw_trace
from bench.report import table
from jaxdual.scheduling.expert_activity import DECODE_TOKENS
from jaxdual.scheduling.expert_figures import cut, device_loads, imbalance, traffic
from jaxdual.scheduling.expert_oracle import best_placement
from jaxdual.scheduling.expert_policies import RouterWindow, expert_policy
from jaxdual.scheduling.experts import (
    Placement,
    build_pool,
    edr,
    eplb,
    keep_slots,
    linear_placement,
    migration_cost,
    moves,
)

EXPERT_BYTES = 3 * 2048 * 768 * 2  # Qwen3-30B-A3B in bf16
BANDWIDTH = 100e9  # bytes per second that a device receives: a third of an A100's NVLink in one direction
_TOKENS = 4096
_REDUNDANT = 16
_EVALUATED, _PROFILE, _EARLIER = 0, 1, 2  # seeds of traces


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way to place experts."""

    name: str
    place: Callable[[RouterWindow], Placement]


def candidates(devices: int, profile: RouterWindow) -> list[Candidate]:
    """All placements by name, those with copies, and with eight devices one that keeps groups of experts on a node."""
    layers, _, experts = profile.sources.shape
    found = [Candidate("linear", lambda window: linear_placement(layers, experts, devices))]
    for name in ("eplb", "edr", "edr_column", "source", "metro"):
        for redundant in (0, _REDUNDANT) if name in ("eplb", "metro") else (0,):
            policy = expert_policy(name, devices, redundant=redundant, profile=profile)
            if policy is not None:
                found.append(Candidate(f"{name}, {redundant} copies" if redundant else name, policy))
    if devices == 8:
        found += [
            Candidate(
                f"eplb, {_REDUNDANT} copies, 2 nodes",
                lambda window: eplb(window.activations, devices, redundant=_REDUNDANT, groups=8, nodes=2),
            )
        ]
    return found


def worth(placement: Placement, trace: RouterTrace, step_tokens: int = DECODE_TOKENS) -> dict[str, float]:
    """Figures of a placement on a trace, whose tokens come from the devices in turn."""
    seen = trace.window(placement.devices)
    phi = imbalance(seen.activations, placement)
    homes = np.arange(step_tokens) % placement.devices
    tokens = trace.choices.shape[1] // step_tokens * step_tokens
    steps = [traffic(part, homes, placement) for part in np.split(trace.choices[:, :tokens], tokens // step_tokens, 1)]
    assert seen.transitions is not None
    return {
        "phi": float(phi.mean()),
        "worst layer": float(phi.max()),
        "cut": cut(seen.transitions, placement),
        "remote copies": float(np.mean([step.remote_copies for step in steps])),
        "experts at work": float(np.mean([step.active_experts for step in steps])),
    }


def relocation(before: Placement, after: Placement) -> dict[str, float]:
    """What coming from one placement to another takes, experts that stay on a device keeping their slots."""
    kept = keep_slots(before, after)
    cost = migration_cost(moves(before, kept), kept, EXPERT_BYTES, BANDWIDTH)
    moved = {"experts moved": cost.copies, "GB between devices": cost.bytes_between / 1e9}
    return moved | {"stall, ms": 1000 * cost.stall_seconds}


def placement_rows(devices: int, *, skew: float = 1.0, tilt: float = 0.0) -> list[dict[str, Any]]:
    """Each candidate's worth, and its relocation from the order of the experts and from an earlier window."""
    served, profile, earlier = (
        draw_trace(_TOKENS, seed, skew=skew, tilt=tilt) for seed in (_EVALUATED, _PROFILE, _EARLIER)
    )
    window, window_before = profile.window(devices), earlier.window(devices)
    rows = []
    for candidate in candidates(devices, window):
        placement = candidate.place(window)
        start = linear_placement(len(placement.experts), placement.num_experts, devices)
        row: dict[str, Any] = {"placement": candidate.name} | worth(placement, served)
        again = relocation(candidate.place(window_before), placement)
        row |= {f"{name}, again": value for name, value in again.items()}
        copied = placement.experts.shape != start.experts.shape
        first = dict.fromkeys(again) if copied else relocation(start, placement)
        rows.append(row | {f"{name}, first": value for name, value in first.items()})
    return rows


def gap_rows() -> list[dict[str, Any]]:
    """How far heuristics are from the best placement of few experts: deviation plus cut, as the oracle weighs them."""
    trace = draw_trace(_TOKENS, _PROFILE, layers=3, experts=8, top_k=2)
    seen = trace.window(2)
    assert seen.transitions is not None
    loads, transitions = seen.activations, seen.transitions
    best = best_placement(loads, transitions, 2)
    pool = build_pool(transitions, seen.tokens, 4)
    policy = expert_policy("metro", 2)
    assert policy is not None
    placed = {
        "oracle": best.placement,
        "oracle, balance alone": best_placement(loads, transitions, 2, affinity=0.0).placement,
        "oracle, cut alone": best_placement(loads, transitions, 2, balance=0.0).placement,
        "linear": linear_placement(3, 8, 2),
        "eplb": eplb(loads, 2),
        "edr": edr(loads, pool.experts, 2),
        "metro": policy(seen),
    }
    rows = []
    for name, placement in placed.items():
        by_device = device_loads(loads, placement)
        mean = by_device.mean(axis=1, keepdims=True)
        deviation, apart = float(np.abs(by_device - mean).max() / mean.mean()), cut(transitions, placement)
        rows.append(
            {"placement": name, "deviation": deviation, "cut": apart, "sum": deviation + apart, "bound": best.bound}
        )
    return rows


def placement_report() -> dict[str, Any]:
    """All of that, printed and returned."""
    report: dict[str, Any] = {"expert_bytes": EXPERT_BYTES, "bandwidth": BANDWIDTH, "step_tokens": DECODE_TOKENS}
    for devices in (2, 8):
        rows = report[f"{devices} devices"] = placement_rows(devices)
        print(f"{devices} devices; steps of {DECODE_TOKENS} tokens")
        print(table(list(rows[0]), [list(row.values()) for row in rows]))
    rows = report["few experts"] = gap_rows()
    print("3 layers of 8 experts, 2 devices")
    print(table(list(rows[0]), [list(row.values()) for row in rows]))
    return report
