"""`python -m bench.pruning --json FILE`: what pruners cost with and without Sparsity Induction, claim by claim.

The larger shipped model is pruned on draws of the text that it was trained on, and its perplexity taken on held-out
files. Arms of a seed see the same calibration text, so changes are paired by seed. Speed and bytes of what is served
faster are `python -m bench.pruning.speed` and `python -m bench.pruning.packed`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.pruning.claims import tables, verdicts
from bench.pruning.pictures import check_drawing, draw
from bench.pruning.quality import PATTERNS, Run, Setting, dense_perplexity, draw_windows, quality
from bench.pruning.refresh import refresh
from bench.report import header, table, write_json
from jaxdual.arguments import run_command, whole
from jaxdual.model_folder import shipped_model
from jaxdual.pruning.induction.options import add_induction, induction_of
from jaxdual.pruning.pattern import Pattern
from jaxdual.tokenizer import Tokenizer


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    return run_command(parser.prog, lambda: _run(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.pruning", description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="written anew as models are pruned")
    parser.add_argument("--picture", type=Path, metavar="FILE.png")
    parser.add_argument("--model", type=Path, metavar="DIR", help="model folder; the shipped base unless given")
    parser.add_argument(
        "--pattern", action="append", metavar="PATTERN", help=f"all of {', '.join(PATTERNS)} unless given"
    )
    for name, least, about in (
        ("seeds", 2, "draws of calibration text"),
        ("sequences", 2, "windows of calibration text"),
        ("length", 2, "tokens of a window"),
        ("evaluated", 1, "windows of held-out text"),
    ):
        default = Setting.__dataclass_fields__[name].default
        parser.add_argument(f"--{name}", type=whole(least), default=default, metavar="N", help=f"{about}; {default}")
    parser.add_argument("--go-on", action="store_true", help="with the models in --json, if its setting is the same")
    parser.add_argument("--workers", type=whole(1), default=1, metavar="N", help="processes at a time; 1")
    add_induction(parser)
    return parser


def _run(options: argparse.Namespace) -> int:
    if options.picture is not None:
        check_drawing()
    induction = induction_of(options, default="score")
    if induction is None:
        raise ValueError("--si none: the comparison is with Sparsity Induction")
    patterns = [str(Pattern.parse(text)) for text in options.pattern or PATTERNS]
    setting = Setting(
        options.model or shipped_model("base"),
        induction,
        options.seeds,
        options.sequences,
        options.length,
        options.evaluated,
        patterns,
    )
    report: dict[str, Any] = header("bench.pruning") | {
        "setting": asdict(setting) | {"model": setting.model.name},
    }
    windows = draw_windows(Tokenizer.from_dir(setting.model), "train", setting.sequences, setting.length, seed=0)
    report["refresh"] = refresh(setting.model, windows)

    before = _runs_of(options.json, report["setting"]) if options.go_on else []
    dense = dense_perplexity(setting)
    report["dense"] = dense
    begin = time.monotonic()

    def done(runs: list[Run]) -> None:
        print(f"{len(runs)} models pruned, {time.monotonic() - begin:.0f} s", flush=True)
        write_json(options.json, report | {"runs": [asdict(run) for run in runs]})

    runs = quality(setting, options.workers, done, before)
    found = verdicts(runs, patterns, report["refresh"]["ratio"])
    report |= {"verdicts": [asdict(one) for one in found], "runs": [asdict(run) for run in runs]}
    write_json(options.json, report)
    print(f"\n{tables(runs, patterns, dense)}\n")
    print(table(["claim", "measured", "verdict"], [[one.claim, one.measured, one.verdict] for one in found]))
    if options.picture is not None:
        draw(runs, patterns, dense, options.picture)
    return 0


def _runs_of(file: str | None, setting: Any) -> list[Run]:
    """Runs that a stopped call has written.

    Raises:
      ValueError: there are none, or they are of another setting.
    """
    try:
        found = json.loads(Path(file or "").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--go-on: {file} can't be read ({error})") from None
    if found["setting"] != json.loads(json.dumps(setting)):
        raise ValueError(f"--go-on: {file} is of another setting: {found['setting']}")
    return [Run(**one) for one in found["runs"]]


if __name__ == "__main__":
    sys.exit(main())
