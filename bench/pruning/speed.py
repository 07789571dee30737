"""Decode steps, prefills and bytes of models that structured pruning made smaller, beside dense ones.

`python -m bench.pruning.speed --json FILE`. The shipped `base` loses shares of its neurons or a key-value group; beside
it are the shipped `small` and, with `--trained DIR`, a dense model of the pruned size that was trained as `base` was.
Larger models of random weights follow, for speed alone: they never were trained, so they have no perplexity.

All engines of a comparison are in one process, compute in float32 and do not overlap steps. Repeats go through all of
them, beginning with another one each time. Decode steps count after every sequence has its first token and before the
first one ends; a prefill is the time to one token of a prompt. Wall times are the tenth percentile of all steps
(prefills), which other work on the machine disturbs least. CPU times are of all threads of the process, the mean of a
repeat's steps; their ratios are of figures of one repeat, and the interval holds all repeats.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import models
from bench.engine_worker import Ours
from bench.pruning.quality import draw_windows
from bench.report import header, percentile, write_json
from bench.workload import prompts
from jaxdual import LLM, SamplingParams
from jaxdual.arguments import whole
from jaxdual.model_folder import shipped_model
from jaxdual.pruning.calibration import perplexity
from jaxdual.pruning.job import sizes_of
from jaxdual.pruning.structured.plan import Structure
from jaxdual.pruning.structured.run import chosen_widths, prune_structured
from jaxdual.tokenizer import Tokenizer
from models import ModelConfig
from models.checkpoint import stored_dtype
from models.checkpoint import write_json as write_config
from models.convert import OF_WEIGHTS, copy_other_files
from models.shapes import abstract

_PERCENTILE = 10
_CONTEXT = 640  # tokens of the longest sequence of any load
_LENGTH, _CALIBRATION, _HELD_OUT = 256, 64, 128  # tokens of a window, and windows
PRUNED = {
    "25 % of neurons": Structure(share=0.25),
    "50 % of neurons": Structure(share=0.5),
    "50 % of neurons, by error": Structure(share=0.5, widths="error"),
    "1 of 2 KV groups": Structure(kv_groups=1),
}
_LARGE = ModelConfig(
    family="qwen3",
    vocab_size=8192,
    hidden_size=1024,
    intermediate_size=4096,
    num_layers=8,
    num_heads=16,
    num_kv_heads=8,
    head_dim=64,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
    qk_norm=True,
)
_SMALLER: dict[str, dict[str, int]] = {
    "dense": {},
    "25 % of neurons": {"intermediate_size": 3072},
    "50 % of neurons": {"intermediate_size": 2048},
    "4 of 8 KV groups": {"num_kv_heads": 4, "num_heads": 8},
}


@dataclass(frozen=True, slots=True)
class Arm:
    """A model beside others; the first of a comparison is what the others are related to.

    Attributes:
      name: that tables show.
      folder: of the model.
      random: it has no weights: random ones are taken.
    """

    name: str
    folder: Path
    random: bool = False


@dataclass(frozen=True, slots=True)
class Load:
    """What every arm does.

    Attributes:
      name: that tables show.
      batch: sequences.
      prompt: tokens of each.
      new_tokens: of each; 1 measures the prefill, more the decode steps.
    """

    name: str
    batch: int
    prompt: int
    new_tokens: int


LOADS = (Load("decode, 1", 1, 64, 48), Load("decode, 16", 16, 64, 80), Load("prefill, 512", 1, 512, 1))

LARGE_LOADS = (Load("decode, 1", 1, 16, 24), Load("decode, 16", 16, 16, 24), Load("prefill, 256", 1, 256, 1))


def speed(arms: Sequence[Arm], repeats: int, loads: Sequence[Load] = LOADS) -> list[dict[str, Any]]:
    """Measures arms side by side.

    Returns:
      For each arm its name, its bytes, and for each load "wall_ms" and "wall_ratio" to the first arm, "cpu_ms" (median
      over repeats) and "cpu_ratio" to the first arm (median, with "cpu_ratio_lowest" and "cpu_ratio_highest").
    """
    engines = [_start(arm) for arm in arms]
    vocab_sizes = [models.load_config(arm.folder).vocab_size for arm in arms]
    walls: dict[tuple[int, str], list[float]] = {}
    cpus: dict[tuple[int, str], list[float]] = {}
    for repeat in range(repeats + 1):  # the first one compiles
        for load in loads:
            work = prompts(load.batch, load.prompt, min(vocab_sizes), 1000 * repeat + load.batch)
            for place in range(len(arms)):
                index = (place + repeat) % len(arms)
                wall, cpu = _steps(engines[index].llm, work, load.new_tokens)
                if repeat:
                    walls.setdefault((index, load.name), []).extend(wall)
                    cpus.setdefault((index, load.name), []).append(cpu)
    rows = []
    for index, (arm, engine) in enumerate(zip(arms, engines, strict=True)):
        row: dict[str, Any] = {"name": arm.name, "bytes": _bytes(arm, engine), "loads": {}}
        for load in loads:
            wall, first = (percentile(walls[place, load.name], _PERCENTILE) for place in (index, 0))
            ratios = [one / other for one, other in zip(cpus[index, load.name], cpus[0, load.name], strict=True)]
            row["loads"][load.name] = {
                "wall_ms": 1e3 * wall,
                "wall_ratio": wall / first,
                "cpu_ms": 1e3 * statistics.median(cpus[index, load.name]),
                "cpu_ratio": statistics.median(ratios),
                "cpu_ratio_lowest": min(ratios),
                "cpu_ratio_highest": max(ratios),
            }
        rows.append(row)
    return rows


def _steps(llm: LLM, work: Sequence[Sequence[int]], new_tokens: int) -> tuple[list[float], float]:
    """Wall seconds of each decode step, or of the prefill if there is one new token; and mean CPU seconds of one."""
    params = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True)
    begin, begin_cpu = time.perf_counter(), time.process_time()
    outputs = [llm.submit({"prompt_token_ids": list(prompt)}, params) for prompt in work]
    walls, cpus = [], []
    while llm.has_unfinished:
        decoding = all(output.outputs[0].token_ids for output in outputs)
        wall, cpu = time.perf_counter(), time.process_time()
        llm.step()
        if decoding and not any(output.finished for output in outputs):
            walls.append(time.perf_counter() - wall)
            cpus.append(time.process_time() - cpu)
    if new_tokens == 1:
        return [time.perf_counter() - begin], time.process_time() - begin_cpu
    return walls, statistics.fmean(cpus)


def _start(arm: Arm) -> Ours:
    engine = Ours()
    engine.load(
        str(arm.folder),
        {
            "load_format": "dummy" if arm.random else "auto",
            "dtype": "float32",
            "max_model_len": _CONTEXT,
            "max_num_seqs": 16,
            "num_kv_blocks": 400,
            "enable_prefix_caching": False,
            "async_scheduling": False,  # a step then lasts from its plan to its tokens
        },
    )
    return engine


def _bytes(arm: Arm, engine: Ours) -> dict[str, Any]:
    """Bytes of weights and of a token's keys and values: computed from the configuration, and as they are there."""
    device = cast(Any, engine.llm)._engine.runner.device
    rows = sum(arena.shape[0] * arena.shape[1] for arena in device.arenas)  # keys or values of a token in a layer
    config = models.load_config(arm.folder)
    shapes = abstract(config, "float32")
    files = sum(file.stat().st_size for file in arm.folder.glob("*.safetensors"))
    return {
        **sizes_of(shapes, "float32"),
        "files": files or None,
        "files_computed": None if arm.random else sizes_of(shapes, stored_dtype(arm.folder))["weight_bytes"],
        "loaded": sum(leaf.nbytes for leaf in device.programs.leaves),
        "kv_loaded_per_token": sum(arena.nbytes for arena in device.arenas) // rows * 2 * config.num_layers,
    }


def pruned_arms(source: Path, place: Path, structures: dict[str, Structure] = PRUNED) -> list[Arm]:
    """Prunes a model on source code of its training text, once for each structure."""
    tokenizer = Tokenizer.from_dir(source)
    windows = draw_windows(tokenizer, "train", _CALIBRATION, _LENGTH, seed=0)
    arms = []
    for number, (name, structure) in enumerate(structures.items()):
        model = models.load(source, dtype="float32")
        smaller = prune_structured(model, windows, structure, chosen_widths(model, windows, structure))
        folder = place / str(number)
        models.save(smaller, folder, stored_dtype(source))
        copy_other_files(source, folder, but=OF_WEIGHTS)
        arms.append(Arm(name, folder))
        _say(f"{name}: pruned")
    return arms


def _quality(arms: Sequence[Arm]) -> dict[str, float]:
    """Perplexity of held-out source code, of which no arm has seen anything."""
    windows = draw_windows(Tokenizer.from_dir(arms[0].folder), "heldout", _HELD_OUT, _LENGTH, seed=0)
    return {arm.name: perplexity(models.load(arm.folder, dtype="float32"), windows) for arm in arms}


def _large_arms(place: Path) -> list[Arm]:
    arms = []
    for number, (name, sizes) in enumerate(_SMALLER.items()):
        folder = place / f"large-{number}"
        folder.mkdir()
        write_config(folder / "config.json", models.to_hf(replace(_LARGE, **sizes)))
        arms.append(Arm(name, folder, random=True))
    return arms


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the measurements; returns the exit status."""
    options = _parse(arguments)
    results = header("bench.pruning.speed")
    with tempfile.TemporaryDirectory() as temporary:
        place, base = Path(temporary), shipped_model("base")
        arms = [Arm("dense", base), *pruned_arms(base, place), Arm("shipped small", shipped_model("small"))]
        if options.trained is not None:
            arms.append(Arm("trained at that size", options.trained))
        quality = _quality(arms)
        rows = [row | {"perplexity": quality[row["name"]]} for row in speed(arms, options.repeats)]
        results["base"] = {"repeats": options.repeats, "loads": [asdict(load) for load in LOADS], "arms": rows}
        print(markdown(rows), flush=True)
        write_json(options.json, results)
        if not options.no_large:
            repeats = (options.repeats + 2) // 3  # its steps take longer, and vary less
            rows = speed(_large_arms(place), repeats, LARGE_LOADS)
            results["large"] = {"repeats": repeats, "loads": [asdict(load) for load in LARGE_LOADS], "arms": rows}
            print(markdown(rows), flush=True)
    results["machine"]["load_average_after"] = os.getloadavg()[0]
    write_json(options.json, results)
    return 0


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Two tables of `speed`'s rows: times, and bytes."""
    loads = list(rows[0]["loads"])
    scored = "perplexity" in rows[0]
    times = [
        (
            row["name"],
            *([f"{row['perplexity']:.2f}"] if scored else []),
            *(_ratio(row["loads"][load]) for load in loads),
        )
        for row in rows
    ]
    names = ("parameters", "weight_bytes", "loaded", "files", "kv_bytes_per_token", "kv_loaded_per_token")
    sizes = [(row["name"], *(row["bytes"][name] for name in names)) for row in rows]
    head = ("", *(["perplexity"] if scored else []), *loads)
    return "\n\n".join((_table(head, times), _table(("", *(name.replace("_", " ") for name in names)), sizes)))


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join("–" if cell is None else str(cell) for cell in line) + " |" for line in lines)


def _ratio(load: dict[str, float]) -> str:
    interval = f"{load['cpu_ratio_lowest']:.2f} to {load['cpu_ratio_highest']:.2f}"
    return f"{load['wall_ms']:.2f} ms, {load['wall_ratio']:.2f}; {load['cpu_ratio']:.2f} ({interval})"


def _say(text: str) -> None:
    print(f"bench.pruning.speed: {text}", file=sys.stderr, flush=True)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.pruning.speed", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", metavar="FILE", help="where results go")
    parser.add_argument("--repeats", type=whole(1), default=9, help="of each figure (default: %(default)s)")
    parser.add_argument("--trained", type=Path, metavar="DIR", help="a dense model of the pruned size")
    parser.add_argument("--no-large", action="store_true", help="leaves the larger models of random weights out")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
