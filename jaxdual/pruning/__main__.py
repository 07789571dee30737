"""`python -m jaxdual.pruning --model DIR --method wanda --pattern 2:4 --calibration FILE --out DIR`: prunes a model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxdual.arguments import run_command, whole
from jaxdual.pruning.calibration import LENGTH, SEQUENCES
from jaxdual.pruning.induction.options import add_induction
from jaxdual.pruning.job import prune_folder
from jaxdual.pruning.masked import MaskedJob
from jaxdual.pruning.methods import METHODS, UPDATES
from jaxdual.pruning.structured.job import STRUCTURED, StructuredJob
from jaxdual.pruning.structured.plan import WIDTHS

_PROG = "python -m jaxdual.pruning"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = _parser().parse_args(arguments)
    stopped = f"{_PROG}: interrupted; the same call goes on with the layer that it was in"
    if options.method == STRUCTURED:
        return run_command(_PROG, lambda: prune_folder(StructuredJob(options), options), stopped=stopped)
    return run_command(_PROG, lambda: prune_folder(MaskedJob(options), options), stopped=stopped)


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


if __name__ == "__main__":
    sys.exit(main())
