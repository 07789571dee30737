"""`python -m bench.longcontext`: tasks that need a long context, by ways to decode, on the same items.

Path walking, multi-key needles and MRCR-like chats, made from a seed, are answered greedily: as always ("vanilla"),
with all attention logits divided by one temperature ("uniform"), by DySCO with retrieval heads ("dysco"), with 32
tokens selected at most ("dysco_32"), with as many other heads ("random", in five draws) and with one selection for
good ("static"), and in its cheaper modes, by their names. Means and differences to vanilla come with 95 % bootstrap
intervals over items. Without `--model` it is the retrieval model that ships, in its own words.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.longcontext.arms import ARMS, BASELINE, Arm, Heads, Setting
from bench.longcontext.heads import described, detect_heads
from bench.longcontext.intervals import Figure, compare
from bench.longcontext.items import FORMS
from bench.longcontext.measure import Cell, figures_of, make_cell, selected, times_of
from bench.longcontext.prompts import Prompts
from bench.longcontext.tables import arm_table, selection_table, time_table
from bench.longcontext.tasks import TASKS
from bench.longcontext.uniform import scaled_copy
from bench.report import header, write_json
from jaxdual import LLM
from jaxdual.arguments import above_0, whole
from jaxdual.decoding.profiles import read_profile
from jaxdual.model_folder import shipped_model
from models import load_config, resolve

_DETECTION_ITEMS, _DETECTION_LINES = 64, 40
_DEFAULT_TASKS = ("needle", "needle_multi", "needle_hops", "path", "path_step")
_LENGTHS = (512, 1024, 2048)
_COUNT, _QUICK_COUNT = 200, 8
_TIMED, _SELECTIONS = 8, 16
_TOP, _TOP_SHIPPED = 16, 2  # heads; in the shipped model two score ten times as high as the next


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.heads is not None and options.profile is not None:
        parser.error("--heads and --profile exclude each other")
    if options.count is None:
        options.count = _QUICK_COUNT if options.quick else _COUNT
    if options.top is None:
        options.top = _TOP_SHIPPED if options.model is None else _TOP
    try:
        _run(options)
    except ValueError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.longcontext", description=__doc__)
    parser.add_argument("--model", metavar="DIR", help="a folder, or a name on the hub; default the retrieval model")
    parser.add_argument("--form", choices=FORMS, help='of items; "words" without --model, "full" with one')
    parser.add_argument("--tasks", type=_names(TASKS), default=list(_DEFAULT_TASKS), help=f"of {', '.join(TASKS)}")
    parser.add_argument(
        "--lengths", type=_lengths, default=list(_LENGTHS), metavar="N,N", help="of prompts, in tokens; 512,1024,2048"
    )
    parser.add_argument("--count", type=whole(0), metavar="N", help=f"items of a task at a length; {_COUNT}")
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N", help="of items and draws")
    parser.add_argument(
        "--arms",
        type=_names({arm.name: arm for arm in ARMS}),
        default=[arm.name for arm in ARMS],
        help="all if not given",
    )
    parser.add_argument("--heads", type=_heads, metavar="JSON", help="retrieval heads, as [[layer, head], ...]")
    parser.add_argument("--profile", metavar="NAME", help="a profile that has them; by default they are detected")
    parser.add_argument(
        "--top", type=whole(0), metavar="N", help=f"heads that are taken of those detected; {_TOP}, without --model 2"
    )
    parser.add_argument("--strength", type=above_0, help="of DySCO, in all arms that have it; default as DyscoParams")
    parser.add_argument("--top-k", type=whole(0), help="likewise")
    parser.add_argument("--top-p", type=above_0, help="likewise")
    parser.add_argument("--temperature", type=above_0, default=0.95, help='of the arm "uniform"; 0.95')
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--max-num-seqs", type=whole(0), default=16, metavar="N", help="requests at once; 16")
    parser.add_argument("--chat-template-kwargs", type=json.loads, default={}, metavar="JSON")
    parser.add_argument("--no-times", action="store_true", help="replies alone")
    parser.add_argument("--quick", action="store_true", help=f"{_QUICK_COUNT} items of each, to see that it works")
    parser.add_argument("--json", metavar="FILE", help="written anew after each task and length")
    return parser


def _run(options: argparse.Namespace) -> None:
    folder = shipped_model("retrieval") if options.model is None else resolve(options.model)
    form = options.form or ("words" if options.model is None else "full")
    report = header("bench.longcontext")
    config = load_config(folder)
    heads = _retrieval_heads(options, folder, form, report)
    limits = {name: getattr(options, name) for name in ("strength", "top_k", "top_p")}
    setting = Setting(
        heads,
        config.num_layers,
        config.num_heads,
        options.seed,
        {name: value for name, value in limits.items() if value is not None},
    )
    arms = [arm for arm in ARMS if arm.name in options.arms]
    report |= {
        "model": folder.name,
        "form": form,
        "seed": options.seed,
        "heads": [list(head) for head in heads],
        "random_heads": [[list(head) for head in setting.random_heads(draw)] for draw in range(5)],
        "limits": dict(setting.limits),
        "temperature": options.temperature,
        "cells": [],
    }
    if options.count < _COUNT:
        print(f"{options.count} items of each task and length, where {_COUNT} are wanted: intervals are wide")
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / folder.name
        if any(arm.uniform for arm in arms):
            scaled_copy(folder, copy, options.temperature, options.dtype)
        for length in options.lengths:
            _measure_length(options, folder, copy, form, length, arms, setting, report)
    for table in (arm_table(report), selection_table(report), time_table(report)):
        print(f"\n{table}")


def _measure_length(
    options: argparse.Namespace,
    folder: Path,
    copy: Path,
    form: Any,
    length: int,
    arms: Sequence[Arm],
    setting: Setting,
    report: dict[str, Any],
) -> None:
    """All tasks at a length, in engines that are made for it: a step takes as long as the longest prompt there may be.

    Args:
      copy: the model folder of the arm "uniform".
    """
    tasks = [TASKS[name] for name in options.tasks]
    replies = max(item.max_tokens for task in tasks for item in task.items(4, task.smallest, form, options.seed))
    limit = min(length + replies, load_config(folder).max_position_embeddings)
    figures: dict[str, dict[str, dict[str, Figure]]] = {}
    plain, scaled = ([arm for arm in arms if arm.uniform is uniform] for uniform in (False, True))
    with _engine(folder, options, max_model_len=limit) as llm:
        prompts = Prompts(llm, options.chat_template_kwargs)
        cells = [make_cell(task, length, options.count, form, options.seed, prompts) for task in tasks]
        for cell in cells:
            report["cells"].append(cell.described | {"figures": {}, "selection": {}, "times": {}})
            for arm in plain:
                _add(report, cell, arm, figures_of(llm, cell, arm, setting), figures, options)
                chosen = selected(llm, cell, arm, setting, prompts, min(_SELECTIONS, options.count))
                if chosen is not None:
                    _entry(report, cell)["selection"][arm.name] = chosen
    if scaled:
        with _engine(copy, options, max_model_len=limit) as llm:
            for cell, arm in itertools.product(cells, scaled):
                _add(report, cell, arm, figures_of(llm, cell, arm, setting), figures, options)
    if not options.no_times:
        with _engine(folder, options, max_model_len=limit, enable_prefix_caching=False) as llm:
            for cell, arm in itertools.product(cells, plain):
                times = times_of(llm, cell, arm, setting, min(_TIMED, options.count))
                _entry(report, cell)["times"][arm.name] = times
    write_json(options.json, report)


def _add(
    report: dict[str, Any],
    cell: Cell,
    arm: Arm,
    found: dict[str, Figure],
    figures: dict[str, dict[str, dict[str, Figure]]],
    options: argparse.Namespace,
) -> None:
    """Puts an arm's figures into the report, and says the main one."""
    of_cell = figures.setdefault(cell.name, {})
    for name, figure in found.items():
        of_cell.setdefault(name, {})[arm.name] = figure
    entry = _entry(report, cell)
    entry["figures"] = {name: compare(of_arm, BASELINE.name, options.seed) for name, of_arm in of_cell.items()}
    main_figure = next(iter(found))
    print(f"{cell.name:<20}  {arm.name:<10}  {main_figure} {found[main_figure].mean:.3f}", flush=True)
    write_json(options.json, report)


def _entry(report: dict[str, Any], cell: Cell) -> dict[str, Any]:
    (entry,) = (one for one in report["cells"] if (one["task"], one["length"]) == (cell.task.name, cell.length))
    return entry  # type: ignore[no-any-return]


def _retrieval_heads(options: argparse.Namespace, folder: Path, form: Any, report: dict[str, Any]) -> Heads:
    """Those given, of a profile, or detected."""
    if options.heads is not None:
        report["heads_from"] = "given"
        return list(options.heads)
    if options.profile is not None:
        report["heads_from"] = options.profile
        return list(read_profile(options.profile).heads)
    count = min(_DETECTION_ITEMS, 4 * options.count)
    detection = detect_heads(
        folder,
        count=count,
        lines=_DETECTION_LINES,
        form=form,
        seed=options.seed,
        template_vars=options.chat_template_kwargs,
        dtype=options.dtype,
    )
    heads = detection.ranking("sum")[: options.top]
    report["heads_from"] = {"items": count, "lines": _DETECTION_LINES, **described(detection, heads, options.seed)}
    print(f"retrieval heads by {count} needle items: {heads}")
    return heads


@contextmanager
def _engine(folder: Path, options: argparse.Namespace, **settings: Any) -> Iterator[LLM]:
    """An engine that is gone afterwards, its memory too."""
    llm = LLM(folder, dtype=options.dtype, max_num_seqs=options.max_num_seqs, seed=options.seed, **settings)
    try:
        yield llm
    finally:
        llm.close()
        del llm
        gc.collect()


def _names(known: Any) -> Any:
    def read(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",")]
        unknown = [name for name in names if name not in known]
        if unknown or len(set(names)) < len(names):
            raise argparse.ArgumentTypeError(f"{text!r} must be different ones of {', '.join(known)}")
        return names

    return read


def _lengths(text: str) -> list[int]:
    return sorted({whole(0)(part) for part in text.split(",")})


def _heads(text: str) -> list[tuple[int, int]]:
    try:
        return [(int(layer), int(head)) for layer, head in json.loads(text)]
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r} must be a JSON list of [layer, head]") from None


if __name__ == "__main__":
    sys.exit(main())
