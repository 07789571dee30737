"""Differences of arms that ran with the same seeds, with intervals that few seeds allow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.summary import Summary


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean of the values of seeds, and Student's 95 % interval for it.

    Raises:
      ValueError: fewer than two values, which have no interval.
    """
    if len(values) < 2:
        raise ValueError(f"{len(values)} values: an interval needs at least two")
    found = Summary.of(values)
    return {"mean": found.mean, "interval": list(found.interval or ()), "values": list(values)}


def difference(values: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
    """`summary` of what the values of seeds are above those of a base with the same seeds."""
    return summary([one - other for one, other in zip(values, base, strict=True)])


def interval_cells(found: dict[str, Any]) -> tuple[str, ...]:
    """Mean and both ends of a `difference`, for a table."""
    return tuple(f"{value:+.4f}" for value in (found["mean"], *found["interval"]))


def judged(name: str, base: str, found: dict[str, Any], unit: str) -> str:
    """One sentence that claims no more than the interval of a `difference` of losses shows."""
    (low, high), seeds = found["interval"], len(found["values"])
    shown = f"{found['mean']:+.4f} {unit} (95 %: {low:+.4f} to {high:+.4f}, {seeds} seeds)"
    if low <= 0 <= high:
        return f"{name} and {base}: no difference shown, {shown}."
    return f"{name} is {'worse' if low > 0 else 'better'} than {base}: {shown}."
