"""`python -m bench.iha`: what Interleaved Head Attention is, costs and learns, each beside its trivial baselines.

Experiments of a minute or less are whole; those that train for longer are reduced to what two CPU cores can do in
minutes, unless `--full` asks for all of it, which is meant for a GPU. Nothing here is a result of the paper's 2.4B
models.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.iha.experiments import EXPERIMENTS
from bench.iha.pictures import check_drawing, draw
from bench.iha.results import Curves, Result, Setting
from bench.report import header, write_json
from jaxdual.arguments import run_command, whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    return run_command(parser.prog, lambda: _run(options))


def _parser() -> argparse.ArgumentParser:
    names = "; ".join(f"{name}: {one.about}" for name, one in EXPERIMENTS.items())
    parser = argparse.ArgumentParser(prog="python -m bench.iha", description=__doc__, epilog=names)
    parser.add_argument(
        "--only", choices=EXPERIMENTS, action="append", metavar="NAME", help="an experiment; all unless given"
    )
    parser.add_argument("--seeds", type=whole(1), default=3, metavar="N", help="runs of each arm; 3")
    parser.add_argument("--full", action="store_true", help="whole protocols, which want a GPU")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="runs of lm and upcycle that are done; go on from there"
    )
    parser.add_argument("--json", metavar="FILE", help="written anew after each experiment")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="curves of what was trained, as PNG")
    return parser


def _run(options: argparse.Namespace) -> int:
    if options.pictures is not None:
        check_drawing()
        options.pictures.mkdir(parents=True, exist_ok=True)
    setting = Setting(options.seeds, options.full, options.keep)
    for name in options.only or EXPERIMENTS:
        if EXPERIMENTS[name].paired and setting.seeds < 2:
            raise ValueError(f"--seeds {setting.seeds}: {name} compares arms by seed, and needs at least 2")
    report: dict[str, Any] = header("bench.iha") | {"seeds": setting.seeds, "full": setting.full, "experiments": {}}
    for name in dict.fromkeys(options.only or EXPERIMENTS):
        print(f"{name}: {EXPERIMENTS[name].about}", flush=True)
        begun = time.monotonic()
        result = EXPERIMENTS[name].run(setting)
        report["experiments"][name] = {"seconds": round(time.monotonic() - begun, 1)} | result.as_json()
        write_json(options.json, report)
        _show(result)
        for curves in result.curves if options.pictures is not None else ():
            draw(curves, options.pictures / f"iha_{name}{_suffix(curves, result)}.png")
    return 0


def _show(result: Result) -> None:
    for table in result.tables:
        print(f"\n{table.text()}")
    print(f"\nverdict: {result.verdict}\n", flush=True)


def _suffix(curves: Curves, result: Result) -> str:
    """Tells an experiment's pictures apart where there are several."""
    return f"_{result.curves.index(curves)}" if len(result.curves) > 1 else ""


if __name__ == "__main__":
    sys.exit(main())
