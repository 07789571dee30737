"""From a model folder to one of a pruned model, whatever prunes it: text, resumption, perplexities, the report."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32
from tqdm import tqdm

from jaxdual.config import EngineConfig
from jaxdual.model_folder import find_model
from jaxdual.offline.report import write_report
from jaxdual.pruning.calibration import LENGTH, finite_perplexity, perplexity, split_windows
from jaxdual.pruning.unfinished import OfLayer, UnfinishedRun
from jaxdual.result_files import check_writable
from jaxdual.tokenizer import Tokenizer
from models import Decoder, load, save
from models.checkpoint import stored_dtype
from models.convert import OF_WEIGHTS, copy_other_files
from models.fingerprint import model_fingerprint
from models.shapes import parameters_of


class Job[Record: OfLayer](Protocol):
    """A way to prune models.

    Attributes:
      record: the type of what is told of each layer, a dataclass.
      settings: what the result depends on besides model and text, for JSON.
    """

    record: type[Record]
    settings: dict[str, Any]

    def check(self, model: Decoder, windows: int, tokens: int) -> None:
        """Raises `ValueError` if a model can't be pruned so with so many windows, and tokens, of text."""

    def prepare(self, model: Decoder, windows: Int32[np.ndarray, "N L"]) -> Any:
        """What has to be known of the whole model, before the layers that are done are put into it."""

    def prune(
        self,
        model: Decoder,
        windows: Int32[np.ndarray, "N L"],
        prepared: Any,
        first: int,
        done: Callable[[Record], None],
    ) -> Decoder:
        """Prunes the layers from `first` on, telling of each; returns the pruned model."""

    def outcome(
        self, told: Sequence[Record], before: dict[str, Any], after: dict[str, Any]
    ) -> tuple[dict[str, Any], str]:
        """What the report has besides, and a sentence; of `sizes_of` the model before and after."""


def prune_folder[Record: OfLayer](job: Job[Record], options: argparse.Namespace) -> int:
    """Runs the command; its exit status.

    Args:
      job: how.
      options: of `python -m jaxdual.pruning`.

    Raises:
      ValueError: a call that can't work; nothing has been written then.
    """
    if options.report is not None:
        check_writable(options.report)
    folder, name = find_model(EngineConfig(model=options.model))
    model, dtype = load(folder, dtype="float32"), stored_dtype(folder)
    longest = model.config.max_position_embeddings
    job.check(model, options.sequences, options.sequences * (options.length or min(LENGTH, longest)))
    windows, held_out = split_windows(
        options.calibration,
        Tokenizer.from_dir(folder),
        sequences=options.sequences,
        length=options.length,
        longest=longest,
    )
    settings = job.settings | {
        "model": model_fingerprint(folder, "float32").hex(),
        "calibration": hashlib.blake2b(windows.tobytes(), digest_size=16).hexdigest(),
    }
    run = UnfinishedRun(job.record, options.out, settings)
    begin = time.perf_counter()
    before, dense = sizes_of(model, dtype), finite_perplexity(model, held_out)
    prepared = job.prepare(model, windows)
    told = run.resume(model)
    with tqdm(total=len(model.layers), initial=len(told), unit=" layers", disable=options.no_progress) as bar:

        def done(layer: Record) -> None:
            run.keep(model, layer)
            told.append(layer)
            bar.update()

        pruned = job.prune(model, windows, prepared, len(told), done)
    after, sparse = sizes_of(pruned, dtype), perplexity(pruned, held_out)
    save(pruned, options.out, dtype)
    copy_other_files(folder, options.out, but=OF_WEIGHTS)
    outcome, sentence = job.outcome(told, before, after)
    report = settings | {
        "model": name,
        "fingerprint": settings["model"],
        "family": pruned.config.family,
        "calibration_tokens": int(windows.size),
        "held_out_tokens": int(held_out.size),
        "perplexity": {"dense": dense, "pruned": sparse},
        "dense": before,
        "pruned": after,
        "seconds": time.perf_counter() - begin,
        "layers": [dataclasses.asdict(layer) for layer in told],  # type: ignore[call-overload]
    }
    if options.report is not None:
        write_report(options.report, report | outcome)
    run.remove()
    print(
        f"{options.out}: {sentence}, in a {pruned.config.family} model; perplexity of held-out text "
        f"{dense:.3f} before, {sparse:.3f} after"
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
