"""The flags of `python -m jaxdual.offline --trace`, and what they do."""

import argparse
import asyncio
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxdual.arguments import INTERRUPTED, above_0, whole
from jaxdual.async_api import AsyncLLM
from jaxdual.config import ClusterConfig, EngineConfig
from jaxdual.config_sources import read_config
from jaxdual.errors import EngineDeadError, NotServingError
from jaxdual.offline.card_watch import CardWatch
from jaxdual.offline.display import Progress
from jaxdual.offline.replay import Replay, RequestRecord, check_lengths
from jaxdual.offline.replay_report import build_report, format_report
from jaxdual.offline.report import write_report
from jaxdual.offline.runner import Totals
from jaxdual.offline.trace import Session, TraceError, write_trace
from jaxdual.offline.trace_files import read_sessions
from jaxdual.offline.trace_prompts import PromptTokens
from jaxdual.offline.trace_scaling import limit_requests, limit_turns, scale_lengths, scale_work, with_agents
from jaxdual.offline.trace_shapes import TRACE_SHAPES, TRAJECTORIES, generate_sessions
from jaxdual.offline.trace_starts import poisson_starts, timestamp_starts
from jaxdual.outputs import EngineStats


def add_trace_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of a replay. Each is None unless given."""
    group = parser.add_argument_group("trace", "replays agent sessions instead of a batch, and reports their times")
    shapes = ", ".join(TRACE_SHAPES)
    group.add_argument(
        "--trace",
        metavar="TRACE",
        help=f"a file of requests or sessions, one JSON object a line, BurstGPT's .csv, or one of {shapes}",
    )
    group.add_argument("--agents", type=whole(1), metavar="N", help="agents; default one for each session of the trace")
    group.add_argument("--turns-limit", type=whole(1), metavar="N", help="at most so many turns of each session")
    group.add_argument("--append-scale", type=above_0, metavar="X", help="times as many appended tokens")
    group.add_argument("--generation-scale", type=above_0, metavar="X", help="times as many generated tokens")
    group.add_argument("--length-scale", type=above_0, metavar="X", help="all lengths times X, to fit a smaller model")
    group.add_argument("--limit", type=whole(1), metavar="N", help="the first N requests only, turn by turn")
    group.add_argument("--trace-seed", type=whole(0), metavar="N", help="of everything random in the trace; default 0")
    group.add_argument("--write-trace", type=Path, metavar="FILE", help="write the generated trace, and run nothing")
    group.add_argument("--deadline", type=above_0, metavar="SECONDS", help="what has not ended by then is unfinished")
    start = group.add_mutually_exclusive_group()
    start.add_argument("--start", choices=["together"], help="all agents start at once, which is the default")
    start.add_argument("--arrivals-per-second", type=above_0, metavar="APS", help="agents start as a Poisson process")
    start.add_argument("--speed", type=above_0, metavar="X", help="agents start by their timestamps, X times as fast")


def trace_flags_given(options: argparse.Namespace) -> list[str]:
    """The flags that were given of those that only a replay has, the cluster's among them."""
    names = (
        *("trace", "agents", "turns_limit", "append_scale", "generation_scale", "length_scale", "limit", "trace_seed"),
        *("write_trace", "deadline", "start", "arrivals_per_second", "speed"),
        *(field.name for field in dataclasses.fields(ClusterConfig)),
    )
    return [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) is not None]


def run_trace(options: argparse.Namespace) -> int:
    """Replays as the flags say; returns the exit status.

    Raises:
      ValueError: a trace or settings that can't be used.
      OSError: a file that can't be written.
    """
    try:
        return _run_trace(options)
    except KeyboardInterrupt:
        print("\nstopped; nothing is reported", file=sys.stderr)
        return INTERRUPTED
    except (EngineDeadError, NotServingError) as error:
        print(f"the replay broke off: {error}", file=sys.stderr)
        return 1


def _run_trace(options: argparse.Namespace) -> int:
    started = time.monotonic()
    config, cluster = read_config(EngineConfig, options), read_config(ClusterConfig, options)
    if options.report is not None and options.report.resolve() == Path(options.trace).resolve():
        raise TraceError("trace and report must be different files")
    sessions = _sessions(options)
    if options.write_trace is not None:
        if options.trace not in TRACE_SHAPES:
            raise TraceError(f"--write-trace takes one of the traces {', '.join(TRACE_SHAPES)}, not a file")
        write_trace(options.write_trace, sessions)
        print(f"{len(sessions)} sessions in {options.write_trace}", file=sys.stderr)
        return 0
    report = asyncio.run(_replay(options, config, cluster, sessions, _starts(options, sessions), started))
    print(format_report(report))
    if options.report is not None:
        write_report(options.report, report)
    return 0 if report["requests"]["ok"] == report["requests"]["planned"] else 1


def _sessions(options: argparse.Namespace) -> list[Session]:
    seed = options.trace_seed or 0
    if options.trace in TRACE_SHAPES:
        count = min(options.agents or TRAJECTORIES, TRAJECTORIES)
        sessions = generate_sessions(options.trace, count, seed)
    else:
        sessions = read_sessions(Path(options.trace))
    if options.turns_limit is not None:
        sessions = limit_turns(sessions, options.turns_limit)
    if options.append_scale is not None or options.generation_scale is not None:
        sessions = scale_work(sessions, options.append_scale or 1.0, options.generation_scale or 1.0)
    if options.agents is not None:
        sessions = with_agents(sessions, options.agents, seed)
    if options.length_scale is not None:
        sessions = scale_lengths(sessions, options.length_scale)
    return sessions if options.limit is None else limit_requests(sessions, options.limit)


def _starts(options: argparse.Namespace, sessions: Sequence[Session]) -> list[float]:
    if options.speed is not None:
        return timestamp_starts(sessions, options.speed)
    if options.arrivals_per_second is not None:
        return poisson_starts(len(sessions), options.arrivals_per_second, options.trace_seed or 0)
    return [0.0] * len(sessions)


async def _replay(
    options: argparse.Namespace,
    config: EngineConfig,
    cluster: ClusterConfig,
    sessions: Sequence[Session],
    starts: Sequence[float],
    started: float,
) -> dict[str, Any]:
    # An agent has one request under way, so that none is ever refused.
    async with AsyncLLM.from_config(config, cluster=cluster, max_queued_requests=len(sessions)) as llm:
        check_lengths(sessions, llm.max_model_len)
        if options.warmup:
            await llm.warmed_up()
        before = await _stats(llm)
        startup_seconds = time.monotonic() - started
        totals = Totals()
        planned = sum(len(session.turns) for session in sessions)
        with Progress(planned, 0, not options.no_progress) as progress:

            def show(record: RequestRecord) -> None:
                totals.ok += record.status == "ok"
                totals.failed += record.status == "failed"
                totals.completion_tokens += record.generated_tokens
                progress.show(totals, totals.completion_tokens)

            tokens = PromptTokens(llm.info.vocab_size, options.trace_seed or 0)
            replay = Replay(llm, sessions, starts, tokens, show)
            async with CardWatch(llm) as cards:
                await replay.run(options.deadline)
        stats = (before, await _stats(llm))
        return build_report(replay, llm, cluster, _described(options), stats, cards.report(), startup_seconds)


async def _stats(llm: AsyncLLM) -> EngineStats | None:
    try:
        return await llm.stats()
    except EngineDeadError:
        return None


def _described(options: argparse.Namespace) -> dict[str, Any]:
    start = "together"
    if options.speed is not None:
        start = f"by timestamps, {options.speed:g} times as fast"
    elif options.arrivals_per_second is not None:
        start = f"at random, {options.arrivals_per_second:g} agents/s"
    names = ("agents", "turns_limit", "append_scale", "generation_scale", "length_scale", "limit", "deadline")
    given = {name: getattr(options, name) for name in names}
    return {"source": options.trace, "seed": options.trace_seed or 0, "start": start, **given}
