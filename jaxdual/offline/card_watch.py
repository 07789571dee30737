"""Looks now and then at the network cards of a cluster while a load runs."""

import asyncio
import contextlib
import itertools
import statistics
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol

from jaxdual.errors import EngineDeadError
from jaxdual.outputs import EngineStats

_READS = " storage write"  # end of the name of what a storage card brings into memory


class HasStats(Protocol):
    """What a watch needs of `AsyncLLM`."""

    async def stats(self) -> EngineStats: ...


class CardWatch:
    """Watches from entering to leaving its `async with`.

    Args:
      llm: whose cards.
      interval: seconds between two looks.

    Attributes:
      timeline: seconds since the beginning, and bytes that have passed each card since then, as in
        `EngineStats.card_bytes`.
    """

    def __init__(self, llm: HasStats, interval: float = 1.0) -> None:
        self.timeline: list[tuple[float, dict[str, int]]] = []
        self._llm, self._interval = llm, interval
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "CardWatch":
        self._begin = time.monotonic()
        self._first: dict[str, int] = {}
        with contextlib.suppress(EngineDeadError):
            self._first = dict((await self._llm.stats()).card_bytes)
        if self._first:
            self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            await self._look()

    @property
    def nbytes(self) -> Mapping[str, int]:
        """Bytes of each card in all; none where there are no cards."""
        return self.timeline[-1][1] if self.timeline else {}

    def report(self) -> dict[str, Any] | None:
        """Bytes by card and by read path, and how evenly the storage cards read: the most of one card over the mean of
        all, of all bytes and as the mean of windows of one interval (DualPath 7.6). None where there are no cards.
        """
        if not self.nbytes:
            return None
        windows = [
            balance
            for (_, before), (_, after) in itertools.pairwise(self.timeline)
            if (balance := _balance({card: after[card] - before[card] for card in after})) is not None
        ]
        return {
            "bytes": dict(self.nbytes),
            "read_path_bytes": {side: _read_by(side, self.nbytes) for side in ("prefill", "decode")},
            "storage_max_over_mean": {
                "overall": _balance(self.nbytes),
                "windows": statistics.fmean(windows) if windows else None,
            },
        }

    async def _watch(self) -> None:
        while True:
            await self._look()
            await asyncio.sleep(self._interval)

    async def _look(self) -> None:
        with contextlib.suppress(EngineDeadError):
            now = (await self._llm.stats()).card_bytes
            # A cluster that was started anew counts from 0.
            passed = {card: max(0, count - self._first.get(card, 0)) for card, count in now.items()}
            self.timeline.append((time.monotonic() - self._begin, passed))


def _read_by(side: str, nbytes: Mapping[str, int]) -> int:
    return sum(count for card, count in nbytes.items() if card.startswith(side) and card.endswith(_READS))


def _balance(nbytes: Mapping[str, int]) -> float | None:
    read = [count for card, count in nbytes.items() if card.endswith(_READS)]
    return max(read) / statistics.fmean(read) if any(read) else None
