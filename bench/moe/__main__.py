"""`python -m bench.moe`: queue order, engine choice and expert placement for mixtures of experts, by simulation.

Every arm serves the same requests. The factor on all times is set so that the baseline has the published P99 of the
time to a first token, on seeds of their own; no policy's threshold is fitted. Changes are against strict round robin
and against what vLLM does, both with first come, first served, seed by seed, with bootstrap intervals of their mean.
`--placements`, `--sessions`, `--search` and `--wall-clock` are measurements of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Any

from bench.moe.arms import ARMS, BASELINES, Arm
from bench.moe.campaign import Case, Load, calibrate_all, run, run_all
from bench.moe.placements import placement_report
from bench.moe.points import POINTS, Point
from bench.moe.search import search_report
from bench.moe.sessions import session_report
from bench.moe.summary import (
    CHANGE_COLUMNS,
    FIGURE_COLUMNS,
    better_points,
    cells,
    change_rows,
    compare,
    figure_rows,
)
from bench.moe.wall_clock import WALL_CLOCK_ARMS, wall_clock
from bench.moe.workload import SHAPES, read_lengths
from bench.report import header, table, write_json
from jaxdual.arguments import above_0, whole
from jaxdual.offline.trace import TraceError

PAPER = {"ttft_s": -0.178, "tpot_s": -0.133}
_DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(("point", "shape", "rate", "arm", "trace")),
    **{"seeds": 10, "requests": 1000, "variation": 1.0, "load": 0.8, "jobs": os.cpu_count()},
}
_KINDS = {
    "placements": "with --placements",
    "sessions": "with --sessions",
    "search": "with --search",
    "wall_clock": "with --wall-clock",
    "campaign": "without --wall-clock",
}
# What each kind of measurement looks at.
_USED = {
    "placements": (),
    "sessions": ("seeds", "jobs"),
    "search": ("requests", "jobs"),
    "wall_clock": ("shape", "seeds", "requests", "load"),
    "campaign": ("point", "shape", "rate", "arm", "seeds", "requests", "variation", "trace", "jobs"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    _complete(parser, options)
    report = header("bench.moe")
    try:
        _measure(options, report)
    except ValueError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    write_json(options.json, report)
    return 0


def _complete(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the program where flags have no effect; others get their defaults."""
    what = next((name for name in _USED if getattr(options, name, False)), "campaign")
    for name, default in _DEFAULTS.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
        elif name not in _USED[what]:
            parser.error(f"--{name} has no effect {_KINDS[what]}")
    if options.trace is not None:
        try:
            read_lengths(options.trace)
        except TraceError as error:
            parser.error(str(error))


def _measure(options: argparse.Namespace, report: dict[str, Any]) -> None:
    if options.placements:
        report["placements"] = placement_report()
    elif options.wall_clock:
        _wall_clock(options, report)
    else:
        # Not forked: JAX has threads.
        with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
            if options.sessions:
                report["sessions"] = session_report(pool, options.seeds)
            elif options.search:
                report["search"] = search_report(pool, options.requests)
            else:
                _campaign(pool, options, report)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.moe", description=__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--placements", action="store_true", help="what placements of experts are worth, and no requests")
    what.add_argument("--sessions", action="store_true", help="users who come back, with prefixes kept")
    what.add_argument("--wall-clock", action="store_true", help="engines of two processes in place of a simulation")
    what.add_argument(
        "--search", action="store_true", help="candidates for an operating point with the paper's changes"
    )
    parser.add_argument("--point", choices=POINTS, action="append", help="operating points; all unless given")
    parser.add_argument("--shape", choices=SHAPES, action="append", help="of all, unless given")
    parser.add_argument(
        "--rate", type=above_0, action="append", help="requests a second; 1.4, 1.2 and 1.0 unless given"
    )
    parser.add_argument("--arm", choices=[arm.name for arm in ARMS], action="append", help="of all, unless given")
    parser.add_argument("--seeds", type=whole(2), help="runs of each, 10 unless given")
    parser.add_argument("--requests", type=whole(2), help="of a run, 1000 unless given")
    parser.add_argument("--variation", type=above_0, help="of gaps between arrivals; 1, for Poisson, unless given")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="lengths are drawn from it: BurstGPT's .csv")
    parser.add_argument("--jobs", type=whole(1), help="simulations at a time; as many as cores unless given")
    parser.add_argument("--load", type=above_0, help="by the clock: part of what the baseline serves at most; 0.8")
    parser.add_argument("--json", metavar="FILE", help="written anew after each rate")
    return parser


def _campaign(pool: Executor, options: argparse.Namespace, report: dict[str, Any]) -> None:
    load = Load(options.requests, options.variation, options.trace)
    rates, shapes = options.rate or [1.4, 1.2, 1.0], options.shape or list(SHAPES)
    arms = [arm for arm in ARMS if arm in BASELINES or options.arm is None or arm.name in options.arm]
    report |= {"paper": PAPER, "requests": load.requests, "variation": load.variation, "seeds": options.seeds}
    report["trace"] = None if load.trace is None else str(load.trace)
    report["points"] = {}
    for name in options.point or POINTS:
        point = POINTS[name]
        slow = calibrate_all(pool, point, load, shapes)
        print(f"{name}: factors on all times {slow}")
        of_point = report["points"][name] = {"point": dataclasses.asdict(point), "slow": slow}
        runs: list[dict[str, Any]] = []
        compared: list[dict[str, Any]] = []
        for rate in rates:
            runs += run_all(pool, run, _cases(point, load, shapes, rate, arms, options.seeds, slow))
            new = [compare(runs, arm.name, base.name, rate) for base in BASELINES for arm in arms if arm is not base]
            compared += new
            of_point |= {"changes": compared, "cells": cells(runs)}
            write_json(options.json, report)
            _print(name, rate, new, runs)
        print(f"{name}: shapes and rates, of {len(shapes) * len(rates)}, with better TTFT and TPOT")
        better = better_points(compared).items()
        print(table(["arm", "against", "TTFT", "TPOT"], [[*names, *counts] for names, counts in better]))


def _wall_clock(options: argparse.Namespace, report: dict[str, Any]) -> None:
    shapes, load = options.shape or list(SHAPES), options.load
    found = asyncio.run(wall_clock(shapes, options.seeds, options.requests, load))
    runs = found.pop("runs")
    compared = [
        compare(runs, arm.name, base.name, load) for base in BASELINES for arm in WALL_CLOCK_ARMS if arm is not base
    ]
    report["wall_clock"] = found | {"changes": compared, "cells": cells(runs)}
    _print("wall clock", load, compared, runs)


def _cases(
    point: Point,
    load: Load,
    shapes: Sequence[str],
    rate: float,
    arms: Sequence[Arm],
    seeds: int,
    slow: dict[str, float],
) -> list[Case]:
    return [
        Case(point, load, shape, rate, arm, seed, slow[shape])
        for seed in range(seeds)
        for shape in shapes
        for arm in arms
    ]


def _print(point: str, rate: float, compared: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]]) -> None:
    for base in BASELINES:
        print(f"{point}, {rate} requests/s, against {base.name}; the paper has TTFT -17.8 % and TPOT -13.3 % at 1.4")
        print(table(CHANGE_COLUMNS, change_rows([one for one in compared if one["baseline"] == base.name])))
    print(table(FIGURE_COLUMNS, figure_rows(runs, rate)))


if __name__ == "__main__":
    sys.exit(main())
