"""`python -m jaxdual.pruning --model DIR --method wanda --pattern 2:4 --calibration FILE --out DIR`: prunes a model."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jaxdual.arguments import run_command, whole
from jaxdual.config import EngineConfig
from jaxdual.model_folder import find_model
from jaxdual.offline.report import write_report
from jaxdual.pruning.calibration import LENGTH, SEQUENCES, finite_perplexity, perplexity, split_windows
from jaxdual.pruning.induction.options import add_induction, induction_of
from jaxdual.pruning.layer import Plan
from jaxdual.pruning.methods import METHODS, UPDATES
from jaxdual.pruning.pattern import Pattern
from jaxdual.pruning.run import PrunedLayer, check, prune_model
from jaxdual.pruning.structured.command import OF_SOURCE, STRUCTURED, prune_structured_folder
from jaxdual.pruning.structured.plan import WIDTHS
from jaxdual.pruning.unfinished import UnfinishedRun
from jaxdual.result_files import check_writable
from jaxdual.tokenizer import Tokenizer
from models import load, save
from models.checkpoint import stored_dtype
from models.convert import copy_other_files
from models.fingerprint import model_fingerprint

_PROG = "python -m jaxdual.pruning"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = _parser().parse_args(arguments)
    stopped = f"{_PROG}: interrupted; the same call goes on with the layer that it was in"
    run = prune_structured_folder if options.method == STRUCTURED else _prune
    return run_command(_PROG, lambda: run(options), stopped=stopped)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=_PROG, description="Leaves weights of a model out, chosen on text.")
    parser.add_argument("--model", required=True, metavar="DIR", help="model folder, or a name on the hub")
    parser.add_argument("--method", required=True, choices=(*METHODS, STRUCTURED), help="how weights are chosen")
    parser.add_argument("--pattern", required=True, help="share that goes, as 0.5, N:M: N of M stay, or 0.5@64: blocks")
    parser.add_argument(
        "--update", choices=UPDATES, help="what is done behind the method, with the choice that it made"
    )
    parser.add_argument("--shift", action="store_true", help="biases make up for the means of what outputs lose")
    parser.add_argument("--calibration", required=True, type=Path, metavar="FILE", help="text, UTF-8")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="new folder of the model")
    parser.add_argument("--report", type=Path, metavar="FILE.json", help="perplexities, and each matrix")
    parser.add_argument(
        "--sequences", type=whole(1), default=SEQUENCES, metavar="N", help="windows of text; default %(default)s"
    )
    parser.add_argument(
        "--length", type=whole(2), metavar="TOKENS", help=f"of a window; default {LENGTH}, or the model's"
    )
    structured = parser.add_argument_group(
        "structured", "whole neurons go, of mixtures experts; the pattern is a share of these"
    )
    structured.add_argument(
        "--kv-groups", type=whole(0), default=0, metavar="N", help="KV heads that go from each layer"
    )
    structured.add_argument("--widths", choices=WIDTHS, default="even", help="neurons of each layer; default even")
    add_induction(parser)
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    return parser


def _prune(options: argparse.Namespace) -> int:
    plan = _plan(options)
    if options.report is not None:
        check_writable(options.report)
    folder, name = find_model(EngineConfig(model=options.model))
    model = load(folder, dtype="float32")
    check(model, plan, options.sequences)
    windows, held_out = split_windows(
        options.calibration,
        Tokenizer.from_dir(folder),
        sequences=options.sequences,
        length=options.length,
        longest=model.config.max_position_embeddings,
    )
    settings: dict[str, Any] = {
        "model": model_fingerprint(folder, "float32").hex(),
        "method": options.method,
        "pattern": str(plan.pattern),
        "update": options.update,
        "induction": None if plan.induction is None else dataclasses.asdict(plan.induction),
        "shift": plan.shift,
        "calibration": hashlib.blake2b(windows.tobytes(), digest_size=16).hexdigest(),
    }
    run = UnfinishedRun(PrunedLayer, options.out, settings)
    begin = time.perf_counter()
    dense = finite_perplexity(model, held_out)
    pruned = run.resume(model)
    first = len(pruned)
    with tqdm(total=len(model.layers), initial=first, unit=" layers", disable=options.no_progress) as bar:

        def done(layer: PrunedLayer) -> None:
            run.keep(model, layer)
            pruned.append(layer)
            bar.update()

        prune_model(model, windows, plan, first=first, done=done)
    sparse = perplexity(model, held_out)
    save(model, options.out, stored_dtype(folder))
    copy_other_files(folder, options.out, but=OF_SOURCE)
    matrices = [one for layer in pruned for one in layer.matrices]
    removed, weights = sum(one.removed for one in matrices), sum(one.weights for one in matrices)
    report = settings | {
        "model": name,
        "fingerprint": settings["model"],
        "calibration_tokens": int(windows.size),
        "held_out_tokens": int(held_out.size),
        "perplexity": {"dense": dense, "pruned": sparse},
        "sparsity": removed / weights,
        "seconds": time.perf_counter() - begin,
        "layers": [dataclasses.asdict(layer) for layer in pruned],
    }
    if options.report is not None:
        write_report(options.report, report)
    run.remove()
    print(
        f"{options.out}: {removed} of {weights} weights in {len(matrices)} matrices are 0 ({removed / weights:.1%}); "
        f"perplexity of held-out text {dense:.3f} before, {sparse:.3f} after"
    )
    return 0


def _plan(options: argparse.Namespace) -> Plan:
    if options.kv_groups or options.widths != "even":
        raise ValueError(f"--kv-groups and --widths are of --method {STRUCTURED}, and the method is {options.method}")
    pattern = Pattern.parse(options.pattern)
    return Plan(
        METHODS[options.method],
        pattern,
        None if options.update is None else UPDATES[options.update],
        induction_of(options, default="none" if pattern.block else "score"),
        options.shift,
    )


if __name__ == "__main__":
    sys.exit(main())
