"""The clock of a simulation, and what happens next on it."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class Events:
    """Calls to be made, in order of time; of equal times, first scheduled first made.

    Attributes:
      now: seconds since the start.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = 0

    def __len__(self) -> int:
        """Calls to come."""
        return len(self._heap)

    def at(self, time: float, call: Callable[..., None], *arguments: Any) -> None:
        """`call(*arguments)` at a time that is not past."""
        self._number += 1
        heapq.heappush(self._heap, (time, self._number, call, arguments))

    def run(self) -> None:
        """Makes all calls, and those that they schedule."""
        heap = self._heap
        while heap:
            self.now, _, call, arguments = heapq.heappop(heap)
            call(*arguments)
