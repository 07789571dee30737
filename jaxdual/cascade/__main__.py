"""`python -m jaxdual.cascade collect|train|calibrate|evaluate`: makes and judges cascades of models.

Of each model, `collect` takes what it makes of questions; `train` makes a P(IK) probe of that; `calibrate` chooses
thresholds on validation questions and writes the file that `--cascade` of the server reads; `evaluate` judges it on
test questions.

Exit status: 0, 1 when files fail, 2 for a call that can't work, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxdual.arguments import above_0, run_command, whole
from jaxdual.cascade.evaluation import commands
from jaxdual.cascade.evaluation.collect import BATCH, MAX_OUTPUT
from jaxdual.cascade.evaluation.item_prompts import FORMS
from jaxdual.cascade.evaluation.items import SPLITS
from jaxdual.cascade.evaluation.thresholds import CALIBRATIONS, CERTAINTY, EPSILON, POINTS, RULES
from jaxdual.cascade.evaluation.train import Recipe

_PROG = "python -m jaxdual.cascade"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    return run_command(_PROG, lambda: run(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROG, description="Cascades of models, each asked where smaller ones are unsure."
    )
    commands_of = parser.add_subparsers(required=True, metavar="COMMAND")
    _collect(commands_of.add_parser("collect", help="what a model makes of questions"))
    _train(commands_of.add_parser("train", help="a P(IK) probe of a model"))
    _calibrate(commands_of.add_parser("calibrate", help="thresholds, on validation questions"))
    _evaluate(commands_of.add_parser("evaluate", help="figures, on test questions"))
    return parser


def _collect(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=commands.run_collect)
    parser.add_argument("--model", required=True, metavar="DIR", help="a folder, or a name on the hub")
    parser.add_argument("--items", required=True, type=Path, metavar="FILE.jsonl", help="questions with answers")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.npz", help="where the signals go")
    parser.add_argument(
        "--tap", type=whole(1), metavar="N", help="layers below the probe; default 24 or three quarters"
    )
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--form", choices=FORMS, help="of prompts; default chat, if the model has a template")
    parser.add_argument(
        "--split",
        choices=("parts", *SPLITS),
        default="parts",
        help="parts: 80, 10 and 10 %% (default), or all into one",
    )
    parser.add_argument("--p-true", action="store_true", help="asks as well whether the answer is right: one more pass")
    parser.add_argument(
        "--batch", type=whole(1), default=BATCH, metavar="N", help="prompts of a pass; default %(default)s"
    )
    parser.add_argument(
        "--max-output",
        type=whole(1),
        default=MAX_OUTPUT,
        metavar="N",
        help="tokens of short answers; default %(default)s",
    )
    _add_common(parser)


def _train(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=commands.run_train)
    parser.add_argument("--signals", required=True, type=Path, metavar="FILE.npz", help="of `collect`, of the model")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.safetensors", help="where the probe goes")
    parser.add_argument("--rate", type=above_0, default=Recipe().rate, metavar="X", help="of Adam; default %(default)s")
    for name, low, about in (
        ("epochs", 1, "at most"),
        ("batch", 1, "questions of a step"),
        ("seed", 0, "of all draws"),
    ):
        default = getattr(Recipe(), name)
        parser.add_argument(
            f"--{name}", type=whole(low), default=default, metavar="N", help=f"{about}; default {default}"
        )
    parser.add_argument("--shuffled-labels", action="store_true", help="a control, whose AUROC must be about 0.5")
    _add_common(parser)


def _calibrate(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=commands.run_calibrate)
    parser.add_argument(
        "--tier",
        required=True,
        nargs="+",
        action="append",
        metavar="FILE",
        help="signals and probe of a tier, smallest first; the last one has no probe",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.toml", help="where the cascade goes")
    parser.add_argument("--rule", choices=RULES, default="both", help=f"{_rules()}; default both")
    parser.add_argument(
        "--calibration", choices=CALIBRATIONS, default="none", help="of scores before they are compared; default none"
    )
    parser.add_argument("--mode", choices=("full", "choices"), default="full", help="of P(T); default full")
    parser.add_argument(
        "--epsilon", type=_part, default=EPSILON, metavar="X", help="accuracy that may be lost; default %(default)s"
    )
    parser.add_argument(
        "--certainty", type=_part, default=CERTAINTY, metavar="X", help="that no more is; default %(default)s"
    )
    parser.add_argument(
        "--budget", type=above_0, metavar="X", help="part of the largest model's compute: most accuracy"
    )
    parser.add_argument(
        "--points", type=whole(2), default=POINTS, metavar="N", help="of each threshold's grid; default %(default)s"
    )
    parser.add_argument(
        "--price", type=_price, action="append", default=[], metavar="IN:OUT", help="of a million tokens of each tier"
    )
    _add_common(parser)


def _evaluate(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=commands.run_evaluate)
    parser.add_argument("--cascade", required=True, type=Path, metavar="FILE.toml", help="of `calibrate`")
    parser.add_argument(
        "--signals", required=True, nargs="+", type=Path, metavar="FILE.npz", help="of each tier, in their order"
    )
    parser.add_argument(
        "--other",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "FILE.npz"),
        help="signals of each tier over questions of another kind",
    )
    parser.add_argument(
        "--engines", action="store_true", help="asks the cascade's engines as well, and compares what they compute"
    )
    _add_common(parser)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="where all figures go")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


def _rules() -> str:
    return "; ".join(f"{rule}: {about}" for rule, about in commands.RULE_HELP.items())


def _part(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be at least 0 and below 1")
    return value


def _price(text: str) -> tuple[float, float]:
    try:
        price_in, price_out = (float(one) for one in text.split(":"))
    except ValueError:
        price_in = price_out = math.nan
    if not (0 <= price_in < math.inf and 0 <= price_out < math.inf):
        raise argparse.ArgumentTypeError(f"{text!r} must be two prices, as 0.08:0.16")
    return price_in, price_out


if __name__ == "__main__":
    sys.exit(main())
