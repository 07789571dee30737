"""Messages between a front and an engine process, and the socket that carries them.

A message is MessagePack of one of the structs here, after its length as four bytes, least significant first.
"""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Iterator
from typing import Any

import msgspec

from jaxdual.config import EngineConfig
from jaxdual.engine.request import Request, TokenEvent
from jaxdual.outputs import EngineInfo, EngineStats

_LENGTH = struct.Struct("<I")
_READ_BYTES = 1 << 20


class Message(msgspec.Struct, frozen=True, tag=True):
    """A message; its tag is its class's name."""


# From the front.


class Start(Message, frozen=True, tag=True):
    """The first message: which engine to be. Answered by `Ready` or `StartFailed`."""

    config: EngineConfig


class Add(Message, frozen=True, tag=True):
    """Queues a request. Answered by `Events`."""

    request: Request


class Abort(Message, frozen=True, tag=True):
    """Ends a request, or one of its outputs; unknown ids are ignored."""

    request_id: str
    index: int | None = None


class Ask(Message, frozen=True, tag=True):
    """Asks for `EngineStats`, after a check of all accounting if `check_integrity`. Answered by `Answer`."""

    number: int
    check_integrity: bool = False


class Stop(Message, frozen=True, tag=True):
    """The last message: end the process."""


# From the engine.


class Ready(Message, frozen=True, tag=True):
    """Requests are served from now on; shapes that are not compiled yet are compiled between them."""

    info: EngineInfo
    stats: EngineStats


class StartFailed(Message, frozen=True, tag=True):
    """No engine can be made. `kind` is the name of the error: `ConfigError`, `ModelError`, or another."""

    kind: str
    message: str


class Compiled(Message, frozen=True, tag=True):
    """A program's shape is compiled, and the seconds that it took; `last` once all are."""

    name: str
    seconds: float
    last: bool


class Events(Message, frozen=True, tag=True):
    """What a step gave; figures come along about ten times a second."""

    events: list[TokenEvent]
    stats: EngineStats | None


class Answer(Message, frozen=True, tag=True):
    """The answer to `Ask`; `error` says what the check found."""

    number: int
    stats: EngineStats
    error: str | None


class Died(Message, frozen=True, tag=True):
    """The last message of an engine that has failed: why."""

    message: str


ToEngine = Start | Add | Abort | Ask | Stop
ToFront = Ready | StartFailed | Compiled | Events | Answer | Died


class Frames:
    """Messages of one direction as bytes, and back, however the bytes are cut on their way.

    Args:
      accepted: union of the messages that may come.
    """

    def __init__(self, accepted: Any) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(accepted)
        self._buffer = bytearray()

    def encode(self, message: Message) -> bytes:
        """The frame of a message."""
        frame = bytearray(_LENGTH.size)
        self._encoder.encode_into(message, frame, _LENGTH.size)
        _LENGTH.pack_into(frame, 0, len(frame) - _LENGTH.size)
        return bytes(frame)

    def feed(self, data: bytes) -> Iterator[Any]:
        """The messages that are complete with these bytes.

        Raises:
          msgspec.DecodeError: not a message of this direction: the two sides are of different versions.
        """
        buffer = self._buffer
        buffer += data
        start = 0
        while len(buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer, start)
            end = start + _LENGTH.size + length
            if len(buffer) < end:
                break
            message = self._decoder.decode(memoryview(buffer)[start + _LENGTH.size : end].tobytes())
            start = end
            yield message
        del buffer[:start]


class Channel:
    """The engine's end of the socket, for a loop that also has other work.

    Args:
      sock: connected stream socket.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._frames = Frames(ToEngine)

    def send(self, message: Message) -> None:
        """Sends a message; waits while the front is far behind.

        Raises:
          OSError: the front is gone.
        """
        self._sock.sendall(self._frames.encode(message))

    def receive(self, *, wait: bool) -> list[Any]:
        """Messages that have come; with `wait`, at least one.

        Raises:
          ConnectionError: the front is gone.
        """
        messages: list[Any] = []
        while (wait and not messages) or select.select([self._sock], [], [], 0)[0]:
            data = self._sock.recv(_READ_BYTES)
            if not data:
                raise ConnectionError("the front has closed the connection")
            messages += self._frames.feed(data)
        return messages
