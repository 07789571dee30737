"""When the sessions of a trace start."""

import itertools
from collections.abc import Sequence

import numpy as np

from jaxdual.offline.trace import Session, TraceError


def poisson_starts(count: int, per_second: float, seed: int) -> list[float]:
    """Start times of a Poisson process in seconds, the first at 0."""
    gaps = np.random.default_rng((seed, count)).exponential(1 / per_second, size=count - 1).tolist()
    return list(itertools.accumulate(gaps, initial=0.0))


def timestamp_starts(sessions: Sequence[Session], speed: float) -> list[float]:
    """Start times in seconds as the trace tells, `speed` times as fast, the first at 0.

    Raises:
      TraceError: a session has no timestamp.
    """
    times = []
    for session in sessions:
        if session.timestamp is None:
            raise TraceError(f"session {session.session_id!r} has no timestamp to start it by")
        times.append(session.timestamp)
    first = min(times, default=0.0)
    return [(time - first) / speed for time in times]
