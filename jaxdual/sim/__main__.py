"""`python -m jaxdual.sim CONFIG.toml`: what a cluster would do with a load.

`python -m jaxdual.sim compare REPORT REPORT` puts two reports beside each other. Exit status: 0 when all was done, 2
for a call that can't work.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxdual.sim.compare import compare, read_report
from jaxdual.sim.config import read_sim_config
from jaxdual.sim.report import format_report
from jaxdual.sim.run import run_simulation

_PROG = "python -m jaxdual.sim"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    run = _compare if given[:1] == ["compare"] else _simulate
    try:
        return run(given)
    except (ValueError, OSError) as error:
        print(f"{_PROG}: error: {error}", file=sys.stderr)
        return 2


def _simulate(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=_PROG,
        description="Simulates a cluster of prefill and decode nodes that serves agents, with the scheduler that the "
        "engine runs.",
        epilog="`compare REPORT REPORT` in place of CONFIG.toml puts two reports beside each other.",
    )
    parser.add_argument("config", metavar="CONFIG.toml", type=Path, help="what is simulated, see examples/sim")
    parser.add_argument(
        "--set",
        metavar="SECTION.KEY=VALUE",
        action="append",
        default=[],
        dest="settings",
        help="another value than the file's, such as cluster.decode_nodes=4 or mode=basic; any number of times",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="where the report goes, too")
    parser.add_argument("--no-progress", action="store_true", help="shows no progress bar")
    options = parser.parse_args(arguments)
    config = read_sim_config(options.config, options.settings)
    report = run_simulation(config, progress=not options.no_progress)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(format_report(report))
    return 0


def _compare(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f"{_PROG} compare",
        description="Compares two reports: of simulations, or of replays of `python -m jaxdual.offline --trace`.",
    )
    parser.add_argument("first", metavar="REPORT", type=Path)
    parser.add_argument("second", metavar="REPORT", type=Path)
    options = parser.parse_args(arguments[1:])
    print(compare(read_report(options.first), read_report(options.second)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
