"""`python -m bench.simulate`: simulated clusters against the figures of DualPath, and against the measured loopback.

Each model has one set of parameters, in examples/sim. Of it the storage cards' rate is fitted to the largest job of the
set of 64K in the mode Basic, and a common factor of all times to compute to that job in the mode Oracle; all other
figures are predictions.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from bench.paper_figures import ABLATION, FITTED, JCT, ONLINE
from bench.report import header, table, write_json
from jaxdual.sim.config import read_sim_config
from jaxdual.sim.run import run_simulation

_EXAMPLES = Path(__file__).parents[1] / "examples" / "sim"
_MEASURED = Path(__file__).parent / "results" / "cpu_2_cores" / "dualpath.json"
_MODES = ("oracle", "full", "basic")
_ABLATION_MODES = ("basic", "layerwise", "roundrobin", "full")
_ONLINE_MODES = ("full", "basic")
_SCALE_MODES = ("full", "split")
_SCALES = (1, 24)
_LOOPBACK_MODES = ("basic", "layerwise", "roundrobin", "full", "split", "oracle")


def simulate(model: str, settings: tuple[str, ...]) -> dict[str, Any]:
    """The figures of one simulation."""
    report = run_simulation(read_sim_config(_EXAMPLES / f"{model}.toml", settings))
    kept = ("jct_s", "jct_agents_s", "ttft_s", "ttft_parts_s", "ttst_s", "tpot_s", "throughput", "snic_max_over_avg")
    figures = {name: report[name] for name in (*kept, "attention_max_over_avg", "simulation")}
    return {"model": model, "settings": settings, **figures, "nics": report["nics"]["kinds"]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.simulate", description=__doc__)
    parser.add_argument(
        "--model", choices=[*JCT, "loopback"], action="append", help="of all, unless given, or --online or --scale"
    )
    parser.add_argument("--max-len", choices=["32K", "48K", "64K"], action="append", help="of all, unless given")
    parser.add_argument("--ablation", action="store_true", help="the ablation of Figure 12, too")
    parser.add_argument(
        "--online", action="store_true", help="agents that arrive over an hour, at rate after rate, too"
    )
    parser.add_argument("--scale", action="store_true", help="48 prefill and 96 decode nodes, too: half an hour each")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="simulations at a time")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", metavar="FILE", help="a picture of the jobs' times by mode, published and simulated")
    options = parser.parse_args(arguments)
    other = options.online or options.scale
    models = options.model or ([] if other else [*JCT, "loopback"])
    lengths = options.max_len or ["32K", "48K", "64K"]
    calls = [call for model in models for call in _calls(model, lengths, ablation=options.ablation)]
    calls += [_online(rate, mode) for rate in ONLINE for mode in _ONLINE_MODES] if options.online else []
    calls += [_scale(factor, mode) for mode in _SCALE_MODES for factor in _SCALES] if options.scale else []
    with ProcessPoolExecutor(options.jobs) as pool:
        futures = {call: pool.submit(simulate, *call) for call in calls}
        runs = {}
        for number, (call, future) in enumerate(futures.items(), start=1):
            runs[call] = future.result()
            print(f"{number} of {len(calls)}: {' '.join((call[0], *call[1]))}", file=sys.stderr)
    report = header("bench.simulate") | {"runs": list(runs.values())}
    for model in models:
        if model == "loopback":
            report["loopback"] = _loopback(runs)
            print(table(["mode", "measured, s", "simulated, s", "error"], report["loopback"]))
            continue
        cells = [cell for cell in JCT[model] if cell[0] in lengths]
        report[model] = [row for cell in cells for row in _rows(model, cell, runs)]
        print(table(["model", "set", "agents", "mode", "paper, s", "simulated, s", "error"], report[model]))
        report[f"{model} ratios"] = [_ratios(model, cell, runs) for cell in cells]
        columns = ["model", "set", "agents", "Basic/Ours", "simulated", "error", "Ours/Oracle", "simulated"]
        print(table(columns, report[f"{model} ratios"]))
        if options.ablation and model == "ds660b":
            report["ablation"] = [row for agents in ABLATION for row in _ablation(agents, runs)]
            print(table(["agents", "mode", "paper, s", "shorter", "simulated, s", "shorter"], report["ablation"]))
    if options.online:
        report["online"] = [_online_row(rate, mode, runs) for mode in _ONLINE_MODES for rate in ONLINE]
        print(table(["mode", "agents/s", "TTFT, s", "paper", "TTST, s", "TPOT, s", "paper"], report["online"]))
        most = {mode: _capacity(mode, runs) for mode in _ONLINE_MODES}
        report["capacity"] = most
        print(f"most agents/s within TTFT 4 s and TPOT 50 ms: {most}, paper: full 0.45, basic 0.20")
    if options.scale:
        report["scale"] = [_scale_row(factor, mode, runs) for mode in _SCALE_MODES for factor in _SCALES]
        columns = ["cluster", "agents", "mode", "job, s", "max/mean of storage cards", "simulated in, s", "memory, MB"]
        print(table(columns, report["scale"]))
    write_json(options.json, report)
    rows = [row for model in models if model != "loopback" for row in report[model]]
    if options.plot is not None and rows:
        _draw(rows, Path(options.plot))
    return 0


type _Call = tuple[str, tuple[str, ...]]


def _call(model: str, cell: tuple[str, int], mode: str) -> _Call:
    return model, (f"mode={mode}", f"workload.max_len={cell[0]}", f"workload.agents={cell[1]}")


def _calls(model: str, lengths: Sequence[str], *, ablation: bool) -> list[_Call]:
    if model == "loopback":
        return [(model, (f"mode={mode}",)) for mode in _LOOPBACK_MODES]
    calls = [_call(model, cell, mode) for cell in JCT[model] if cell[0] in lengths for mode in _MODES]
    if ablation and model == "ds660b":
        calls += [_call(model, ("64K", agents), mode) for agents in ABLATION for mode in _ABLATION_MODES]
    return list(dict.fromkeys(calls))


def _online(rate: float, mode: str) -> _Call:
    agents = round(rate * 3600)
    load = ("workload.max_len=48K", f"workload.agents={agents}", f"workload.arrivals_per_second={rate}")
    return "ds660b", (f"mode={mode}", *load)


def _online_row(rate: float, mode: str, runs: dict[_Call, dict[str, Any]]) -> tuple[Any, ...]:
    run = runs[_online(rate, mode)]
    ttft, ttst, tpot = (run[name]["mean"] for name in ("ttft_s", "ttst_s", "tpot_s"))
    paper = ONLINE[rate] if mode == "full" else (None, None)
    return mode, f"{rate:.2f}", f"{ttft:.2f}", paper[0], f"{ttst:.3f}", f"{tpot:.4f}", paper[1]


def _capacity(mode: str, runs: dict[_Call, dict[str, Any]]) -> float:
    """The highest rate below the first one that breaks a promise."""
    most = 0.0
    for rate in ONLINE:
        run = runs[_online(rate, mode)]
        if run["ttft_s"]["mean"] > 4 or run["tpot_s"]["mean"] > 0.05:
            break
        most = rate
    return most


def _scale(factor: int, mode: str) -> _Call:
    nodes = (f"cluster.prefill_nodes={2 * factor}", f"cluster.decode_nodes={4 * factor}")
    return "ds660b", (f"mode={mode}", "workload.max_len=48K", f"workload.agents={2000 * factor}", *nodes)


def _scale_row(factor: int, mode: str, runs: dict[_Call, dict[str, Any]]) -> tuple[Any, ...]:
    run = runs[_scale(factor, mode)]
    uneven, cost = run["snic_max_over_avg"], run["simulation"]
    times = (round(run["jct_s"]), None if uneven is None else f"{uneven:.2f}", round(cost["wall_seconds"]))
    return f"{2 * factor}P{4 * factor}D", 2000 * factor, mode, *times, round(cost["peak_bytes"] / 1e6)


def _rows(model: str, cell: tuple[str, int], runs: dict[_Call, dict[str, Any]]) -> list[tuple[Any, ...]]:
    rows = []
    for mode, paper in zip(_MODES, JCT[model][cell], strict=True):
        found = runs[_call(model, cell, mode)]["jct_s"]
        fitted = cell == FITTED[model] and mode != "full"
        rows.append((model, *cell, mode, paper, round(found), "fitted" if fitted else _error(found, paper)))
    return rows


def _ratios(model: str, cell: tuple[str, int], runs: dict[_Call, dict[str, Any]]) -> tuple[Any, ...]:
    oracle, ours, basic = (runs[_call(model, cell, mode)]["jct_s"] for mode in _MODES)
    paper_oracle, paper_ours, paper_basic = JCT[model][cell]
    gain, paper = basic / ours, paper_basic / paper_ours
    above, paper_above = f"{ours / oracle:.2f}", f"{paper_ours / paper_oracle:.2f}"
    return model, *cell, f"{paper:.2f}", f"{gain:.2f}", _error(gain, paper), paper_above, above


def _ablation(agents: int, runs: dict[_Call, dict[str, Any]]) -> list[tuple[Any, ...]]:
    found = [runs[_call("ds660b", ("64K", agents), mode)]["jct_s"] for mode in _ABLATION_MODES]
    paper = ABLATION[agents]
    return [
        (agents, mode, paper[i], f"{1 - paper[i] / paper[0]:.1%}", round(found[i]), f"{1 - found[i] / found[0]:.1%}")
        for i, mode in enumerate(_ABLATION_MODES)
    ]


def _loopback(runs: dict[_Call, dict[str, Any]]) -> list[tuple[Any, ...]]:
    measured = json.loads(_MEASURED.read_text())["runs"]
    rows = []
    for mode in _LOOPBACK_MODES:
        same = [run["jct_s"] for run in measured if _is_case(run, mode)]
        median, found = statistics.median(same), runs["loopback", (f"mode={mode}",)]["jct_s"]
        rows.append((mode, f"{median:.2f}", f"{found:.2f}", _error(found, median)))
    return rows


def _is_case(run: dict[str, Any], mode: str) -> bool:
    return (run["case"], run["prefill"], run["decode"], run["mode"]) == ("io", 1, 1, mode)


def _draw(rows: Sequence[tuple[Any, ...]], path: Path) -> None:
    """A row of bars for each model: of each job, published and simulated times by mode."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(row[0] for row in rows))
    figure, axes = plt.subplots(len(models), 1, figsize=(12, 4 * len(models)), squeeze=False, layout="constrained")
    for (axis,), model in zip(axes, models, strict=True):
        jobs = list(dict.fromkeys(row[1:3] for row in rows if row[0] == model))
        for number, mode in enumerate(_MODES):
            times = [row[4:6] for row in rows if row[0] == model and row[3] == mode]
            for half, label in enumerate(("published", "simulated")):
                places = [place + (2 * number + half - 2.5) * 0.14 for place in range(len(jobs))]
                color = {"color": f"C{number}", "alpha": 1.0 - 0.5 * half}
                axis.bar(places, [time[half] for time in times], 0.13, label=f"{mode}, {label}", **color)
        axis.set_xticks(range(len(jobs)), [f"{length}, {agents}" for length, agents in jobs])
        axis.set(title=model, ylabel="job, s", xlabel="set, agents")
        axis.legend()
    figure.savefig(path, dpi=110)


def _error(found: float, paper: float) -> str:
    return f"{found / paper - 1:+.1%}"


if __name__ == "__main__":
    sys.exit(main())
