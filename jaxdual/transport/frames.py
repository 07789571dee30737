"""The TCP carrier's messages, and a socket that moves them straight from and to memory.

The initiator sends requests, the target answers with replies. Integers are least significant byte first.

    request   kind u8, flags u8, ops u16, immediate u32, ticket u64, region key u64, the first op's remote offset u64
              and length u64; then those of each further op; then, for a write, the bytes of all ops
    reply     kind u8, status u8, u16, u32, ticket u64; then, for data with status OK, the bytes of all ops of a read

A transfer is one request, or several if it has more than `MOST_OPS` ops; the last one has the flag `LAST`. A write is
answered once, a read once a request. Either side says `ALIVE` when it has had nothing to say for a while.

Before that the two show each other that they know the secret, which is never sent:

    target     MAGIC, 32 random bytes
    initiator  MAGIC, traffic class u8, length of its address u8, 32 random bytes, its address;
               HMAC over the target's random bytes and all this
    target     HMAC over the initiator's random bytes
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
import hmac
import os
import socket
import struct
import time
from collections.abc import Callable, Sequence

from jaxdual.transport.base import TrafficClass
from jaxdual.transport.sockets import ProtocolError

REQUEST = struct.Struct("<BBHIQQQQ")
REPLY = struct.Struct("<BBHIQ")
OP_BYTES = 16
MOST_OPS = 4096
LAST = 1
IMMEDIATE = 2

_MAGIC = b"jaxdual transport 1\n"
_HELLO = struct.Struct(f"<{len(_MAGIC)}sBB32s")
_DIGEST = 32
_MOST_VIEWS = 512  # the kernel takes 1024 a call


class Request(enum.IntEnum):
    WRITE = 1
    READ = 2
    ALIVE = 3


class Reply(enum.IntEnum):
    WRITTEN = 1
    DATA = 2
    ALIVE = 3


class Line:
    """A connected socket on which something is heard at least every `silence` seconds, or it is given up.

    Args:
      sock: blocking.
      silence: seconds.
      on_wait: called now and then while a message is being received.
      patient: sending is never given up; whoever receives decides.
    """

    def __init__(
        self, sock: socket.socket, silence: float, *, on_wait: Callable[[], None] | None = None, patient: bool = False
    ) -> None:
        self._socket = sock
        self._silence = silence
        self._on_wait = on_wait
        self._patient = patient
        self._heard = time.monotonic()
        # Calls return within this time with whatever they have moved.
        microseconds = max(1, int(silence / 4 * 1e6))
        interval = struct.pack("@ll", *divmod(microseconds, 1_000_000))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, interval)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, interval)

    def receive(self, views: list[memoryview]) -> bool:
        """Fills memory with what comes; False if the other side has closed instead of beginning.

        Raises:
          ProtocolError: it closed in the middle.
          TimeoutError: silence.
          OSError: the connection broke.
        """
        begun = False
        views = views[::-1]
        while views:
            try:
                if len(views) == 1:
                    count = self._socket.recv_into(views[0], 0, socket.MSG_WAITALL)
                else:
                    count = self._socket.recvmsg_into(views[: -_MOST_VIEWS - 1 : -1], 0, socket.MSG_WAITALL)[0]
            except BlockingIOError:
                if time.monotonic() - self._heard > self._silence:
                    raise TimeoutError(f"nothing heard for {self._silence:g} s") from None
            else:
                if not count:
                    if begun:
                        raise ProtocolError("the connection was closed within a message")
                    return False
                begun = True
                self._heard = time.monotonic()
                _drop(views, count)
            if self._on_wait is not None:
                self._on_wait()
        return True

    def send_now(self, views: Sequence[bytes | memoryview]) -> list[memoryview]:
        """Sends what the kernel takes without waiting; what is left, in order."""
        left = [memoryview(view) for view in reversed(views)]
        with contextlib.suppress(OSError):  # full; if it is broken, whoever sends the rest finds out
            _drop(left, self._socket.sendmsg(left[: -_MOST_VIEWS - 1 : -1], (), socket.MSG_DONTWAIT))
        return left[::-1]

    def send(self, views: Sequence[bytes | memoryview]) -> None:
        """Sends memory.

        Raises:
          TimeoutError: the other side takes nothing.
          OSError: the connection broke.
        """
        left = [memoryview(view) for view in reversed(views)]
        moved = time.monotonic()
        while left:
            try:
                if len(left) == 1:
                    count = self._socket.send(left[0])
                else:
                    count = self._socket.sendmsg(left[: -_MOST_VIEWS - 1 : -1])
            except BlockingIOError:
                if not self._patient and time.monotonic() - moved > self._silence:
                    raise TimeoutError(f"nothing taken for {self._silence:g} s") from None
            else:
                _drop(left, count)
                moved = time.monotonic()


def _drop(views: list[memoryview], count: int) -> None:
    """Takes `count` bytes from the front of views that are in reverse order."""
    while count and views[-1].nbytes <= count:
        count -= views.pop().nbytes
    if count:
        views[-1] = views[-1][count:]


def greet_as_target(sock: socket.socket, secret: bytes, seconds: float) -> tuple[str, TrafficClass]:
    """The initiator's address and class.

    Raises:
      ProtocolError: it doesn't know the secret.
      OSError: it was too slow, or is gone.
    """
    deadline = time.monotonic() + seconds
    challenge = os.urandom(32)
    sock.settimeout(seconds)
    sock.sendall(_MAGIC + challenge)
    hello = _exactly(sock, _HELLO.size, deadline)
    magic, traffic, address_bytes, answer = _HELLO.unpack(hello)
    if magic != _MAGIC or traffic not in iter(TrafficClass):
        raise ProtocolError("not the hello of this protocol")
    address = _exactly(sock, address_bytes, deadline)
    if not hmac.compare_digest(
        _exactly(sock, _DIGEST, deadline), _digest(secret, b"initiator", challenge + hello + address)
    ):
        raise ProtocolError("wrong secret")
    sock.sendall(_digest(secret, b"target", answer))
    sock.settimeout(None)
    return address.decode("ascii", "replace"), TrafficClass(traffic)


def greet_as_initiator(
    sock: socket.socket, secret: bytes, address: str, traffic: TrafficClass, deadline: float
) -> None:
    """Shows the target the secret, and has it show that it knows it.

    Raises:
      PermissionError: one of us doesn't know it.
      OSError: too slow, or gone.
    """
    try:
        challenge = _exactly(sock, len(_MAGIC) + 32, deadline)
        if not challenge.startswith(_MAGIC):
            raise ProtocolError("what answers there is something else")
        nonce = os.urandom(32)
        hello = _HELLO.pack(_MAGIC, traffic, len(address), nonce) + address.encode("ascii")
        sock.sendall(hello + _digest(secret, b"initiator", challenge[len(_MAGIC) :] + hello))
        if not hmac.compare_digest(_exactly(sock, _DIGEST, deadline), _digest(secret, b"target", nonce)):
            raise ProtocolError("the peer doesn't know the secret")
    except ProtocolError as error:
        raise PermissionError(f"not let in, is the secret the same? {error}") from error
    sock.settimeout(None)


def _digest(secret: bytes, role: bytes, data: bytes) -> bytes:
    return hmac.digest(secret, role + b":" + data, hashlib.sha256)


def _exactly(sock: socket.socket, count: int, deadline: float) -> bytes:
    data = b""
    while len(data) < count:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("no greeting in time")
        sock.settimeout(left)
        part = sock.recv(count - len(data))
        if not part:
            raise ProtocolError("the connection was closed instead of a greeting")
        data += part
    return data
