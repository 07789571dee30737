"""Speed of the engine, beside Hugging Face transformers on torch doing the same work in the same run.

`python -m bench.engine --json FILE`. Both sides compute in float32 on the CPU, each measured process pinned: first all
to one core, then to two. Repeats of the sides alternate, so that whatever else the machine does hits both; best and
median are reported. With two cores each side runs with one and with two threads, and the faster is compared; a
number of threads that is far slower than the other at a piece of work is not repeated there. transformers uses its
dynamic or its static KV cache, whichever is faster.

A batch's prefill rate is prompt tokens over the seconds to one token of each prompt. Its decode rate is `n - 1` tokens
of each prompt over the seconds to `n` tokens less those to one. Where a step's time goes (`loop_cpu_ms` and others) is
measured as `bench.step_clock` describes.

The mixed load: 64 requests, prompts of 16 to 512 and outputs of 8 to 256 tokens (log-uniform), which arrive within the
first tenth of the time that the engine takes for all of them. The engine takes them as they come; transformers runs
them as static batches of 16 in order of arrival, each until its longest output ends. Rates count wanted tokens only.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import hf_environment
from bench.report import header, percentiles, table, write_json
from bench.sides import HF, OURS, WARM_UP_TOKENS, Side, start_hf, start_ours
from bench.startup import measure_startup
from bench.workers import ROOT, WorkerError
from bench.workload import LoadItem, mixed_load, prompts
from jaxdual.model_folder import shipped_model

_PROMPT = 64
_LONG_PROMPT = 512
_LONG_BATCHES = (1, 4)
_STATIC_BATCH = 16
_PROFILE_TOKENS = 48
_MIXED_CONTEXT = 512 + 256


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the measurements; returns the exit status."""
    options = _parse(arguments)
    results = header("bench.engine")
    results["model"] = Path(options.model).name
    results["settings"] = {name: getattr(options, name) for name in ("batches", "output_tokens", "repeats")}
    hf_python = _hf_python(options, results)
    config = json.loads((Path(options.model) / "config.json").read_text(encoding="utf-8"))
    vocab_size, context = config["vocab_size"], config["max_position_embeddings"]
    if options.requests and context < _MIXED_CONTEXT:
        _say(f"the model holds {context} tokens: the mixed load, which needs {_MIXED_CONTEXT}, is left out")
        options.requests = 0
    options.long_prompt = min(_LONG_PROMPT, context - WARM_UP_TOKENS)
    allowed = sorted(os.sched_getaffinity(0))
    results["cores"] = {}
    for count in options.cores:
        if count > len(allowed):
            _say(f"{count} cores: only {len(allowed)} here, left out")
            continue
        results["cores"][str(count)] = _measure(options, hf_python, vocab_size, allowed[-count:])
        write_json(options.json, results)
    if not options.no_startup:
        _say("start-up, with an empty and a full compilation cache")
        results["startup"] = measure_startup(options.model, hf_python, allowed)
        print(_startup_table(results["startup"]), flush=True)
    results["machine"]["load_average_after"] = os.getloadavg()[0]
    write_json(options.json, results)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.engine", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="where results go")
    parser.add_argument("--model", default=str(shipped_model()), help="model folder (default: the larger shipped one)")
    parser.add_argument("--batches", type=_numbers, default=[1, 4, 16, 64], help="batch sizes (default: 1,4,16,64)")
    parser.add_argument("--cores", type=_numbers, default=[1, 2], help="numbers of cores to pin to (default: 1,2)")
    parser.add_argument("--output-tokens", type=int, default=64, help="tokens of each output (default: 64)")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each figure (default: 3)")
    parser.add_argument("--requests", type=int, default=64, help="of the mixed load; 0 leaves it out (default: 64)")
    parser.add_argument("--no-hf", action="store_true", help="measures the engine alone")
    parser.add_argument("--no-startup", action="store_true", help="leaves out start-up times")
    parser.add_argument("--hf-python", help="a Python with torch and transformers, instead of making an environment")
    options = parser.parse_args(arguments)
    if options.repeats < 1 or options.output_tokens < 8 or min(options.batches + options.cores) < 1:
        parser.error("--repeats, --batches and --cores must be at least 1, --output-tokens at least 8")
    options.model = str(Path(options.model).resolve())
    return options


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _hf_python(options: argparse.Namespace, results: dict[str, Any]) -> str | None:
    if options.no_hf:
        results["hf"] = {"skipped": "--no-hf"}
        return None
    try:
        python = options.hf_python or str(hf_environment.ensure(ROOT / "build" / "bench-hf", _say))
    except hf_environment.EnvironmentUnavailableError as error:
        _say(f"Hugging Face transformers is left out: {error}")
        results["hf"] = {"skipped": str(error)}
        return None
    results["hf"] = {"requirements": hf_environment.REQUIREMENTS}
    return str(python)


def _measure(
    options: argparse.Namespace, hf_python: str | None, vocab_size: int, cores: Sequence[int]
) -> dict[str, Any]:
    """All figures with every process on `cores`."""
    _say(f"cores {','.join(map(str, cores))}: starting")
    sides: list[Side] = []
    try:
        # Threads beyond two are no use to models of this size.
        for threads in range(1, min(len(cores), 2) + 1):
            sides.append(start_ours(options.model, {"max_num_seqs": max(options.batches)}, cores, threads))
            if hf_python is not None:
                sides.append(start_hf(hf_python, options.model, cores, threads))
        results: dict[str, Any] = {"loaded": [_loaded(side) for side in sides]}
        results["batches"] = _batches(options, sides, vocab_size)
        print(_batch_table(len(cores), results["batches"]), flush=True)
        results["long_prompts"] = _long_prompts(options, sides, vocab_size)
        print(_long_table(len(cores), results["long_prompts"]), flush=True)
        results["steps"] = _steps(options, sides, vocab_size)
        print(_step_table(len(cores), results["steps"]), flush=True)
        if options.requests:
            results["mixed"] = _mixed(options, sides, vocab_size)
            print(_mixed_table(len(cores), results["mixed"]), flush=True)
        return results
    finally:
        for side in sides:
            side.worker.close()


def _loaded(side: Side) -> dict[str, Any]:
    return {"side": side.kind, "threads": side.threads, **side.loaded}


def _batches(options: argparse.Namespace, sides: Sequence[Side], vocab_size: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    steps = options.output_tokens - 1
    for batch in options.batches:
        works = (f"{batch}x1", 1), (f"{batch}x{options.output_tokens}", options.output_tokens)
        for side in sides:
            side.warm_up(prompts(batch, _PROMPT, vocab_size, 1))
        agreed = []
        for repeat in range(options.repeats):
            for work, new_tokens in reversed(works):
                # New prompts each time, else the prefix cache would answer.
                asked = prompts(batch, _PROMPT, vocab_size, 1000 * new_tokens + repeat)
                answers = [
                    side.measure(work, "generate", f"batch {batch}", prompts=asked, new_tokens=new_tokens)
                    for side in sides
                    if not (repeat and side.is_far_slower(works[1][0], sides))
                ]
                agreed.append(all(answer["first"] == answers[0]["first"] for answer in answers))
        first, last = works[0][0], works[1][0]
        results[str(batch)] = {
            "sides": [
                {
                    "side": side.kind,
                    "threads": side.threads,
                    "seconds": {"one_token": side.times[first], "all_tokens": side.times[last]},
                    **({"cache": side.caches[f"batch {batch}"]} if side.kind == HF else {}),
                    **_rates("prefill", batch * _PROMPT, side.best(first), side.median(first)),
                    **_rates(
                        "decode",
                        batch * steps,
                        side.best(last) - side.best(first),
                        side.median(last) - side.median(first),
                    ),
                }
                for side in sides
            ],
            "repeats_with_equal_tokens": [sum(agreed), len(agreed)],
        }
        results[str(batch)]["ratio"] = _ratios(results[str(batch)]["sides"], ("prefill", "decode"))
    return results


def _long_prompts(options: argparse.Namespace, sides: Sequence[Side], vocab_size: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for batch in _LONG_BATCHES:
        work = f"{batch}x{options.long_prompt}"
        for side in sides:
            side.warm_up(prompts(batch, options.long_prompt, vocab_size, 2))
        for repeat in range(options.repeats):
            asked = prompts(batch, options.long_prompt, vocab_size, 5000 + repeat)
            for side in sides:
                if side.is_far_slower(work, sides):
                    continue
                side.measure(work, "generate", work, prompts=asked, new_tokens=1)
        figures = [
            {
                "side": side.kind,
                "threads": side.threads,
                "seconds": side.times[work],
                **_rates("prefill", batch * options.long_prompt, side.best(work), side.median(work)),
            }
            for side in sides
        ]
        results[f"{batch} x {options.long_prompt}"] = {"sides": figures, "ratio": _ratios(figures, ("prefill",))}
    return results


def _steps(options: argparse.Namespace, sides: Sequence[Side], vocab_size: int) -> list[dict[str, Any]]:
    """Where the engine's decode steps spend their time."""
    rows = []
    for side in sides:
        for batch in options.batches if side.kind == OURS else ():
            row: dict[str, Any] = {"threads": side.threads, "batch": batch}
            for name, blocking in (("overlapped", False), ("blocking", True)):
                # The longest-lived prompt must find its peers still decoding: outputs are as long as a full prefill.
                tokens = _PROFILE_TOKENS + batch
                asked = prompts(batch, _PROMPT, vocab_size, 7000 + blocking)
                row[name] = side.worker.ask("profile", prompts=asked, new_tokens=tokens, blocking=blocking)
            rows.append(row)
    return rows


def _mixed(options: argparse.Namespace, sides: Sequence[Side], vocab_size: int) -> dict[str, Any]:
    def items(seed: int, within: float) -> list[dict[str, Any]]:
        lengths = mixed_load(options.requests, vocab_size, seed=0, arrive_within=within)
        fresh = mixed_load(options.requests, vocab_size, seed=seed, prompt_range=(512, 512))
        # The same lengths and arrivals in each repeat, but other tokens: nothing comes from the prefix cache.
        return [
            asdict(LoadItem(one.arrival, other.prompt[: len(one.prompt)], one.output))
            for one, other in zip(lengths, fresh, strict=True)
        ]

    ours = next(side for side in sides if side.kind == OURS)
    within = 0.1 * ours.worker.ask("mixed", items=items(100, 0.0))["seconds"]
    tokens = sum(item["output"] for item in items(0, within))
    results: dict[str, Any] = {"requests": options.requests, "output_tokens": tokens, "arrive_within": within}
    for repeat in range(options.repeats):
        for side in sides:
            if side.is_far_slower("mixed", sides):
                continue
            more = {"batch": _STATIC_BATCH} if side.kind == HF else {}
            side.measure("mixed", "mixed", f"batch {max(options.batches)}", items=items(repeat, within), **more)
    results["sides"] = [
        {
            "side": side.kind,
            "threads": side.threads,
            "seconds": side.times["mixed"],
            **({"cache": side.caches[f"batch {max(options.batches)}"]} if side.kind == HF else {}),
            **_rates("output", tokens, side.best("mixed"), side.median("mixed")),
            **{
                f"{name}_seconds": percentiles(values)
                for name, values in side.extra["mixed"].items()
                if isinstance(values, list)
            },
        }
        for side in sides
    ]
    results["ratio"] = _ratios(results["sides"], ("output",))
    return results


def _rates(name: str, tokens: int, best: float, median: float) -> dict[str, Any]:
    return {f"{name}_tokens_per_second": {"best": tokens / best, "median": tokens / median}}


def _ratios(sides: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, Any] | None:
    """Our rate over theirs, each side with its better number of threads; None without the other side."""
    if not any(side["side"] == HF for side in sides):
        return None
    return {
        name: {
            figure: _top(sides, OURS, name, figure)[0] / _top(sides, HF, name, figure)[0]
            for figure in ("best", "median")
        }
        for name in names
    }


def _top(sides: Sequence[dict[str, Any]], kind: str, name: str, figure: str) -> tuple[float, int]:
    """Highest rate of a side, and its number of threads."""
    return max((side[f"{name}_tokens_per_second"][figure], side["threads"]) for side in sides if side["side"] == kind)


# Tables.


def _rate_cells(entry: dict[str, Any], name: str) -> list[object]:
    ours, threads = _top(entry["sides"], OURS, name, "best")
    cells: list[object] = [ours, _top(entry["sides"], OURS, name, "median")[0], threads]
    if entry["ratio"] is None:
        return [*cells, None, None, None, None, None]
    theirs, threads = _top(entry["sides"], HF, name, "best")
    ratio = entry["ratio"][name]
    return [*cells, theirs, _top(entry["sides"], HF, name, "median")[0], threads, ratio["best"], ratio["median"]]


_RATE_HEAD = ("ours best", "median", "threads", "HF best", "median", "threads", "ratio best", "median")


def _batch_table(cores: int, batches: dict[str, Any]) -> str:
    rows = [
        [f"{name} batch {batch}", *_rate_cells(entry, name)]
        for name in ("prefill", "decode")
        for batch, entry in batches.items()
    ]
    return table((f"{cores} core(s), tokens/s", *_RATE_HEAD), rows) + "\n"


def _long_table(cores: int, entries: dict[str, Any]) -> str:
    rows = [[f"prefill {size}", *_rate_cells(entry, "prefill")] for size, entry in entries.items()]
    return table((f"{cores} core(s), tokens/s", *_RATE_HEAD), rows) + "\n"


def _step_table(cores: int, rows: Sequence[dict[str, Any]]) -> str:
    names: tuple[str, ...] = (
        "step_wall_ms",
        "step_cpu_ms",
        "loop_cpu_ms",
        "front_cpu_ms",
        "calls_cpu_ms",
        "wait_wall_ms",
    )
    body = []
    for row in rows:
        programs = row["blocking"]["programs"]
        body.append(
            [
                f"batch {row['batch']}, {row['threads']} thread(s)",
                *(row["overlapped"][name] for name in names),
                *(programs.get(name, {}).get("until_ready_ms") for name in ("decode", "sample")),
            ]
        )
    head = (f"{cores} core(s), decode step", *names, "decode alone ms", "sample alone ms")
    return table(head, body) + "\n"


def _mixed_table(cores: int, mixed: dict[str, Any]) -> str:
    rows = [
        [
            f"{side['side']}, {side['threads']} thread(s)",
            min(side["seconds"]),
            side["output_tokens_per_second"]["best"],
            side["output_tokens_per_second"]["median"],
            side["latencies_seconds"]["mean"],
        ]
        for side in mixed["sides"]
    ]
    lines = table(
        (f"{cores} core(s), mixed load", "best s", "tokens/s best", "median", "mean request s"), rows
    ).splitlines()
    if mixed["ratio"] is not None:
        ratio = mixed["ratio"]["output"]
        lines.append(f"ratio: best {ratio['best']:.2f}, median {ratio['median']:.2f}")
    return "\n".join(lines) + "\n"


def _startup_table(startup: dict[str, Any]) -> str:
    names = ("process_to_loaded", "process_to_first_token", "process_to_all_shapes", "programs")
    return table(("start-up, s", *names), [[kind, *map(row.get, names)] for kind, row in startup.items()]) + "\n"


def _say(text: str) -> None:
    print(f"# {text}", flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except WorkerError as error:
        sys.exit(f"bench.engine: {error}")
