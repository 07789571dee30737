"""Runs of all arms at an operating point, on the same requests, and what the factor on all times must be for it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from bench.moe.arms import ARMS, Arm
from bench.moe.points import Point
from bench.moe.routing import RouterTrace, draw_trace
from bench.moe.simulation import simulate
from bench.moe.workload import Lengths, arrivals, read_lengths

P99_SECONDS = 4.9  # of the time to a first token at the greatest rate: the one absolute figure of the paper
FITTED_RATE = 1.4
CALIBRATION_SEEDS = (1000, 1001, 1002)
_TRACE_TOKENS = 4096
_FACTORS = (0.2, 8.0)


@dataclass(frozen=True, slots=True)
class Load:
    """Requests of a campaign.

    Attributes:
      requests: of a run.
      variation: of the gaps between arrivals, see `arrivals`.
      trace: file that lengths are drawn from; None for BurstGPT's distribution.
    """

    requests: int = 1000
    variation: float = 1.0
    trace: Path | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """One simulation of a campaign."""

    point: Point
    load: Load
    shape: str
    rate: float
    arm: Arm
    seed: int
    slow: float


@cache
def router_trace(seed: int, skew: float, tilt: float) -> RouterTrace:
    """What routers choose, or did before: experts are placed by another seed than they serve."""
    return draw_trace(_TRACE_TOKENS, seed, skew=skew, tilt=tilt)


@cache
def _lengths(trace: Path | None) -> Lengths | None:
    return None if trace is None else read_lengths(trace)


def run(case: Case) -> dict[str, Any]:
    """Figures of one simulation, and which it is."""
    load, point = case.load, case.point
    requests = arrivals(
        case.shape, case.rate, load.requests, case.seed, variation=load.variation, lengths=_lengths(load.trace)
    )
    served, profile = (router_trace(seed, point.skew, point.tilt) for seed in (0, 1))
    outcome = simulate(point.of_shape(case.shape, case.slow), case.arm, requests, served, profile)
    which = {"shape": case.shape, "rate": case.rate, "arm": case.arm.name, "seed": case.seed}
    return which | outcome.figures()


def calibrate(point: Point, load: Load, shape: str) -> float:
    """The factor on all times with which the baseline's P99 is the published one, on the calibration seeds.

    Raises:
      ValueError: no factor within bounds makes it so, as where requests are too few to wait for each other.
    """
    low, high = _FACTORS
    for _ in range(8):
        middle = (low * high) ** 0.5
        cases = [Case(point, load, shape, FITTED_RATE, ARMS[0], seed, middle) for seed in CALIBRATION_SEEDS]
        p99 = np.mean([run(case)["ttft_p99_s"] for case in cases])
        low, high = (middle, high) if p99 < P99_SECONDS else (low, middle)
    if low == _FACTORS[0] or high == _FACTORS[1]:
        raise ValueError(
            f"shape {shape}: no factor on all times from {_FACTORS[0]} to {_FACTORS[1]} gives a P99 of {P99_SECONDS} s"
        )
    return round((low * high) ** 0.5, 3)


def calibrate_all(pool: Executor, point: Point, load: Load, shapes: Sequence[str]) -> dict[str, float]:
    """`calibrate`, of each shape."""
    fitted = {shape: pool.submit(calibrate, point, load, shape) for shape in shapes}
    return {shape: future.result() for shape, future in fitted.items()}


def run_all[T](pool: Executor, call: Callable[[T], dict[str, Any]], cases: Sequence[T]) -> list[dict[str, Any]]:
    """Calls, many at a time, with a line on their progress now and then; results in order."""
    futures, done = [pool.submit(call, case) for case in cases], []
    for number, future in enumerate(futures, start=1):
        done.append(future.result())
        if number % 100 == 0:
            print(f"{number} of {len(cases)}", file=sys.stderr)
    return done
