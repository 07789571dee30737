"""The verbs carrier's control connection: what is said over it once both sides have greeted.

Each side says its queue pair (`Endpoint`). Then messages of one form; integers are least significant byte first:

    kind u8, flags u8, u16, the device's key u32, the transport's key u64, address u64, bytes u64

The initiator asks (`MAP`) for one region at a time, by the transport's key; the target answers (`GRANT`) with all
fields, or without flags if the peer may not have it.
"""

from __future__ import annotations

import enum
import socket
import struct
import time
from typing import NamedTuple

from jaxdual.transport.queue_pair import Endpoint
from jaxdual.transport.sockets import ProtocolError

READABLE = 1
WRITABLE = 2
_MESSAGE = struct.Struct("<BBxxIQQQ")
MESSAGE_BYTES = _MESSAGE.size


class Kind(enum.IntEnum):
    MAP = 1
    GRANT = 2


class Message(NamedTuple):
    """A message; `remote_key` is the device's, `key` the transport's."""

    kind: int
    flags: int
    remote_key: int
    key: int
    address: int
    length: int

    def pack(self) -> bytes:
        """For `parse`."""
        return _MESSAGE.pack(*self)


def parse(data: bytes, kind: Kind) -> Message:
    """Raises `ProtocolError` unless `data` is a whole message of that kind."""
    if len(data) != MESSAGE_BYTES:
        raise ProtocolError("the connection was closed within a message")
    message = Message(*_MESSAGE.unpack(data))
    if message.kind != kind:
        raise ProtocolError(f"a message of kind {message.kind}")
    return message


def watch_host(sock: socket.socket, seconds: float) -> None:
    """Has the kernel find out when the other host is gone, also while the programs are stopped."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, int(seconds / 2))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, int(seconds / 4))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1000))


def receive_endpoint(sock: socket.socket, deadline: float) -> Endpoint:
    """The other side's queue pair.

    Raises:
      ProtocolError: something else came.
      OSError: nothing came in time.
    """
    data = b""
    while len(data) < Endpoint.nbytes:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("no queue pair in time")
        sock.settimeout(left)
        try:
            part = sock.recv(Endpoint.nbytes - len(data))
        except ConnectionResetError:  # closed with something of ours unread
            part = b""
        if not part:
            raise ProtocolError("the connection was closed instead of a queue pair")
        data += part
    sock.settimeout(None)
    try:
        return Endpoint.unpack(data)
    except ValueError as error:
        raise ProtocolError(str(error)) from error
