"""Placements that the path scheduler makes in a second on one core, with the messages to it and from it.

`python -m bench.placement --json FILE`. The measured process holds the scheduler (mode `full`) alone, pinned to a core.
Another process plays all clients and group leaders over a Unix socket, pinned to another core where there is one. A
group is a node of 8 engines; a third of the nodes prefill. The groups fetch in turn, each with reports of all its
engines. Each request is a message, and so is each of five later events of its placement; a placement is told to the
leader that fetched it and to that of its other engine. Requests are those of the paper's 64K trace (DualPath 7.1).

Before each fetch as many requests arrive as end, so that the number of live ones is steady: with 144 groups and one
request a fetch, 1,600 placements a second mean that each group fetches every 90 ms. Beside it stands the same loop with
the scheduler called in the leaders' process, without messages. Sides take turns, and medians are reported:

- `messages`: as many fetches as the scheduler answers. Up to `window` of them are under way, so that it need not wait
  for the leaders; each one's time counts those before it.
- `at_goal`: the same, with fetches sent at the rate that gives the goal's placements.
- `in_process`: the calls. Placements are those of the whole loop, leaders included.

CPU time is the scheduler's alone: of its process, or of the calls. `scheduler_busy` is it as a part of the time passed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bench.placement_leaders import NODE_ENGINES, InProcess, Leaders, OverSocket
from bench.report import header, percentile, table, write_json

_GOAL = 1600  # placements a second
_LEAST_ENGINES = 3 * NODE_ENGINES
_MESSAGES, _AT_GOAL, _CALLS = "messages", "at_goal", "in_process"
_FIGURES = ("placements_per_s", "cpu_us_per_placement", "scheduler_busy", "fetch_ms_p50", "fetch_ms_p99")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the measurement; returns the exit status: 1 if a request was lost or the scheduler's counts are wrong."""
    options = _parse(arguments)
    report = header("bench.placement")
    cores = sorted(os.sched_getaffinity(0))
    prefill = options.engines // 3
    live = options.live * (options.engines - prefill)
    report |= {
        "engines": {"prefill": prefill, "decode": options.engines - prefill},
        "groups": options.engines // NODE_ENGINES,
        "live_requests": live,
        "per_fetch": options.per_fetch,
        "window": options.window,
        "seconds": options.seconds,
        "repeats": options.repeats,
        "cores": {"scheduler": cores[0], "leaders": cores[-1]},
    }
    runs: dict[str, list[dict[str, float]]] = {_MESSAGES: [], _AT_GOAL: [], _CALLS: []}
    with _pinned(cores[-1]), OverSocket(cores[0]) as socket:
        remote = Leaders(socket, options.engines, live, options.per_fetch, options.window)
        local = Leaders(InProcess(), options.engines, live, options.per_fetch, 1)
        for leaders in (remote, local):
            leaders.fill()
        for _ in range(options.repeats):
            runs[_MESSAGES].append(_measure(remote, options.seconds))
            runs[_AT_GOAL].append(_measure(remote, options.seconds, options.per_fetch / _GOAL))
            runs[_CALLS].append(_measure(local, options.seconds))
        report["requests"] = {_MESSAGES: _end(remote), _CALLS: _end(local)}
    report["by"] = {
        name: {figure: statistics.median(run[figure] for run in found) for figure in _FIGURES}
        for name, found in runs.items()
    }
    report["runs"] = runs
    reached = report["by"][_MESSAGES]["placements_per_s"]
    report["goal"] = {"placements_per_s": _GOAL, "ratio": reached / _GOAL}
    report["wrong"] = [f"{name}: {text}" for name, found in report["requests"].items() for text in _wrong(found)]
    write_json(options.json, report)
    print(table(("", *_FIGURES), [(name, *found.values()) for name, found in report["by"].items()]))
    print(f"{reached:.0f} placements/s with messages, goal {_GOAL}", file=sys.stderr)
    for text in report["wrong"]:
        print(text, file=sys.stderr)
    return 1 if report["wrong"] else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.placement", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="where results go")
    parser.add_argument("--engines", type=int, default=1152, help="a multiple of 24; default 1152")
    parser.add_argument("--live", type=int, default=32, help="live requests for each decode engine; default 32")
    parser.add_argument("--per-fetch", type=int, default=1, help="requests that arrive before each fetch; default 1")
    parser.add_argument("--window", type=int, default=16, help="fetches under way at a time; default 16")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each repeat and side; default 10")
    parser.add_argument("--repeats", type=int, default=3, help="default 3")
    options = parser.parse_args(arguments)
    if options.engines < _LEAST_ENGINES or options.engines % _LEAST_ENGINES:
        parser.error(f"--engines {options.engines} must be a multiple of {_LEAST_ENGINES}, at least that")
    for name in ("live", "per_fetch", "window", "repeats"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least 1")
    if options.seconds <= 0:
        parser.error(f"--seconds {options.seconds} must be above 0")
    return options


@contextlib.contextmanager
def _pinned(core: int) -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _measure(leaders: Leaders, seconds: float, period: float = 0.0) -> dict[str, float]:
    """One repeat of a side; `period` is the seconds from one fetch to the next, where they are not sent at once."""
    cpu, placed = leaders.ask().cpu_seconds, leaders.placed
    leaders.latencies.clear()
    began = time.perf_counter()
    for fetch in itertools.count():
        leaders.wait(began + fetch * period)
        if time.perf_counter() - began >= seconds:
            break
        leaders.step()
    leaders.settle()
    took = time.perf_counter() - began
    cpu, placed = leaders.ask().cpu_seconds - cpu, leaders.placed - placed
    return {
        "placements": placed,
        "fetches": len(leaders.latencies),
        "placements_per_s": placed / took,
        "cpu_us_per_placement": 1e6 * cpu / max(1, placed),
        "scheduler_busy": cpu / took,
        "fetch_ms_p50": 1e3 * percentile(leaders.latencies, 50),
        "fetch_ms_p99": 1e3 * percentile(leaders.latencies, 99),
    }


def _end(leaders: Leaders) -> dict[str, Any]:
    """Places what waits, checks the scheduler with all requests live, ends them, and checks it again."""
    leaders.place_all()
    full = leaders.ask(check=True)
    leaders.end_all()
    empty = leaders.ask(check=True)
    return {
        "submitted": leaders.submitted,
        "placed": leaders.placed,
        "told": leaders.told,
        "finished": leaders.finished,
        "live_at_check": full.live,
        "left": empty.live,
        "trouble": full.trouble or empty.trouble,
    }


def _wrong(found: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a side's requests."""
    for name in ("placed", "told", "finished"):
        if found[name] != found["submitted"]:
            yield f"{found[name]} of {found['submitted']} requests were {name}"
    if found["left"]:
        yield f"{found['left']} requests are left in the scheduler"
    if found["trouble"] is not None:
        yield found["trouble"]


if __name__ == "__main__":
    sys.exit(main())
