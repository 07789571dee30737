"""Messages between processes over a stream socket.

A message is MessagePack of a struct, after its length as four bytes, least significant first.
"""

from __future__ import annotations

import math
import select
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

_LENGTH = struct.Struct("<I")
_READ_BYTES = 1 << 20


class Message(msgspec.Struct, frozen=True, tag=True):
    """A message; its tag is its class's name."""


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


class MessageSocket:
    """One end of the socket, for a loop that also has other work.

    Args:
      sock: connected stream socket.
      accepted: union of the messages that may come.
      peer: name of the other end, for errors.
    """

    def __init__(self, sock: socket.socket, accepted: Any, peer: str) -> None:
        self._sock = sock
        self._frames = Frames(accepted)
        self._peer = peer

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        self._sock.close()

    def send(self, message: Message) -> None:
        """Sends a message; waits while the other end is far behind.

        Raises:
          OSError: the other end is gone.
        """
        self.send_frame(self.encode(message))

    def encode(self, message: Message) -> bytes:
        """The frame of a message, for this socket or another one."""
        return self._frames.encode(message)

    def send_frame(self, frame: bytes) -> None:
        """See `send`."""
        self._sock.sendall(frame)

    def receive(self, timeout: float | None, beside: Sequence[int] = ()) -> list[Any]:
        """Messages that have come.

        Args:
          timeout: seconds to wait for the first of them, or until something else is to be done; None for as long as it
            takes.
          beside: descriptors that are readable when there is.

        Raises:
          ConnectionError: the other end is gone.
        """
        messages: list[Any] = []
        own = self._sock.fileno()
        if own not in _readable([own, *beside], timeout):
            return messages
        while not messages or _readable([own], 0.0):
            try:
                data = self._sock.recv(_READ_BYTES)
            except OSError as error:  # also that its host doesn't answer
                raise ConnectionError(f"{self._peer}: {error}") from error
            if not data:
                if messages:  # its last words; the next call says that it is gone
                    break
                raise ConnectionError(f"{self._peer} has closed the connection")
            messages += self._frames.feed(data)
        return messages


def _readable(descriptors: Sequence[int], timeout: float | None) -> list[int]:
    """Which of them are, as soon as one is; `select.select` knows descriptors below 1,024 only."""
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return [descriptor for descriptor, _ in poll.poll(None if timeout is None else math.ceil(timeout * 1000))]
