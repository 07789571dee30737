"""`python -m jaxdual.sim CONFIG.toml`: what a cluster would do with a load.

Exit status: 0 when all was simulated, 2 for a call that can't work.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from jaxdual.sim.cluster import ClusterSim
from jaxdual.sim.config import read_sim_config
from jaxdual.sim.nodes import Request
from jaxdual.sim.report import Measures, build_report, format_report
from jaxdual.sim.workload import sessions_of, starts_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxdual.sim",
        description="Simulates a cluster of prefill and decode nodes that serves agents, with the scheduler that the "
        "engine runs.",
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
    try:
        config = read_sim_config(options.config, options.settings)
        sessions = sessions_of(config)
        starts = starts_of(config, sessions)
    except ValueError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    measures = Measures(sessions, starts)
    began = time.monotonic()
    with tqdm(total=measures.planned, unit=" requests", disable=options.no_progress, smoothing=0) as bar:

        def finished(request: Request, now: float) -> None:
            measures.take(request, now)
            bar.update()

        sim = ClusterSim(config, sessions, starts, finished)
        seconds = sim.run()
    report = build_report(config, sim, measures, seconds, time.monotonic() - began)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(format_report(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
