"""A request under way, as its reader on an asyncio loop sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol, Self

from jaxdual.outputs import RequestOutput


class AnswerStream(Protocol):
    """What readers of a request need of its stream, a `RequestStream` or one around it."""

    @property
    def output(self) -> RequestOutput:
        """The output so far."""

    def __aiter__(self) -> Self: ...

    async def __anext__(self) -> RequestOutput: ...

    def close(self) -> None:
        """Ends the request, if it has not finished."""


class RequestStream:
    """A request under way: iterating gives its output each time that it has grown, the last time finished.

    It is the same object each time, which changes only between two awaits; what comes while the reader is busy is
    merged. Iterating never raises for a failed engine: the outputs then end with `finish_reason` "error".

    Attributes:
      output: the output so far.
    """

    def __init__(self, output: RequestOutput, close: Callable[[RequestStream], None]) -> None:
        self.output = output
        self._close = close
        self._changed = False
        self._ended = False
        self._waiter: asyncio.Future[None] | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._ended:
            raise StopAsyncIteration
        if self._waiter is not None and not self._waiter.done():
            raise RuntimeError("a stream has one reader at a time")
        while not self._changed:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        self._changed = False
        self._ended = self.output.finished
        return self.output

    def close(self) -> None:
        """Ends the request, if it has not finished."""
        if not self.output.finished:
            self._close(self)

    def wake(self) -> None:
        """Tells the reader that the output has changed."""
        self._changed = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
