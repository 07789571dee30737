"""What a batch run reports: counts, tokens, times, cache use, and what it ran on."""

import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdual.api import LLM
from jaxdual.offline.runner import Totals
from jaxdual.result_files import write_whole

_PACKAGES = ("jaxdual", "jax", "jaxlib", "flax", "tokenizers")


def build_report(llm: LLM, totals: Totals, wall_seconds: float, startup_seconds: float) -> dict[str, Any]:
    """The report as JSON data; times in seconds, rates per second of `wall_seconds`.

    Start-up is not part of `wall_seconds`; compiling is, as programs are compiled when a request first needs them.
    """
    stats = llm.stats()
    device = jax.devices()[0]
    queried, hit = stats.prefix_cache_queries, stats.prefix_cache_hits
    return {
        "model": llm.served_model_name,
        "device": {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()},
        "requests": {"ok": totals.ok, "failed": totals.failed, "skipped": totals.skipped},
        "tokens": {"prompt": totals.prompt_tokens, "completion": totals.completion_tokens},
        "seconds": {
            "wall": wall_seconds,
            "startup": startup_seconds,
            "load": stats.load_seconds,
            "compile": stats.compile_seconds,
        },
        "throughput": {
            "requests_per_s": rate(totals.ok, wall_seconds),
            "prompt_tokens_per_s": rate(totals.prompt_tokens, wall_seconds),
            "generation_tokens_per_s": rate(totals.completion_tokens, wall_seconds),
        },
        "ttft_s": summary(totals.ttft),
        "latency_s": summary(totals.latency),
        "prefix_cache": {"queried_tokens": queried, "hit_tokens": hit, "hit_rate": rate(hit, queried)},
        "preemptions": stats.preemptions,
        "engine": dataclasses.asdict(llm.config),
        "versions": package_versions(),
    }


def summary(values: Sequence[float]) -> dict[str, float] | None:
    """Mean and percentiles of `values`, None where there are none."""
    if not values:
        return None
    p50, p95, p99 = (float(p) for p in np.percentile(values, (50, 95, 99)))
    return {"mean": float(np.mean(values)), "p50": p50, "p95": p95, "p99": p99}


def format_report(report: dict[str, Any]) -> str:
    """The report as a table for people."""
    requests, tokens, seconds = report["requests"], report["tokens"], report["seconds"]
    throughput, cache, device = report["throughput"], report["prefix_cache"], report["device"]
    rows = [
        ("model", f"{report['model']} on {device['count']} x {device['kind']}"),
        ("requests", f"{requests['ok']} ok, {requests['failed']} failed, {requests['skipped']} done before"),
        ("tokens", f"{tokens['prompt']} prompt, {tokens['completion']} completion"),
        (
            "throughput",
            f"{throughput['prompt_tokens_per_s']:.1f} prompt tokens/s, "
            f"{throughput['generation_tokens_per_s']:.1f} generation tokens/s",
        ),
        ("time to first token", shown_milliseconds(report["ttft_s"])),
        ("latency", shown_milliseconds(report["latency_s"])),
        (
            "prefix cache",
            f"{cache['hit_rate']:.1%} of {cache['queried_tokens']} prompt tokens, {report['preemptions']} preemptions",
        ),
        (
            "time",
            f"{seconds['wall']:.1f} s, and {seconds['startup']:.1f} s start-up before; of these "
            f"{seconds['load']:.1f} s loading, {seconds['compile']:.1f} s compiling",
        ),
    ]
    return rows_of_text(rows)


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Writes the report as JSON, whole or not at all."""
    write_whole(path, json.dumps(report, indent=2, default=str) + "\n")


def package_versions() -> dict[str, str]:
    """Of Python and of what the figures depend on."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in _PACKAGES}


def rows_of_text(rows: Sequence[tuple[str, str]]) -> str:
    """Names and values, one pair a line."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def rate(amount: float, per: float) -> float:
    """`amount` by `per`; 0 where that is 0."""
    return amount / per if per else 0.0


def shown_milliseconds(values: dict[str, float] | None) -> str:
    """A `summary` of seconds, for people."""
    if values is None:
        return "-"
    return "  ".join(f"{name} {value * 1000:.0f} ms" for name, value in values.items())
