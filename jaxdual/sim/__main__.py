"""`python -m jaxdual.sim CONFIG.toml`: what a cluster would do with a load.

`compare REPORT REPORT` puts two reports beside each other; `plan` says how many nodes a load needs. Exit status: 0 when
all was done, 1 when no plan was found, 2 for a call that can't work, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxdual.config import ConfigError
from jaxdual.result_files import check_picture, check_writable
from jaxdual.sim.compare import compare, read_report
from jaxdual.sim.config import MAX_LENS, SimConfig, read_sim_config
from jaxdual.sim.nodes import Request
from jaxdual.sim.pictures import draw
from jaxdual.sim.plan import Trial, format_plan, make_plan, parse_slo
from jaxdual.sim.report import format_report
from jaxdual.sim.run import run_simulation
from jaxdual.sim.spans import write_spans
from jaxdual.sim.workload import sessions_of

_PROG = "python -m jaxdual.sim"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    run = {"compare": _compare, "plan": _plan}.get(given[0] if given else "", _simulate)
    try:
        return run(given)
    except (ValueError, OSError) as error:
        print(f"{_PROG}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{_PROG}: interrupted", file=sys.stderr)
        return 130


def _simulate(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=_PROG,
        description="Simulates a cluster of prefill and decode nodes that serves agents, with the scheduler that the "
        "engine runs.",
        epilog="In place of CONFIG.toml, `compare` puts two reports beside each other, and `plan` says how many nodes "
        "a load needs; both have a --help of their own.",
    )
    parser.add_argument("config", metavar="CONFIG.toml", type=Path, help="what is simulated, see examples/sim")
    _add_settings(parser)
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

    for file in (options.json, options.plot, options.spans):
        if file is not None:
            check_writable(file)
    if options.spans is not None:
        _check_turn(config, *options.spans_of)
    if options.plot is not None:
        check_picture(options.plot)
    with _named(options.config):
        report = run_simulation(config, progress=not options.no_progress, on_finished=finished)
    print(format_report(report))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if options.plot is not None:
        draw(report, options.plot)
    return 0


def _plan(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f"{_PROG} plan",
        description="Says how many prefill and decode nodes a load needs for what is promised, what they use most, and "
        "what one more of each would bring.",
    )
    parser.add_argument("--model", metavar="CONFIG.toml", type=Path, required=True, help="model and hardware")
    parser.add_argument(
        "--trace",
        metavar="TRACE",
        required=True,
        help=f"a file of requests or sessions, or one of {', '.join(MAX_LENS)}",
    )
    parser.add_argument("--slo", metavar="ttft=S,tpot=S", required=True, help="mean times, in seconds")
    parser.add_argument("--most-nodes", type=int, default=32, help="that are tried (default: 32)")
    _add_settings(parser)
    options = parser.parse_args(arguments[1:])
    slo = parse_slo(options.slo)
    if options.most_nodes < 2:
        raise ConfigError(f"--most-nodes {options.most_nodes} must be at least 2: one of each role")
    if options.trace in MAX_LENS:
        load = f'workload.max_len="{options.trace}"'
    elif not Path(options.trace).exists():
        raise ConfigError(f"--trace {options.trace}: is neither a file nor one of {', '.join(MAX_LENS)}")
    else:
        load = f"workload.trace={json.dumps(str(Path(options.trace).absolute()))}"
    config = read_sim_config(options.model, [load, *options.settings])

    def tell(trial: Trial) -> None:
        print(f"{trial.prefill}P{trial.decode}D: {trial.excess:.2f} of what is promised", file=sys.stderr)

    with _named(options.model):
        plan = make_plan(config, slo, options.most_nodes, tell)
    print(format_plan(plan, slo, options.most_nodes))
    return 0 if plan.chosen is not None else 1


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        metavar="SECTION.KEY=VALUE",
        action="append",
        default=[],
        dest="settings",
        help="another value than the file's, such as cluster.decode_nodes=4 or mode=basic; any number of times",
    )


@contextlib.contextmanager
def _named(file: Path) -> Iterator[None]:
    """Errors within tell of which configuration's values they are."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(str(error) if str(error).startswith("--") else f"{file}: {error}") from None


def _check_turn(config: SimConfig, agent: int, turn: int) -> None:
    sessions = sessions_of(config)
    if agent >= len(sessions) or turn >= len(sessions[agent].turns):
        raise ConfigError(f"--spans-of {agent}:{turn}: there is no such turn")


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
