"""`python -m bench.landing`: stored blocks on their way into KV memory, by a program (scatter) or straight (direct).

Blocks of the shipped model, from host memory to pages in random order, until a program that follows could read them.
Both ways take turns; the base is memcpy of as many bytes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from bench.report import header, table, write_json
from jaxdual.config import EngineConfig
from jaxdual.engine.build import build_engine
from jaxdual.engine.runner import Runner
from jaxdual.kv.manager import PageCopy
from jaxdual.scheduling.plan import StepPlan

_PAGES = 256
_COUNTS = (1, 8, 64)  # blocks that land at once


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.landing", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="where results are written")
    parser.add_argument("--repeats", type=int, default=20, help="of each way and count (default: 20)")
    options = parser.parse_args(arguments)
    runners = {landing: _runner(landing) for landing in ("scatter", "direct")}
    host = runners["scatter"]._copies._host[0]
    there = np.zeros_like(host)
    report = header("bench.landing") | {"block_bytes": host[0].nbytes, "by_count": {}}
    rows = []
    for count in _COUNTS:
        ways: dict[str, Callable[[], object]] = {
            "memcpy": lambda count=count: np.copyto(there[:count], host[:count]),  # type: ignore[misc]
            **{name: lambda runner=runner, count=count: _land(runner, count) for name, runner in runners.items()},  # type: ignore[misc]
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(options.repeats + 1):
            for name, way in ways.items():
                began = time.perf_counter()
                way()
                if turn:  # the first one compiles
                    seconds[name].append(time.perf_counter() - began)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        report["by_count"][count] = {"seconds": medians, "scatter_over_direct": medians["scatter"] / medians["direct"]}
        rows.append((count, *(value * 1e3 for value in medians.values()), medians["scatter"] / medians["direct"]))
    print(table(("blocks", *(f"{name} ms" for name in seconds), "scatter / direct"), rows))
    write_json(options.json, report)
    return 0


def _runner(landing: str) -> Runner:
    config = EngineConfig(max_model_len=1024, num_kv_blocks=_PAGES, host_cache_bytes=1 << 26, kv_landing=landing)  # type: ignore[arg-type]  # checked there
    return build_engine(config).engine.runner


def _land(runner: Runner, count: int) -> None:
    pages = np.random.default_rng(0).permutation(_PAGES)[:count].tolist()
    copies = tuple(PageCopy("in", page, slot) for slot, page in enumerate(pages))
    runner.dispatch([StepPlan(copies=copies, tables=(), admitted=(), chunks=(), rows=(), preempted=())], [], {})
    jax.block_until_ready(runner.device.arenas)


if __name__ == "__main__":
    sys.exit(main())
