"""Several streams read as one."""

import asyncio
import contextlib

import pytest

from server.http.streams import merge


class Steps:
    """A stream that counts up when it is told to."""

    def __init__(self):
        self.reached = 0
        self.goal = 0
        self.ended = False
        self.error = None
        self.closed = False
        self._told = asyncio.Event()

    def tell(self, goal, ended=False, error=None):
        self.goal, self.ended, self.error = goal, ended, error
        self._told.set()

    async def __aiter__(self):
        try:
            while True:
                await self._told.wait()
                self._told.clear()
                if self.error is not None:
                    raise self.error
                if self.reached < self.goal:
                    self.reached = self.goal
                    yield self.reached
                if self.ended:
                    return
        finally:
            self.closed = True


async def within_seconds(work):
    return await asyncio.wait_for(work, 5)


async def settle():
    for _ in range(10):
        await asyncio.sleep(0)


def begun(count):
    streams = [Steps() for _ in range(count)]
    for stream in streams:
        stream.tell(1)
    return streams


@pytest.mark.parametrize("busy", [False, True])
def test_growth_is_told_once_even_while_the_reader_is_busy(busy):
    async def run():
        streams = begun(2)
        seen = []
        async for numbers in merge(streams):
            seen.append([(number, streams[number].reached) for number in numbers])
            if len(seen) == 1:
                streams[0].tell(5, ended=True)
                streams[1].tell(3)
            elif len(seen) == 2:
                streams[1].tell(4, ended=True)
            if busy:
                await settle()
        return seen

    seen = asyncio.run(within_seconds(run()))
    assert seen == [[(0, 1), (1, 1)], [(0, 5), (1, 3)], [(1, 4)]]


@pytest.mark.parametrize("count", [1, 3])
def test_a_failing_stream_s_error_is_passed_on(count):
    async def run():
        streams = begun(count)
        async for _ in merge(streams):
            for stream in streams:
                stream.tell(2, ended=True)
            streams[0].tell(2, error=KeyError("broken"))

    with pytest.raises(KeyError, match="broken"):
        asyncio.run(within_seconds(run()))


def test_leaving_early_leaves_no_reader_behind():
    async def run():
        before = asyncio.all_tasks()
        streams = begun(3)
        async with contextlib.aclosing(merge(streams)) as changes:
            async for _ in changes:
                break
        assert [stream.closed for stream in streams] == [True] * 3
        assert len(asyncio.all_tasks() - before) == 0

    asyncio.run(within_seconds(run()))
