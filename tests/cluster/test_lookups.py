"""What a cluster asks of the store about prompts."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

from jaxdual.cluster.lookups import StoreLookups
from jaxdual.kv.keys import BlockKey
from jaxdual.kv.store import BlockStore, Outcome, open_store


def test_a_store_that_hangs_keeps_only_the_first_ones_waiting() -> None:
    hanging = threading.Event()

    async def main() -> None:
        store = open_store("memory:", 1 << 20)
        answered: dict[int, float] = {}
        loop = asyncio.get_running_loop()
        lookups = StoreLookups(
            _Hanging(store, hanging), lambda number, _: answered.setdefault(number, loop.time()), 0.5
        )  # type: ignore[arg-type]
        begin = loop.time()
        lookups.look(0, [b"k" * 32])
        await asyncio.sleep(0.7)
        assert answered[0] - begin > 0.4
        asked = loop.time()
        for number in range(1, 4):
            lookups.look(number, [b"k" * 32])
        await asyncio.sleep(0.2)
        assert all(answered[number] - asked < 0.2 for number in range(1, 4))
        hanging.set()
        await asyncio.sleep(0.1)
        lookups.look(9, [b"k" * 32])
        await asyncio.sleep(0.1)
        assert 9 in answered
        await lookups.close()

    asyncio.run(asyncio.wait_for(main(), 20))


def test_prompts_that_come_together_are_all_looked_for() -> None:
    async def main() -> None:
        store = open_store("memory:", 1 << 20)
        assert store.write(b"k" * 32, None, memoryview(b"x" * 64)).result() is Outcome.OK
        answered: dict[int, int] = {}
        lookups = StoreLookups(store, answered.__setitem__, 0.5)
        await asyncio.sleep(0.6)
        for burst in range(2):
            for number in range(5 * burst, 5 * burst + 5):
                lookups.look(number, [b"k" * 32])
            await asyncio.sleep(0.6)
        assert answered == dict.fromkeys(range(10), 1)
        await lookups.close()

    asyncio.run(asyncio.wait_for(main(), 20))


class _Hanging:
    """A store whose answers wait for an event."""

    def __init__(self, store: BlockStore, event: threading.Event) -> None:
        self._store, self._event = store, event

    def hits(self, chains: Sequence[Sequence[BlockKey]]) -> list[int]:
        self._event.wait()
        return self._store.hits(chains)

    def close(self) -> None:
        self._store.close()
