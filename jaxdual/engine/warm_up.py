"""Programs that are compiled before a request needs them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import jax


def timed(runs: Iterable[tuple[str, Callable[[], object]]]) -> Iterator[tuple[str, Callable[[], float]]]:
    """The same names, and calls that wait for the results and return the seconds that it took."""
    for name, run in runs:
        yield name, partial(_seconds, run)


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start
