"""Trains the retrieval model on random documents and writes its folder, or goes on with ``--resume``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from models.training.data import Position
from models.training.recipes import RETRIEVAL_CONFIG, RETRIEVAL_RECIPE
from models.training.retrieval import RetrievalStream, build_tokenizer
from models.training.run import Budget, Progress, run
from models.training.state import TrainState
from models.training.train import STATE_FOLDER, minutes, write_folder

_HELDOUT_SEED = 1 << 20
_HELDOUT_ROWS = 16
_CHECKPOINT_SECONDS = 60.0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's text and ``--help``."""
    args = _parser().parse_args(argv)
    config, recipe = RETRIEVAL_CONFIG, RETRIEVAL_RECIPE
    entries = build_tokenizer()
    heldout, _ = RetrievalStream(entries, _HELDOUT_SEED).batch(Position(0, 0, recipe.long_length), _HELDOUT_ROWS)

    def report(progress: Progress, _state: TrainState) -> None:
        print(
            f"step {progress.step:5d}  {progress.fraction:6.1%}  tokens {progress.tokens / 1e6:5.2f} M  "
            f"loss {progress.loss:.4f}  held out {progress.heldout:.4f} nats/token  "
            f"{progress.tokens_per_second:5.0f} tokens/s",
            flush=True,
        )

    budget = Budget(cpu_seconds=60 * args.cpu_minutes)
    try:
        model, state = run(
            config,
            recipe,
            budget,
            RetrievalStream(entries, recipe.seed),
            heldout,
            args.out / STATE_FOLDER,
            resume=args.resume,
            checkpoint_seconds=_CHECKPOINT_SECONDS,
            report=report,
        )
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    write_folder(model, args.out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m models.training.train_retrieval", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model; the run's state lies in it too")
    parser.add_argument("--cpu-minutes", type=minutes, default=40.0, help="budget of CPU time (default %(default)g)")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --out")
    return parser


if __name__ == "__main__":
    sys.exit(main())
