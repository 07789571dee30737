"""Trains the retrieval model on random documents and writes its folder; a killed run goes on with ``--resume``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32
from tokenizers import Tokenizer

import models
from models.shapes import parameters_of
from models.training import tokenizer
from models.training.data import Position
from models.training.evaluate import Scorer
from models.training.recipes import RETRIEVAL_CONFIG, RETRIEVAL_RECIPE
from models.training.records import record, write_record
from models.training.retrieval import RetrievalStream, build_tokenizer, looked_up
from models.training.retrieval_card import retrieval_card
from models.training.retrieval_init import planted
from models.training.run import Budget, Progress, run
from models.training.state import TrainState
from models.training.train import STATE_FOLDER, minutes, write_folder

_HELDOUT_SEED = 1 << 20
_HELDOUT_ROWS = 8
_MEASURED = {256: 64, 512: 32, 1024: 16}  # windows of each length
_CHECKPOINT_SECONDS = 45.0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's text and ``--help``."""
    args = _parser().parse_args(argv)
    config, recipe = RETRIEVAL_CONFIG, RETRIEVAL_RECIPE
    entries = build_tokenizer()
    tokenizer.save(entries, args.out, config.max_position_embeddings)
    data = RetrievalStream(entries, recipe.seed)
    heldout, _ = RetrievalStream(entries, _HELDOUT_SEED).batch(Position(0, 0, recipe.length), _HELDOUT_ROWS)
    budget = Budget(cpu_seconds=60 * args.cpu_minutes)
    try:
        model, state = run(
            config,
            recipe,
            budget,
            data,
            heldout,
            args.out / STATE_FOLDER,
            initial=planted(config, parameters_of(models.init(config, seed=recipe.seed)), recipe.seed),
            resume=args.resume,
            checkpoint_seconds=_CHECKPOINT_SECONDS,
            report=_report,
        )
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    write_folder(model, args.out)
    metrics = {
        **record("retrieval", config, recipe, state),
        "budget_cpu_minutes": args.cpu_minutes,
        **measure(args.out, entries),
    }
    write_record(args.out, metrics, retrieval_card)
    print(f"{args.out}: of what is to be looked up, right by length of window: {metrics['lookup_accuracy']}")
    return 0


def measure(folder: Path, entries: Tokenizer) -> dict[str, Any]:
    """Loads the saved folder as a user would and measures it on conversations that were never trained on."""
    model = models.load(folder, dtype="float32")
    found = {}
    for length, rows in _MEASURED.items():
        windows, _ = RetrievalStream(entries, _HELDOUT_SEED, drills=0).batch(Position(1, 0, length), rows)
        found[str(length)] = round(accuracy(model, windows, looked_up(entries, windows)), 4)
    return {
        "parameters": sum(value.size for value in parameters_of(model).values()),
        "lookup_accuracy": found,
        "lookup_windows": {str(length): rows for length, rows in _MEASURED.items()},
    }


def accuracy(
    model: Scorer, windows: Int32[np.ndarray, "rows window"], chosen: Bool[np.ndarray, "rows window"]
) -> float:
    """Part of some tokens that are the likeliest ones behind the true text before them; nan for none."""
    tokens = np.where(windows < 0, ~windows, windows)
    right = [np.asarray(model.logits(row[None, :-1])[0].argmax(-1)) == row[1:] for row in tokens]
    return float(np.mean(np.stack(right)[chosen[:, 1:]]))


def _report(progress: Progress, _state: TrainState) -> None:
    print(
        f"step {progress.step:5d}  {progress.fraction:6.1%}  tokens {progress.tokens / 1e6:5.2f} M  "
        f"loss {progress.loss:.4f}  held out {progress.heldout:.4f} nats/token  "
        f"{progress.tokens_per_second:5.0f} tokens/s",
        flush=True,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m models.training.train_retrieval", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model; the run's state lies in it too")
    parser.add_argument("--cpu-minutes", type=minutes, default=5.0, help="budget of CPU time (default %(default)g)")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --out")
    return parser


if __name__ == "__main__":
    sys.exit(main())
