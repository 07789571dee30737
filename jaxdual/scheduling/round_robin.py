"""Engines in turn: the placement without a scheduler, which others are compared with."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Sequence

from jaxdual.scheduling.loads import PathRequest


class RoundRobin:
    """Engines in turn, by number, each as long as it has room."""

    def __init__(self) -> None:
        self._last = -1

    def place(
        self, queue: Iterable[PathRequest], engines: Sequence[int], free: Callable[[int], int] | None = None
    ) -> list[tuple[PathRequest, int]]:
        """Assigns requests from the head of the queue until one fits nowhere.

        Args:
          queue: first come first.
          engines: all of the role, lowest number first.
          free: KV memory of an engine, in tokens, of which a request takes `kv_tokens`; None for engines that take any
            number of requests.
        """
        left: dict[int, int] = {}
        assigned: list[tuple[PathRequest, int]] = []
        for request in queue:
            start = bisect.bisect_right(engines, self._last)
            for step in range(len(engines)):
                engine = engines[(start + step) % len(engines)]
                if free is None:
                    break
                if engine not in left:
                    left[engine] = free(engine)
                if left[engine] >= request.kv_tokens:
                    left[engine] -= request.kv_tokens
                    break
            else:
                break
            self._last = engine
            assigned.append((request, engine))
        return assigned
