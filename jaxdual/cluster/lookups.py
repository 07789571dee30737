"""Asks the store how much of each prompt it has: many prompts in one call, none of them for long."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from jaxdual.complaints import Complaints
from jaxdual.kv.keys import BlockKey
from jaxdual.kv.store import BlockStore

_complaints = Complaints(logging.getLogger(__name__))


class StoreLookups:
    """Belongs to one asyncio loop.

    Args:
      store: which is looked into; closed together with this.
      answer: called with each number and the leading blocks that are stored: 0 if the store doesn't say in time.
      timeout: seconds that a prompt waits.
    """

    def __init__(self, store: BlockStore, answer: Callable[[int, int], None], timeout: float) -> None:
        self._store, self._answer, self._timeout = store, answer, timeout
        self._thread = ThreadPoolExecutor(1, "store-lookup")
        self._asked: dict[int, Sequence[BlockKey]] = {}
        self._running: asyncio.Task[None] | None = None
        self._called = 0.0  # when the present call of the store has begun

    def look(self, number: int, keys: Sequence[BlockKey]) -> None:
        """How many of the leading `keys` are stored? `answer` says, later."""
        self._asked[number] = keys
        loop = asyncio.get_running_loop()
        # A call that hangs has kept others waiting already.
        hangs = self._running is not None and loop.time() - self._called > self._timeout
        loop.call_later(0.0 if hangs else self._timeout, self._expire, number, keys)
        if self._running is None:
            self._called = loop.time()
            self._running = loop.create_task(self._run())

    async def close(self) -> None:
        """Answers nobody any more, and closes the store."""
        self._asked.clear()
        self._thread.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._store.close)

    def _expire(self, number: int, keys: Sequence[BlockKey]) -> None:
        if self._asked.get(number) is keys:
            del self._asked[number]
            _complaints.tell("the block store does not say in time what it has")
            self._answer(number, 0)

    async def _run(self) -> None:
        """Calls the store for all that were asked for meanwhile, until there are none."""
        try:
            while self._asked:
                asked = dict(self._asked)
                chains = list(asked.values())
                self._called = asyncio.get_running_loop().time()
                hits = await asyncio.get_running_loop().run_in_executor(self._thread, self._hits, chains)
                for (number, keys), count in zip(asked.items(), hits, strict=True):
                    if self._asked.get(number) is keys:
                        del self._asked[number]
                        self._answer(number, count)
        finally:
            self._running = None

    def _hits(self, chains: Sequence[Sequence[BlockKey]]) -> list[int]:
        try:
            return self._store.hits(chains)
        except OSError as error:
            _complaints.tell(f"the block store can't be looked into: {error}")
            return [0] * len(chains)
