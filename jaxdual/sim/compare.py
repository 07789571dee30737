"""Two reports beside each other: of simulations, or of real replays (`python -m jaxdual.offline --trace`)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxdual.config import ConfigError

_TIMES = ("jct_agents_s", "ttft_s", "ttst_s", "tpot_s")


def read_report(path: Path) -> dict[str, Any]:
    """A report.

    Raises:
      ConfigError: the file can't be read, or is none.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: is no JSON: {error}") from None
    if not isinstance(report, dict) or "jct_s" not in report or "ttft_s" not in report:
        raise ConfigError(f"{path}: is no report of a replay or simulation: it has no jct_s or ttft_s")
    try:
        dict(_figures(report))
    except (TypeError, ValueError, AttributeError):
        raise ConfigError(f"{path}: is no report of a replay or simulation: its figures are no numbers") from None
    return report


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """A table of what both reports have, with the second's figures in those of the first."""
    mine, other = dict(_figures(first)), dict(_figures(second))
    rows = [("", "first", "second", "second / first")]
    for name in mine:
        if name in other:
            ratio = f"{other[name] / mine[name]:.3f}" if mine[name] else "-"
            rows.append((name, f"{mine[name]:.6g}", f"{other[name]:.6g}", ratio))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        f"{row[0]:<{widths[0]}}  "
        + "  ".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    )


def _figures(report: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Name and value of each figure that is there."""
    values: dict[str, Any] = {"jct_s": report["jct_s"], "hit_rate": report.get("hit_rate")}
    groups = {name: report.get(name) for name in _TIMES}
    groups |= {f"ttft {part}": times for part, times in (report.get("ttft_parts_s") or {}).items()}
    groups["throughput"] = report.get("throughput")
    groups["tokens"] = report.get("tokens")
    for name, group in groups.items():
        values |= {f"{name} {key}": value for key, value in (group or {}).items()}
    yield from ((name, float(value)) for name, value in values.items() if value is not None)
