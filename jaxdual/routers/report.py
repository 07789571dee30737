"""Figures of routers as a table for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxdual.scheduling.experts import PAIR_SHARE, TOP_EDGES

_POOLS = {"threshold": f"pairs of {PAIR_SHARE} of all tokens", "top": f"{TOP_EDGES} strongest pairs", "edr": "edr"}


def format_report(report: Mapping[str, Any]) -> str:
    """The report of `python -m jaxdual.routers`."""
    rows = [
        (
            "model",
            f"{report['model']}: {len(report['layers'])} layers of {report['experts']} experts, "
            f"{report['experts_per_token']} a token",
        )
    ]
    for name, workload in report["workloads"].items():
        rows += _of_workload(name, workload, report["devices"])
    if report["comparison"] is not None:
        first, second = report["workloads"]
        rows += _of_comparison(first, second, report["comparison"])
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in rows)


def _of_workload(name: str, workload: Mapping[str, Any], devices: int) -> Iterator[tuple[str, str]]:
    requests = workload["requests"]
    yield "", ""
    yield name, f"{requests['ok']} requests, {requests['failed']} failed, {workload['tokens']} tokens routed"
    skewed = (f"layer {one['layer']} {one['load']:.2f} (expert {one['expert']})" for one in workload["most_skewed"])
    yield "busiest experts / even load", ", ".join(skewed)
    pairs = (
        f"{one['share']:.3f} (layer {one['layers'][0]} expert {one['experts'][0]}, "
        f"layer {one['layers'][1]} expert {one['experts'][1]})"
        for one in workload["pairs"]
    )
    yield "strongest pairs", ", ".join(pairs) or "none: there is one layer only"
    for kind, title in _POOLS.items():
        pool = workload["pools"][kind]
        yield (
            f"pool of {title}",
            f"{pool['experts']} experts of {pool['pairs']} pairs, at most {pool['most_in_a_layer']} in a layer, "
            f"rarest pair {pool['rarest_share']:.3f}",
        )
    for placement, worth in workload["placements"].items():
        yield f"{placement}, {devices} devices", _worth(worth)


def _of_comparison(first: str, second: str, comparison: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "", ""
    known = [one for one in comparison["correlation"] if one is not None]
    by_layer = " ".join("-" if one is None else f"{one:.2f}" for one in comparison["correlation"])
    yield f"correlation of {first} and {second}", f"{np.mean(known):.2f} mean; by layer {by_layer}" if known else "-"
    for kind, title in _POOLS.items():
        overlap = comparison["pools"][kind]
        yield f"in both pools of {title}", f"{overlap['both']} of {overlap['either']} experts"
    for made_of, judged_by, key in ((second, first, "of_second_for_first"), (first, second, "of_first_for_second")):
        for placement, worth in comparison["placements"][key].items():
            yield f"{placement} of {made_of} for {judged_by}", _worth(worth)


def _worth(worth: Mapping[str, Any]) -> str:
    uneven = worth["imbalance"]
    return f"imbalance {uneven['mean']:.3f} mean, {uneven['worst']:.3f} worst; cut {worth['cut']:.3f}"
