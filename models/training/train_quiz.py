"""Trains a quiz model and writes its folder; a killed run goes on with ``--resume``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

import models
from models.questions import LETTERS
from models.shapes import parameters_of
from models.training import quiz, tokenizer
from models.training.data import Position
from models.training.evaluate import Scorer
from models.training.quiz_card import quiz_card
from models.training.recipes import QUIZ_CONFIGS, QUIZ_RECIPES, QUIZ_STEPS
from models.training.records import record, write_record
from models.training.run import Budget, Progress, run
from models.training.state import TrainState
from models.training.train import STATE_FOLDER, count, write_folder

_HELDOUT_ROWS = 256
_CHECKPOINT_SECONDS = 60.0
_MEASURED = 4000  # questions of each kind
_BATCH = 250


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's text and ``--help``."""
    args = _parser().parse_args(argv)
    config, recipe = QUIZ_CONFIGS[args.size], QUIZ_RECIPES[args.size]
    entries = quiz.build_tokenizer()
    tokenizer.save(entries, args.out, config.max_position_embeddings)
    heldout, _ = quiz.QuizStream(entries, quiz.HELDOUT_SEED).batch(Position(0, 0, recipe.length), _HELDOUT_ROWS)
    try:
        model, state = run(
            config,
            recipe,
            Budget(steps=args.steps or QUIZ_STEPS[args.size]),
            quiz.QuizStream(entries, quiz.TRAINING_SEED),
            heldout,
            args.out / STATE_FOLDER,
            resume=args.resume,
            checkpoint_seconds=_CHECKPOINT_SECONDS,
            report=_report,
        )
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    write_folder(model, args.out)
    metrics = {
        **record(f"quiz_{args.size}", config, recipe, state),
        **measure(args.out, entries),
    }
    write_record(args.out, metrics, quiz_card)
    print(f"{args.out}: right of multiple-choice questions: {metrics['right']}")
    return 0


def measure(folder: Path, entries: Tokenizer) -> dict[str, Any]:
    """Loads the saved folder as a user would and measures it on questions that no benchmark asks."""
    model = models.load(folder, dtype="float32")
    asked = quiz.questions(quiz.HELDOUT_SEED, _MEASURED)
    right = answered_right(model, entries, asked)
    of_states = {
        state: [one for one, question in zip(right, asked, strict=True) if question.state == state]
        for state in ("current", "outdated", "unheard")
    }
    parameters = parameters_of(model)
    return {
        "parameters": sum(value.size for value in parameters.values()),
        "parameters_of_layers": sum(value.size for name, value in parameters.items() if name.startswith("layers.")),
        "questions": len(right),
        "right": round(float(np.mean(right)), 4),
        "right_by_state": {state: round(float(np.mean(some)), 4) for state, some in of_states.items()},
    }


def answered_right(model: Scorer, entries: Tokenizer, asked: Sequence[quiz.Question]) -> list[bool]:
    """Whether the likeliest letter is the right one, of each multiple-choice question."""
    ids = [entries.encode(quiz.multiple_choice_forms(question)[0][0]).ids for question in asked]
    letters = [entries.token_to_id(f"Ġ{letter}") for letter in LETTERS[: quiz.CHOICES]]
    right = []
    for begin in range(0, len(ids), _BATCH):
        some = ids[begin : begin + _BATCH]
        padded = np.zeros((len(some), quiz.WINDOW), np.int32)
        for row, tokens in zip(padded, some, strict=True):
            row[: len(tokens)] = tokens
        ends = np.array([len(tokens) - 1 for tokens in some])
        logits = np.asarray(model.logits(padded))[np.arange(len(some)), ends][:, letters]
        right += [
            LETTERS[choice] == question.letter
            for choice, question in zip(logits.argmax(-1), asked[begin:], strict=False)
        ]
    return right


def _report(progress: Progress, _state: TrainState) -> None:
    print(
        f"step {progress.step:5d}  {progress.fraction:6.1%}  loss {progress.loss:.4f}  held out "
        f"{progress.heldout:.4f} nats/token  {progress.cpu_seconds / 60:.1f} CPU minutes",
        flush=True,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m models.training.train_quiz", description=__doc__)
    parser.add_argument("--size", choices=sorted(QUIZ_CONFIGS), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model; the run's state lies in it too")
    parser.add_argument("--steps", type=count, help="of 256 questions each; default that of the shipped model")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --out")
    return parser


if __name__ == "__main__":
    sys.exit(main())
