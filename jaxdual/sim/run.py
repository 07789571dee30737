"""Runs a simulation from its configuration to its report."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from jaxdual.sim.cluster import ClusterSim
from jaxdual.sim.config import SimConfig
from jaxdual.sim.nodes import Request
from jaxdual.sim.report import Measures, build_report
from jaxdual.sim.workload import sessions_of, starts_of


def run_simulation(
    config: SimConfig,
    *,
    progress: bool = False,
    on_finished: Callable[[Request, float], None] = lambda request, now: None,
) -> dict[str, Any]:
    """The report of a simulation, as JSON data.

    Args:
      progress: whether a progress bar is shown on standard error.
      on_finished: called with each request that is over and the time.

    Raises:
      ConfigError, TraceError: it can't be run.
    """
    sessions = sessions_of(config)
    starts = starts_of(config, sessions)
    measures = Measures(sessions, starts)
    began, computed = time.monotonic(), time.process_time()
    with tqdm(total=measures.planned, unit=" requests", disable=not progress, smoothing=0) as bar:

        def finished(request: Request, now: float) -> None:
            measures.take(request, now)
            on_finished(request, now)
            bar.update()

        sim = ClusterSim(config, sessions, starts, finished)
        seconds = sim.run()
    own = {"wall_seconds": time.monotonic() - began, "cpu_seconds": time.process_time() - computed}
    return build_report(config, sim, measures, seconds, own)
