"""`python -m bench.cascade --json FILE`: what a cascade of the two quiz models saves, and what it loses.

Both models answer questions whose facts and seeds were fixed before they were trained. A probe is trained on 80 % of
them and thresholds are chosen on 10 %; all figures are those of the last 10 %, of other kinds of questions, and of
short answers. Parameters are those of the layers; compute is 2 N a token, of all passes.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.cascade.asked import Reader, Setting, questions
from bench.cascade.claims import claims, requirements, tables
from bench.cascade.measure import measure
from bench.cascade.pictures import check_drawing, draw
from bench.cascade.through_engines import through_engines
from bench.report import header, write_json
from jaxdual.arguments import run_command, whole
from jaxdual.cascade.evaluation.item_prompts import FORMS
from jaxdual.model_folder import shipped_model

_QUICK: dict[str, Any] = {"asked": 1500, "short": 300, "others": 100, "seeds": (42, 43), "epochs": 4}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    return run_command(parser.prog, lambda: _run(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.cascade", description=__doc__)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--picture", type=Path, metavar="FILE.png")
    parser.add_argument(
        "--models", nargs=2, type=Path, metavar="DIR", help="the smaller and the larger; the shipped ones unless given"
    )
    parser.add_argument(
        "--signals", type=Path, default=Path("build/cascade"), metavar="DIR", help="kept here; default %(default)s"
    )
    for name, least in (("asked", 100), ("short", 100), ("others", 10), ("epochs", 1)):
        default = Setting.__dataclass_fields__[name].default
        parser.add_argument(f"--{name}", type=whole(least), metavar="N", help=f"see `Setting`; default {default}")
    parser.add_argument("--seeds", type=whole(1), metavar="N", help="of the probe; default 5")
    parser.add_argument("--form", choices=FORMS, default="chat", help="of prompts; default %(default)s")
    parser.add_argument("--no-p-true", action="store_true", help="leaves P(True) out")
    parser.add_argument("--no-engines", action="store_true", help="leaves the run through engines out")
    parser.add_argument("--quick", action="store_true", help="few questions, to see that all works")
    return parser


def _run(options: argparse.Namespace) -> int:
    if options.picture is not None:
        check_drawing()
    models = options.models or [shipped_model("quiz_small"), shipped_model("quiz_large")]
    given: dict[str, Any] = dict(_QUICK) if options.quick else {}
    given |= {
        name: getattr(options, name)
        for name in ("asked", "short", "others", "epochs")
        if getattr(options, name) is not None
    }
    if options.seeds is not None:
        given["seeds"] = tuple(range(42, 42 + options.seeds))
    setting = Setting(models=(models[0], models[1]), form=options.form, p_true=not options.no_p_true, **given)
    report: dict[str, Any] = header("bench.cascade")
    readers = [Reader(folder, setting.form, options.signals) for folder in setting.models]
    report["setting"] = dataclasses.asdict(setting) | {"models": [folder.name for folder in setting.models]}
    asked = questions(setting)
    report |= measure(setting, readers, asked)
    if not options.no_engines:
        report["engines"] = through_engines(setting, readers, asked, options.signals)
    report["requirements"] = [dataclasses.asdict(one) for one in requirements(report)]
    report["claims"] = [dataclasses.asdict(one) for one in claims(report)]
    write_json(options.json, report)
    print(tables(report))
    if options.picture is not None:
        draw(report, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
