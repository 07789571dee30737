"""What it takes to choose an engine for a request, by policy, with many engines.

`python -m bench.dispatch --json FILE`. A decision is `select` and telling the board, as `Ranks.choose` does both; its
goal is 50 us. Half of the requests have one of 1,000 users, and each has a part of its prompt cached by a few engines.
Engines report ten times a second, at 1,000 requests a second, outside of the decisions, and are in one of three states:

- `calm`: no KV memory is saturated: users' engines, turns, and loads where a policy compares them then.
- `uneven`: some are saturated, others empty.
- `full`: all are saturated alike.

All policies take turns, and of each figure the median of all repeats is given. Beside them stands what is not in these
decisions: taking the reports of all engines; computing the keys of a prompt, which its rank needs in any case (`keys`);
and looking them up in as many KV memories (`shares`), which is for `score` alone. One in eight has half of the prompt.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from bench.report import header, percentile, table, write_json
from jaxdual.engine.ranks import prefix_shares
from jaxdual.kv.keys import KeyChain, root_key
from jaxdual.kv.manager import GroupPages, KVManager
from jaxdual.scheduling.dispatch import (
    DISPATCH_POLICIES,
    DispatchPolicy,
    DispatchRequest,
    EngineLoad,
    LoadBoard,
    dispatch_policy,
)

_GOAL = 50e-6  # seconds of a decision
_STATES = {"calm": (0, 80), "uneven": (0, 100), "full": (95, 100)}  # percent of KV memory in use
_USERS = 1000
_BETWEEN_REPORTS = 100  # requests
_CACHED_BY = 4  # engines that have a part of a prompt
_PAGE, _PAGES = 64, 1000
_FIGURES = ("p50_us", "p99_us")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the measurement; returns the exit status."""
    options = _parse(arguments)
    sides = [(policy, state) for policy in DISPATCH_POLICIES for state in _STATES]
    runs: dict[tuple[str, str], list[dict[str, float]]] = {side: [] for side in sides}
    decided: dict[tuple[str, str], Counter[str]] = {side: Counter() for side in sides}
    reporting: list[float] = []
    for repeat in range(options.repeats):
        for side in sides:
            policy = dispatch_policy(side[0])
            seconds, of_reports = _measure(policy, side[1], options.engines, options.decisions, repeat)
            runs[side].append(_figures(seconds))
            decided[side] += policy.branches
            reporting += of_reports
    report = header("bench.dispatch") | {
        "engines": options.engines,
        "decisions": options.decisions,
        "repeats": options.repeats,
        "goal_us": 1e6 * _GOAL,
        "by": {policy: {} for policy in DISPATCH_POLICIES},
    }
    for (name, state), found in runs.items():
        figures = {figure: statistics.median(run[figure] for run in found) for figure in _FIGURES}
        ratios = {f"{figure.removesuffix('_us')}_over_goal": value / (1e6 * _GOAL) for figure, value in figures.items()}
        report["by"][name][state] = {**figures, **ratios, "rules": dict(decided[name, state])}
    report["reports_of_all_engines"] = _figures(reporting)
    report["prompt"] = _prompt(options.engines, options.prompt_tokens, options.repeats)
    write_json(options.json, report)
    head = ("policy", "state", "p50, us", "p99, us", "p50 / goal", "p99 / goal", "rules")
    print(table(head, [_row(*side, report["by"][side[0]][side[1]]) for side in sides]))
    beside = {"reports of all engines": report["reports_of_all_engines"], **report["prompt"]["by"]}
    print(table(("beside", "p50, us", "p99, us"), [(name, *figures.values()) for name, figures in beside.items()]))
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.dispatch", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="where results go")
    parser.add_argument("--engines", type=int, default=64, help="default 64")
    parser.add_argument("--decisions", type=int, default=10_000, help="of each policy, state and repeat; default 10000")
    parser.add_argument("--repeats", type=int, default=5, help="default 5")
    parser.add_argument("--prompt-tokens", type=int, default=4096, help="of the prompt that is looked up; default 4096")
    options = parser.parse_args(arguments)
    for name in ("engines", "decisions", "repeats", "prompt_tokens"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least 1")
    return options


def _measure(
    policy: DispatchPolicy, state: str, engines: int, decisions: int, seed: int
) -> tuple[list[float], list[float]]:
    """Seconds of each decision, and of each time that all engines report."""
    draw, board = random.Random(seed), LoadBoard(engines)
    requests = [_request(draw, engines, number) for number in range(decisions)]
    reports = [[_load(draw, state) for _ in range(engines)] for _ in range(0, decisions, _BETWEEN_REPORTS)]
    clock, taken, reporting = time.perf_counter, list[float](), list[float]()
    for number, request in enumerate(requests):
        if number % _BETWEEN_REPORTS == 0:
            began = clock()
            for engine, load in enumerate(reports[number // _BETWEEN_REPORTS]):
                board.report(engine, load)
            reporting.append(clock() - began)
        began = clock()
        board.sent(policy.select(request, board, began), request)
        taken.append(clock() - began)
    return taken, reporting


def _request(draw: random.Random, engines: int, number: int) -> DispatchRequest:
    shares = [0.0] * engines
    for _ in range(_CACHED_BY):
        shares[draw.randrange(engines)] = draw.random()
    user = f"user-{draw.randrange(_USERS)}" if number % 2 else None
    return DispatchRequest(str(number), draw.randint(16, 8192), user, prefix_shares=shares)


def _load(draw: random.Random, state: str) -> EngineLoad:
    used = _PAGES * draw.randint(*_STATES[state]) // 100
    context = draw.randint(0, used * _PAGE)
    return EngineLoad(used, _PAGES, draw.randint(0, 8), draw.randint(0, 64), context, draw.randint(0, context))


def _prompt(engines: int, tokens: int, repeats: int) -> dict[str, Any]:
    """What a prompt's keys take, and looking them up."""
    prompt, root = list(range(tokens)), root_key(b"model", b"layout")
    keys = KeyChain(root, _PAGE).upto(prompt, tokens // _PAGE)
    ranks = [KVManager([GroupPages(len(keys) + 1)], _PAGE) for _ in range(engines)]
    cached = keys[: len(keys) // 2]
    for kv in ranks[::8]:
        if cached and kv.admit(0, [], len(cached) * _PAGE) is not None:
            kv.publish(0, cached)
            kv.release(0)
    seconds: dict[str, list[float]] = {"keys": [], "shares": []}
    for _ in range(100 * repeats):
        chain, began = KeyChain(root, _PAGE), time.perf_counter()
        chain.upto(prompt, (tokens - 1) // _PAGE)
        done = time.perf_counter()
        prefix_shares(ranks, prompt, chain)
        seconds["shares"].append(time.perf_counter() - done)
        seconds["keys"].append(done - began)
    return {"tokens": tokens, "by": {name: _figures(values) for name, values in seconds.items()}}


def _figures(seconds: Sequence[float]) -> dict[str, float]:
    return {"p50_us": 1e6 * percentile(seconds, 50), "p99_us": 1e6 * percentile(seconds, 99)}


def _row(name: str, state: str, found: dict[str, Any]) -> tuple[object, ...]:
    *figures, rules = found.values()
    return (name, state, *figures, ", ".join(sorted(rules)))


if __name__ == "__main__":
    sys.exit(main())
