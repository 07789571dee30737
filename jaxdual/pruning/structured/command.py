"""`python -m jaxdual.pruning --method structured`: from a model folder to one of a smaller model."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import time
from typing import Any

import jax.numpy as jnp
from tqdm import tqdm

from jaxdual.config import EngineConfig
from jaxdual.model_folder import find_model
from jaxdual.offline.report import write_report
from jaxdual.pruning.calibration import LENGTH, finite_perplexity, perplexity, split_windows
from jaxdual.pruning.induction.options import induction_of
from jaxdual.pruning.induction.training import check_windows
from jaxdual.pruning.structured.plan import Structure
from jaxdual.pruning.structured.run import SmallerLayer, chosen_widths, prune_structured
from jaxdual.pruning.unfinished import UnfinishedRun
from jaxdual.result_files import check_writable
from jaxdual.tokenizer import Tokenizer
from models import Decoder, load, save
from models.checkpoint import stored_dtype
from models.convert import copy_other_files
from models.fingerprint import model_fingerprint
from models.shapes import parameters_of

STRUCTURED = "structured"
# Files of a model folder that speak of the source's weights.
OF_SOURCE = ("README.md", "metrics.json", "config.json")


def prune_structured_folder(options: argparse.Namespace) -> int:
    """Runs the command; its exit status.

    Raises:
      ValueError: a call that can't work; nothing has been written then.
    """
    structure = Structure.parse(
        options.pattern, kv_groups=options.kv_groups, widths=options.widths, shift=options.shift
    )
    if options.update is not None:
        raise ValueError(f"--update {options.update} is not of --method {STRUCTURED}, which has its own")
    induction = induction_of(options, default="none")
    if induction is not None and induction.mode != "score":
        raise ValueError(f"--si {induction.mode}: with --method {STRUCTURED} scales count in the choice alone: score")
    if options.report is not None:
        check_writable(options.report)
    folder, name = find_model(EngineConfig(model=options.model))
    model = load(folder, dtype="float32")
    longest = model.config.max_position_embeddings
    if induction is not None:
        check_windows(options.sequences, induction.batch)
    structure.check_learning(model.config, scales=induction is not None)
    structure.check(model.config, options.sequences * (options.length or min(LENGTH, longest)))
    windows, held_out = split_windows(
        options.calibration,
        Tokenizer.from_dir(folder),
        sequences=options.sequences,
        length=options.length,
        longest=longest,
    )
    settings: dict[str, Any] = {
        "model": model_fingerprint(folder, "float32").hex(),
        "method": STRUCTURED,
        "structure": dataclasses.asdict(structure),
        "induction": None if induction is None else dataclasses.asdict(induction),
        "calibration": hashlib.blake2b(windows.tobytes(), digest_size=16).hexdigest(),
    }
    run = UnfinishedRun(SmallerLayer, options.out, settings)
    begin, dtype = time.perf_counter(), stored_dtype(folder)
    before = sizes_of(model, dtype) | {"perplexity": finite_perplexity(model, held_out)}
    # Of the whole model, which the layers that are done are not put into yet.
    widths = chosen_widths(model, windows, structure)
    told = run.resume(model)
    with tqdm(total=len(model.layers), initial=len(told), unit=" layers", disable=options.no_progress) as bar:

        def done(layer: SmallerLayer) -> None:
            run.keep(model, layer)
            told.append(layer)
            bar.update()

        first = len(told)
        smaller = prune_structured(model, windows, structure, widths, first=first, done=done, induction=induction)
    after = sizes_of(smaller, dtype) | {"perplexity": perplexity(smaller, held_out)}
    save(smaller, options.out, dtype)
    copy_other_files(folder, options.out, but=OF_SOURCE)
    report = settings | {
        "model": name,
        "fingerprint": settings["model"],
        "family": smaller.config.family,
        "calibration_tokens": int(windows.size),
        "held_out_tokens": int(held_out.size),
        "perplexity": {"dense": before.pop("perplexity"), "pruned": after.pop("perplexity")},
        "dense": before,
        "pruned": after,
        "seconds": time.perf_counter() - begin,
        "layers": [dataclasses.asdict(layer) for layer in told],
    }
    if options.report is not None:
        write_report(options.report, report)
    run.remove()
    print(
        f"{options.out}: {after['parameters']} of {before['parameters']} parameters stay "
        f"({after['parameters'] / before['parameters']:.1%}), in a {smaller.config.family} model; perplexity of "
        f"held-out text {report['perplexity']['dense']:.3f} before, {report['perplexity']['pruned']:.3f} after"
    )
    return 0


def sizes_of(model: Decoder, dtype: str) -> dict[str, Any]:
    """Parameters of a model, their bytes in the stored type, and those of a token's keys and values in it."""
    config, size = model.config, jnp.dtype(dtype).itemsize
    parameters = sum(value.size for value in parameters_of(model).values())
    return {
        "parameters": parameters,
        "weight_bytes": parameters * size,
        "kv_bytes_per_token": 2 * config.num_layers * config.num_kv_heads * config.head_dim * size,
    }
