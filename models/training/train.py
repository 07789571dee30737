"""Trains one of the shipped models on the standard library's source and writes its folder.

A killed run goes on with ``--resume``. When its budget is used the folder holds a complete model: bf16 weights,
configuration, tokenizer, ``metrics.json`` and the model card.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32
from tokenizers import Tokenizer

import models
from models import Decoder
from models.shapes import parameters_of
from models.training import corpus, tokenizer
from models.training.card import PROMPTS, model_card
from models.training.data import WindowStream
from models.training.evaluate import STRIDE, WINDOW, baselines, bits_per_byte, complete
from models.training.recipes import CONFIGS, RECIPES
from models.training.records import record, write_record
from models.training.run import Budget, Progress, run
from models.training.state import TrainState

STATE_FOLDER = "state"
_SLICE_WINDOWS = 16
_SAMPLE_TOKENS = 96


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's text and ``--help``."""
    args = _parser().parse_args(argv)
    config, recipe = CONFIGS[args.size], RECIPES[args.size]
    if args.intermediate_size is not None:
        config = replace(config, intermediate_size=args.intermediate_size)
    started = time.process_time()
    try:
        train, heldout = (corpus.read_texts(split, allow_changed=args.allow_changed) for split in ("train", "heldout"))
    except corpus.CorpusChangedError as error:
        print(error, file=sys.stderr)
        return 2
    entries = tokenizer.load(args.tokenizer) if args.tokenizer else tokenizer.train(train.values())
    tokenizer.save(entries, args.out)
    data = WindowStream(entries, train, recipe.seed)
    windows, bits_per_nat = heldout_slice(entries, heldout, recipe.length)

    def report(progress: Progress, state: TrainState) -> None:
        print(progress_line(progress, bits_per_nat), flush=True)

    budget = Budget(cpu_seconds=60 * args.cpu_minutes) if args.steps is None else Budget(steps=args.steps)
    try:
        model, state = run(
            config, recipe, budget, data, windows, args.out / STATE_FOLDER, resume=args.resume, report=report
        )
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    write_folder(model, args.out)
    metrics = {
        **record(args.size, config, recipe, state),
        "budget_cpu_minutes": args.cpu_minutes if args.steps is None else None,
        "corpus_python": corpus.load_manifest().python,
        **measure(args.out, entries, train, heldout),
    }
    write_record(args.out, metrics, model_card)
    used = (time.process_time() - started) / 60
    print(
        f"{args.out}: {metrics['heldout_bits_per_byte']:.3f} bits per byte held out; "
        f"{used:.1f} CPU minutes in this call"
    )
    return 0


def heldout_slice(
    entries: Tokenizer, texts: Mapping[str, str], length: int, windows: int = _SLICE_WINDOWS
) -> tuple[Int32[np.ndarray, "windows window"], float]:
    """Evenly spread windows of held-out text for progress lines, and the factor from nats a token to bits a byte."""
    ids = [token for encoding in entries.encode_batch_fast(list(texts.values())) for token in encoding.ids]
    count = min(windows, len(ids) // (length + 1))
    if count < 1:
        raise ValueError(f"held-out text has {len(ids)} tokens: must be more than length={length}")
    starts = np.linspace(0, len(ids) - length - 1, count).astype(int)
    chosen = np.array(ids, np.int32)[starts[:, None] + np.arange(length + 1)]
    # In byte-level BPE every character of an entry's name is one byte.
    size = sum(len(entries.id_to_token(token) or "") for token in chosen[:, 1:].reshape(-1).tolist())
    return chosen, chosen[:, 1:].size / size / math.log(2)


def progress_line(progress: Progress, bits_per_nat: float) -> str:
    """Step, losses, speed and time to go, for a person to read."""
    left = progress.cpu_seconds * (1 / progress.fraction - 1) / 60
    return (
        f"step {progress.step:5d}  {progress.fraction:6.1%}  tokens {progress.tokens / 1e6:5.2f} M  "
        f"loss {progress.loss:.3f}  held-out slice {progress.heldout * bits_per_nat:.3f} bits/byte  "
        f"{progress.tokens_per_second:5.0f} tokens/s  {left:4.1f} CPU minutes left"
    )


def write_folder(model: Decoder, folder: Path) -> None:
    """Writes weights (bf16), ``config.json`` and ``generation_config.json``."""
    models.save(model, folder, dtype="bfloat16")
    end, pad = model.config.eos_token_ids
    generation = {"do_sample": False, "eos_token_id": [end, pad], "pad_token_id": pad}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def measure(folder: Path, entries: Tokenizer, train: Mapping[str, str], heldout: Mapping[str, str]) -> dict[str, Any]:
    """Loads the saved folder as a user would and measures it."""
    model = models.load(folder, dtype="float32")
    return {
        "parameters": sum(value.size for value in parameters_of(model).values()),
        "heldout_bits_per_byte": bits_per_byte(model, entries, heldout),
        "heldout_window": WINDOW,
        "heldout_stride": STRIDE,
        "heldout_files": len(heldout),
        "heldout_bytes": sum(len(text.encode()) for text in heldout.values()),
        "baselines_bits_per_byte": baselines(train, heldout),
        "samples": [
            {"prompt": prompt, "completion": complete(model, entries, prompt, _SAMPLE_TOKENS)} for prompt in PROMPTS
        ],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m models.training.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=sorted(CONFIGS), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model; the run's state lies in it too")
    parser.add_argument("--cpu-minutes", type=minutes, default=60.0, help="budget of CPU time (default %(default)g)")
    parser.add_argument("--steps", type=count, help="budget in steps of 2,048 tokens, in place of CPU time: repeatable")
    parser.add_argument("--intermediate-size", type=count, help="width of dense MLPs, in place of the size's own")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --out")
    parser.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json; default: train it on the corpus")
    parser.add_argument("--allow-changed", action="store_true", help="train on corpus files that differ from the list")
    return parser


def minutes(text: str) -> float:
    """Type of an argument: a number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: must be greater than 0")
    return value


def count(text: str) -> int:
    """Type of an argument: a whole number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
