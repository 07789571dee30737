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

from jaxdual.config import ConfigError
from jaxdual.sim.compare import compare, read_report
from jaxdual.sim.config import read_sim_config
from jaxdual.sim.nodes import Request
from jaxdual.sim.pictures import draw
from jaxdual.sim.report import format_report
from jaxdual.sim.run import run_simulation
from jaxdual.sim.spans import write_spans

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
    parser.add_argument(
        "--plot", metavar="FILE", type=Path, help="a picture of the storage cards' use and of who waited, over time"
    )
    parser.add_argument(
        "--spans", metavar="FILE", type=Path, help="what one request did when, as a trace that Perfetto opens"
    )
    parser.add_argument(
        "--spans-of",
        metavar="AGENT:TURN",
        default="0:0",
        type=_agent_and_turn,
        help="whose spans, by their numbers from 0 on (default: 0:0)",
    )
    parser.add_argument("--no-progress", action="store_true", help="shows no progress bar")
    options = parser.parse_args(arguments)
    config = read_sim_config(options.config, options.settings)

    def finished(request: Request, now: float) -> None:
        if options.spans is not None and (request.agent, request.turn) == options.spans_of:
            write_spans(options.spans, request, now)
            told.append(request)

    told: list[Request] = []
    report = run_simulation(config, progress=not options.no_progress, on_finished=finished)
    if options.spans is not None and not told:
        agent, turn = options.spans_of
        raise ConfigError(f"--spans-of {agent}:{turn}: there is no such turn")
    if options.plot is not None:
        draw(report, options.plot)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(format_report(report))
    return 0


def _agent_and_turn(text: str) -> tuple[int, int]:
    agent, sign, turn = text.partition(":")
    if not (sign and agent.isdecimal() and turn.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} must be AGENT:TURN, such as 0:12")
    return int(agent), int(turn)


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
