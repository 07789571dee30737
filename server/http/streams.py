"""Several streams of an engine as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from server.metrics import ObservedStream


async def merge(streams: Sequence[ObservedStream]) -> AsyncGenerator[Sequence[int]]:
    """Reads all streams to their ends; yields the numbers of those whose output has grown since the last time.

    Close the generator when leaving it early.
    """
    if len(streams) == 1:
        async for _ in streams[0]:
            yield (0,)
        return
    grown: set[int] = set()
    woken = asyncio.Event()
    running = len(streams)

    async def read(number: int) -> None:
        nonlocal running
        try:
            async for _ in streams[number]:
                grown.add(number)
                woken.set()
        finally:
            running -= 1
            woken.set()

    readers = [asyncio.ensure_future(read(number)) for number in range(len(streams))]
    try:
        while running or grown:
            await woken.wait()
            woken.clear()
            if grown:
                numbers = sorted(grown)
                grown.clear()
                yield numbers
        await asyncio.gather(*readers)
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
