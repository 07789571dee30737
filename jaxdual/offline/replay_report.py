"""What a replay reports: times of agents and requests, cache use, rates, and what the engine counted."""

import dataclasses
import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

from jaxdual.async_api import AsyncLLM
from jaxdual.config import ClusterConfig
from jaxdual.offline.replay import TTFT_PARTS, AgentRecord, Replay, RequestRecord
from jaxdual.offline.time_summary import time_summary
from jaxdual.outputs import EngineStats

_PACKAGES = ("jaxdual", "jax", "jaxlib")
_SECRET = "kv_secret"
_MOST_ERRORS = 5  # in the table


def build_report(
    replay: Replay,
    llm: AsyncLLM,
    cluster: ClusterConfig,
    trace: Mapping[str, Any],
    stats: tuple[EngineStats | None, EngineStats | None],
    cards: Mapping[str, Any] | None,
    startup_seconds: float,
) -> dict[str, Any]:
    """The report as JSON data; times in seconds, rates per second of the replay. Compiling is part of them, if any.

    Args:
      replay: that has run.
      llm: that it ran on.
      cluster: of the same.
      trace: what was replayed, as the report is to say it.
      stats: of the engine before and after; None where it could not tell.
      cards: of `CardWatch.report`.
      startup_seconds: from the start of the program to that of the replay.
    """
    config = {key: value for key, value in dataclasses.asdict(llm.config).items() if key != _SECRET}
    return {
        "model": llm.served_model_name,
        "device": llm.info.device,
        "cluster": dataclasses.asdict(cluster),
        "trace": dict(trace),
        **measures(replay),
        "startup_seconds": startup_seconds,
        "cards": cards,
        "engine": _engine(*stats) | {"restarts": llm.restarts},
        "config": config,
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def measures(replay: Replay) -> dict[str, Any]:
    """The part of the report that the replay's own records give.

    `jct_s` is of the whole replay, None if not all of it was served, `jct_agents_s` of its agents; `ttst_s` is
    from the first to the second token. Only requests that were served count in times, tokens, rates and `hit_rate`.
    """
    agents, seconds = replay.agents, replay.seconds
    requests = [request for agent in agents for request in agent.requests]
    ok = [request for request in requests if request.status == "ok"]
    planned = sum(len(agent.session.turns) for agent in agents)
    prompt, cached, generated = (
        sum(getattr(request, f"{kind}_tokens") for request in ok) for kind in ("prompt", "cached", "generated")
    )
    return {
        "seconds": seconds,
        "requests": {
            "planned": planned,
            "ok": len(ok),
            "failed": sum(request.status == "failed" for request in requests),
            "unfinished": sum(request.status == "unfinished" for request in requests),
            "not_sent": planned - len(requests),
        },
        "jct_s": seconds if len(ok) == planned else None,
        "jct_agents_s": time_summary(agent.jct for agent in agents),
        "ttft_s": time_summary(request.ttft for request in ok),
        "ttft_parts_s": {part: time_summary(request.ttft_parts.get(part) for request in ok) for part in TTFT_PARTS},
        "ttst_s": time_summary(request.ttst for request in ok),
        "tpot_s": time_summary(request.tpot for request in ok),
        "tokens": {"prompt": prompt, "cached": cached, "generation": generated},
        "hit_rate": cached / prompt if prompt else None,
        "throughput": {
            "requests_per_s": _rate(len(ok), seconds),
            "prompt_tokens_per_s": _rate(prompt, seconds),
            "generation_tokens_per_s": _rate(generated, seconds),
        },
        "agents": [_agent(agent) for agent in agents],
        "errors": [
            {"session": agent.session.session_id, "turn": request.number, "message": request.error}
            for agent in agents
            for request in agent.requests
            if request.error is not None
        ],
    }


def format_report(report: Mapping[str, Any]) -> str:
    """The report as a table for people."""
    requests, tokens, rates = report["requests"], report["tokens"], report["throughput"]
    cluster, jct, hit_rate = report["cluster"], report["jct_s"], report["hit_rate"]
    engines = (
        f"{cluster['prefill']} prefill and {cluster['decode']} decode engines" if cluster["prefill"] else "1 engine"
    )
    overall = "-" if jct is None else f"{jct:.2f} s"
    rows = [
        ("model", f"{report['model']} on {report['device']}, {engines}"),
        ("trace", f"{report['trace']['source']}, {len(report['agents'])} agents, start {report['trace']['start']}"),
        (
            "requests",
            f"{requests['ok']} of {requests['planned']} ok, {requests['failed']} failed, "
            f"{requests['unfinished']} unfinished, {requests['not_sent']} not sent",
        ),
        ("JCT", overall),
        ("JCT of agents", _times(report["jct_agents_s"], 1, "s", 2)),
        ("TTFT", _times(report["ttft_s"], 1000, "ms", 1)),
        *(
            (f"  {part}", _times(times, 1000, "ms", 1))
            for part, times in report["ttft_parts_s"].items()
            if times is not None
        ),
        ("TTST", _times(report["ttst_s"], 1000, "ms", 1)),
        ("TPOT", _times(report["tpot_s"], 1000, "ms", 1)),
        ("hit rate", "-" if hit_rate is None else f"{hit_rate:.1%} of {tokens['prompt']} prompt tokens"),
        (
            "throughput",
            f"{rates['requests_per_s']:.2f} requests/s, {rates['prompt_tokens_per_s']:.1f} prompt tokens/s, "
            f"{rates['generation_tokens_per_s']:.1f} generation tokens/s",
        ),
        *_card_rows(report["cards"]),
        ("time", f"{report['seconds']:.1f} s, and {report['startup_seconds']:.1f} s start-up before"),
    ]
    errors = report["errors"]
    rows += [("error", f"{one['session']}, turn {one['turn']}: {one['message']}") for one in errors[:_MOST_ERRORS]]
    if len(errors) > _MOST_ERRORS:
        rows.append(("", f"and {len(errors) - _MOST_ERRORS} more"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _card_rows(cards: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if cards is None:
        return []
    paths, balance = cards["read_path_bytes"], cards["storage_max_over_mean"]
    rows = [("store reads", "  ".join(f"{side} side {count / 1e6:.1f} MB" for side, count in paths.items()))]
    if balance["overall"] is not None:
        rows.append(("  max / mean", f"{balance['overall']:.2f} of all storage cards"))
    if balance["windows"] is not None:
        rows[-1] = ("  max / mean", f"{rows[-1][1]}, {balance['windows']:.2f} in windows of a second")
    return rows


def _agent(agent: AgentRecord) -> dict[str, Any]:
    served = sum(request.status == "ok" for request in agent.requests)
    return {
        "session": agent.session.session_id,
        "started_s": agent.started,
        "jct_s": agent.jct,
        "turns": len(agent.session.turns),
        "served": served,
        "requests": [_request(request) for request in agent.requests],
    }


def _request(request: RequestRecord) -> dict[str, Any]:
    times = {"ttft_s": request.ttft, "ttst_s": request.ttst, "tpot_s": request.tpot}
    tokens = {
        "prompt": request.prompt_tokens,
        "cached": request.cached_tokens,
        "generation": request.generated_tokens,
    }
    parts = {part: request.ttft_parts.get(part) for part in TTFT_PARTS}
    return {"turn": request.number, "status": request.status, "tokens": tokens, **times, "ttft_parts_s": parts}


def _engine(before: EngineStats | None, after: EngineStats | None) -> dict[str, Any]:
    first, last = (None if stats is None else dataclasses.asdict(stats) for stats in (before, after))
    difference = None
    if first is not None and last is not None:
        difference = {key: value - first[key] for key, value in last.items() if isinstance(value, (int, float))}
    return {"before": first, "after": last, "difference": difference}


def _rate(amount: float, seconds: float) -> float:
    return amount / seconds if seconds else 0.0


def _times(values: Mapping[str, float] | None, factor: float, unit: str, digits: int) -> str:
    if values is None:
        return "-"
    return "  ".join(f"{name} {value * factor:.{digits}f} {unit}" for name, value in values.items())
