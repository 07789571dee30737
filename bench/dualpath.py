"""`python -m bench.dualpath`: agents' jobs by path mode, on real processes behind network cards of a played rate.

Each engine is a node with a storage card and a compute card of eight times its rate, the paper's ratio (DualPath 8 and
14B). Model, stored blocks and tokens are real. The cases:

- io: contexts are long and turns short, so that reading what is stored takes nearly all time. `full` can be as much
  faster than `basic` as there are more storage cards: (P+D)/P.
- compute: a layer takes a least time, as on a slower device, and cards are fast: nothing is to be gained.
- ablation: many contexts of very different lengths, and prefill engines with memory for less than two of the longest.
  Reading takes nearly as long as computing with that little memory: what is waited for changes from mode to mode.
- large: an agent whose context is much longer than those of the few others: where split reads pay.
- overlap: one prompt at a time, whose layers take as long to move as to compute.

Modes take turns within each repeat; ratios are those of neighbours in time.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.dualpath_load import Load, Run, as_json, run_load, settled, store_contexts
from bench.report import header, table, write_json
from jaxdual import LLM, AsyncLLM, EngineConfig, SamplingParams
from jaxdual.config import ClusterConfig
from jaxdual.model_folder import shipped_model
from models import load_config

_REPEATS = 5
_CARDS = 8  # rate of a compute card, in rates of a storage card
_MB = 1e6
_STORAGE_RATE = 10 * _MB
_MODEL_LEN = 1024
_BLOCK = 64
_TOKENS = 4  # of every output


@dataclass(frozen=True, slots=True)
class Case:
    """A cluster, a load, and the modes that are compared.

    Attributes:
      name: of the case.
      prefill, decode: engines.
      modes: of which the first is what the others are compared with.
      load: of the agents.
      goals: of some modes: times that they are to be faster than the first one at least.
      storage_rate: of the storage cards, in bytes/s; None for cards without a rate.
      layer_seconds: that a layer takes at least.
      prefill_blocks: KV memory of a prefill engine, in Full Blocks; None for that of any engine.
      pass_tokens: that a pass over the model computes at most.
    """

    name: str
    prefill: int
    decode: int
    modes: tuple[str, ...]
    load: Load
    goals: tuple[tuple[str, float], ...] = ()
    storage_rate: float | None = _STORAGE_RATE
    layer_seconds: float = 0.0
    prefill_blocks: int | None = None
    pass_tokens: int = 256

    @property
    def shape(self) -> str:
        return f"{self.prefill}P{self.decode}D"


def cases(*, quick: bool) -> list[Case]:
    """All that is measured; quick is what fits into four minutes, with fewer turns."""
    turns = 3 if quick else 6
    steady = Load((400,) * 8, turns, 20, _TOKENS)
    short = Load((130,) * 8, turns, 20, _TOKENS)
    lengths = np.random.default_rng(0).lognormal(np.log(350), 1.2, size=24).clip(130, 900).astype(int)
    skewed = Load(tuple(map(int, lengths)), turns, 20, _TOKENS)
    every = ("basic", "layerwise", "roundrobin", "full", "split", "oracle")
    found = [
        Case("io", 1, 1, every, steady, (("full", 1.85),)),
        Case("compute", 1, 1, ("basic", "full"), short, (("full", 0.95),), 400 * _MB, 0.1),
    ]
    if not quick:
        found += [
            # Three cards let through more than two: at a lower rate the processors stay as idle.
            Case("io", 1, 2, ("basic", "full", "split"), steady, (("full", 2.6),), 6 * _MB),
            Case("io", 2, 1, ("basic", "full", "split"), steady, (("full", 1.4),), 6 * _MB),
            Case(
                "ablation",
                2,
                2,
                ("basic", "layerwise", "roundrobin", "full"),
                skewed,
                storage_rate=15 * _MB,
                layer_seconds=0.06,
                prefill_blocks=20,
                pass_tokens=768,
            ),
            Case("large", 1, 1, ("full", "split"), Load((900, 130, 130), turns, 20, _TOKENS)),
            Case("overlap", 1, 1, ("layerwise", "full"), Load((900,), turns, 10, _TOKENS), layer_seconds=0.025),
        ]
    return found


async def measure(case: Case, repeats: int, folder: Path, numbers: Iterator[int]) -> list[Run]:
    """All runs of a case, on one cluster."""
    config = EngineConfig(
        max_model_len=_MODEL_LEN,
        block_size=_BLOCK,
        max_num_seqs=16,
        max_num_batched_tokens=case.pass_tokens,
        num_kv_blocks=320,
        kv_store=str(folder),
        kv_store_capacity_bytes=10**11,
        seed=0,
    )
    rate = case.storage_rate
    cluster = ClusterConfig(
        prefill=case.prefill,
        decode=case.decode,
        path_mode=case.modes[0],  # type: ignore[arg-type]  # checked at run time
        storage_nic_rate=rate,
        compute_nic_rate=None if rate is None else _CARDS * rate,
        least_layer_seconds=case.layer_seconds,
        prefill_kv_blocks=case.prefill_blocks,
    )
    runs = []
    async with AsyncLLM.from_config(config, cluster=cluster) as llm:
        await llm.warmed_up()
        await store_contexts(llm, case.load)
        if "oracle" in case.modes:  # whose blocks have keys of their own
            await llm.use_path_mode("oracle")
            await store_contexts(llm, case.load)
        for repeat in range(repeats):
            for mode in case.modes:
                await llm.use_path_mode(mode)
                runs.append(await run_load(llm, case.load, mode, repeat, next(numbers)))
                run = runs[-1]
                print(
                    f"{case.name} {case.shape} {mode}: {run.seconds:.2f} s, "
                    f"cores {run.cpu_share:.0%} busy, hits {run.hit_tokens / run.prompt_tokens:.0%}",
                    file=sys.stderr,
                )
        await settled(llm)
        await llm.check_integrity()
    return runs


class Reference:
    """One engine by itself, which says what the answers should have been."""

    def __init__(self) -> None:
        self._llm = LLM(max_model_len=_MODEL_LEN, block_size=_BLOCK, max_num_seqs=16, seed=0)

    def agrees(self, run: Run) -> bool | None:
        """Whether all answers of a run are those; None for a mode whose tokens mean nothing."""
        if run.mode == "oracle":
            return None
        params = SamplingParams(temperature=0.0, max_tokens=_TOKENS, min_tokens=_TOKENS, ignore_eos=True)
        outputs = self._llm.generate([{"prompt_token_ids": prompt} for prompt, _ in run.answers], params)
        return not run.errors and all(
            list(output.outputs[0].token_ids) == tokens
            for output, (_, tokens) in zip(outputs, run.answers, strict=True)
        )


def summary(case: Case, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """For each mode, its time, that of an agent, and how much faster it is than the first mode in the same repeat."""
    seconds = {(run.mode, run.repeat): run.seconds for run in runs}
    means = {(run.mode, run.repeat): statistics.mean(run.agent_seconds) for run in runs}
    repeats = sorted({run.repeat for run in runs})
    goals = dict(case.goals)
    rows = []
    for mode in case.modes:
        ratios = [seconds[case.modes[0], repeat] / seconds[mode, repeat] for repeat in repeats]
        rows.append(
            {
                "case": case.name,
                "shape": case.shape,
                "mode": mode,
                "jct_s": statistics.median(seconds[mode, repeat] for repeat in repeats),
                "speed_up": statistics.median(ratios),
                "interval": [min(ratios), max(ratios)],
                "agent_s": statistics.median(means[mode, repeat] for repeat in repeats),
                "agent_interval": [pick(means[mode, repeat] for repeat in repeats) for pick in (min, max)],
                "goal": goals.get(mode),
                "limit": (case.prefill + case.decode) / case.prefill if case.name == "io" else None,
                "cpu_share": max(run.cpu_share for run in runs if run.mode == mode),
            }
        )
        if case.name == "overlap":
            rows[-1] |= overlap(case, [run for run in runs if run.mode == mode])
    return rows


def overlap(case: Case, runs: Sequence[Run]) -> dict[str, float]:
    """How long prefills take beside the larger of computing and moving, and one layer more."""
    config = load_config(shipped_model())
    layers = config.num_layers
    block = layers * 2 * _BLOCK * config.num_kv_heads * config.head_dim * 4
    taken, bounds = [], []
    for request in (request for run in runs for request in run.requests):
        hits = request["cached_tokens"] // _BLOCK
        blocks = -(-request["prompt_tokens"] // _BLOCK)
        here = runs[0].mode == "layerwise"
        # Through the prefill node's compute card: hits come, and on this read path leave again beside what is new.
        sent = (hits + blocks if here else blocks - hits) * block
        moving = max(sent, hits * block) / (_CARDS * (case.storage_rate or math.inf))
        longer = max(moving, layers * case.layer_seconds)
        bounds.append(longer + longer / layers)
        taken.append(request["prefill"])
    return {"prefill_s": statistics.median(taken), "bound_s": statistics.median(bounds)}


def plot(path: Path, cases_and_runs: Sequence[tuple[Case, Sequence[Run]]]) -> None:
    """Draws the bytes that each storage card has read over time, a panel for each case and mode of the first repeat."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [(case, run) for case, runs in cases_and_runs for run in runs if run.repeat == 0]
    columns = 3
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(4.5 * columns, 2.6 * rows), squeeze=False)
    for panel, axis in itertools.zip_longest(panels, axes.flat):
        if panel is None:
            axis.set_axis_off()
            continue
        case, run = panel
        for card in sorted(name for name in run.nbytes if name.endswith("storage write")):
            times = [seconds for seconds, _ in run.timeline]
            axis.plot(times, [counts.get(card, 0) / _MB for _, counts in run.timeline], label=card.rsplit(" ", 2)[0])
        axis.set_title(f"{case.name} {case.shape} {run.mode}", fontsize=9)
        axis.set_xlabel("s", fontsize=8)
        axis.set_ylabel("MB read from the store", fontsize=8)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.dualpath", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="where results are written")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="a picture of what each storage card reads over time")
    parser.add_argument("--quick", action="store_true", help="one repeat of a smaller load, on one cluster of 1P1D")
    parser.add_argument("--repeats", type=int, default=None, help=f"of every mode (default: {_REPEATS})")
    parser.add_argument(
        "--case",
        action="append",
        help='only cases of this name, or shape ("io 1P2D"); may be given several times',
    )
    options = parser.parse_args(arguments)
    repeats = options.repeats or (1 if options.quick else _REPEATS)
    chosen = [
        case
        for case in cases(quick=options.quick)
        if options.case is None or {case.name, f"{case.name} {case.shape}"} & set(options.case)
    ]
    results: dict[str, Any] = header("bench.dualpath") | {"runs": [], "summary": []}
    numbers = itertools.count(1)
    measured: list[tuple[Case, list[Run]]] = []
    for case in chosen:
        with tempfile.TemporaryDirectory(prefix="jaxdual-dualpath-") as folder:
            measured.append((case, asyncio.run(measure(case, repeats, Path(folder), numbers))))
    reference = Reference()
    for case, runs in measured:
        results["runs"] += [as_json(run, case.prefill, case.decode, case.name, reference.agrees(run)) for run in runs]
        results["summary"] += summary(case, runs)
        write_json(options.json, results)
    head = (
        "case",
        "mode",
        "JCT s",
        "times faster",
        "interval",
        "an agent's s",
        "interval",
        "goal",
        "limit",
        "cores busy",
    )
    lines = [
        (
            f"{row['case']} {row['shape']}",
            row["mode"],
            row["jct_s"],
            row["speed_up"],
            "{:.2f}-{:.2f}".format(*row["interval"]),
            row["agent_s"],
            "{:.2f}-{:.2f}".format(*row["agent_interval"]),
            row["goal"],
            row["limit"],
            row["cpu_share"],
        )
        for row in results["summary"]
    ]
    print(table(head, lines))
    for row in results["summary"]:
        if "bound_s" in row:
            taken, bound = row["prefill_s"], row["bound_s"]
            print(
                f"prefill {row['mode']}: {taken:.3f} s; the larger of computing and moving, and a layer: {bound:.3f} s"
            )
    wrong = [run for run in results["runs"] if run["tokens_equal"] is False]
    print(f"{len(results['runs'])} runs; of {len(wrong)} the tokens are not those of one engine")
    if options.plot is not None:
        plot(options.plot, measured)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
