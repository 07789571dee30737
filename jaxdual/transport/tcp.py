"""Between hosts, over TCP: one connection per peer and class of traffic, bytes straight from memory to memory.

Who may connect knows the shared secret; nothing is encrypted, so this is for a network that its owner trusts to be
read. A malformed message ends the connection and touches no memory; one that names a wrong region or offset is answered
with `ACCESS`, and the channel stays usable. A write of more than `frames.MOST_OPS` ops is checked in parts of so many:
those before the refused one have landed.

The target's thread writes into memory, so `PeerLost` needs nothing of the initiator: it is reported when the connection
is closed, when `disconnect` has cut it, or when nothing was heard for `TcpSettings.silence_seconds`, since both sides
say at least that they are alive. The same holds for a channel whose peer is stopped or has vanished.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import struct
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from jaxdual.transport.base import Op, Peer, Region, Status, TrafficClass
from jaxdual.transport.events import Transfer
from jaxdual.transport.frames import (
    IMMEDIATE,
    LAST,
    MOST_OPS,
    OP_BYTES,
    REPLY,
    REQUEST,
    Line,
    Reply,
    Request,
    greet_as_initiator,
    greet_as_target,
)
from jaxdual.transport.internet import check_secret, listen, socket_to
from jaxdual.transport.lanes import DSCP
from jaxdual.transport.sockets import ProtocolError, SocketChannel, SocketTransport

_SCRAP_BYTES = 1 << 20
_LITTLE_BYTES = 1 << 20
_FEW_OPS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class TcpSettings:
    """Limits of a TCP transport.

    Attributes:
      connect_seconds: within which a connection is there and both sides have greeted.
      silence_seconds: after which a peer that says nothing is taken for gone.
      buffer_bytes: of the kernel, per connection and direction; None leaves them to it.
      dscp: code point of each class, 0 to 63.
      most_peers: connections to here.
    """

    connect_seconds: float = 5.0
    silence_seconds: float = 10.0
    buffer_bytes: int | None = 4 << 20
    dscp: Mapping[TrafficClass, int] = field(default_factory=lambda: DSCP)
    most_peers: int = 1024

    def __post_init__(self) -> None:
        for name in ("connect_seconds", "silence_seconds"):
            if not 0 < (value := getattr(self, name)) < 86400:
                raise ValueError(f"{name}={value} must be above 0 and below a day")
        if self.buffer_bytes is not None and self.buffer_bytes < 4096:
            raise ValueError(f"buffer_bytes={self.buffer_bytes} must be at least 4096")
        for traffic in TrafficClass:
            if not 0 <= self.dscp.get(traffic, -1) < 64:
                raise ValueError(f"dscp={dict(self.dscp)} must have 0 to 63 for {traffic.name}")
        if self.most_peers < 1:
            raise ValueError(f"most_peers={self.most_peers} must be at least 1")


class TcpTransport(SocketTransport):
    """The TCP carrier; any contiguous memory can be registered.

    Args:
      secret: that all peers share, at least 16 bytes.
      host: to listen on: an address of this machine that peers can reach.
      port: 0 for a free one.
      settings: limits.

    Raises:
      ValueError: the secret is too short.
      OSError: can't listen there.
    """

    carrier: ClassVar[str] = "tcp"

    def __init__(
        self, secret: bytes, host: str = "127.0.0.1", port: int = 0, settings: TcpSettings | None = None
    ) -> None:
        check_secret(secret)
        self._secret = secret
        self.settings = settings or TcpSettings()
        listener, address = listen(host, port)
        self._set_buffers(listener)  # connections take them over, and with them the window that they can offer
        super().__init__(listener, address, most_peers=self.settings.most_peers)
        self._acceptor.start()

    def _open_channel(self, peer_address: str, traffic: TrafficClass) -> SocketChannel:
        deadline = time.monotonic() + self.settings.connect_seconds
        sock, target = socket_to(peer_address)
        try:
            self._set_buffers(sock)
            self._set_options(sock, traffic)
            sock.settimeout(self.settings.connect_seconds)
            sock.connect(target)
            greet_as_initiator(sock, self._secret, self.address, traffic, deadline)
            return TcpChannel(self, sock, peer_address, traffic)
        except BaseException:
            sock.close()
            raise

    def _greet(self, sock: socket.socket) -> tuple[str, TrafficClass]:
        address, traffic = greet_as_target(sock, self._secret, self.settings.connect_seconds)
        self._set_options(sock, traffic)
        return address, traffic

    def _serve(self, peer: Peer, sock: socket.socket) -> None:
        Target(self, peer, sock).serve()

    def _set_buffers(self, sock: socket.socket) -> None:
        if self.settings.buffer_bytes is not None:
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                sock.setsockopt(socket.SOL_SOCKET, option, self.settings.buffer_bytes)

    def _set_options(self, sock: socket.socket, traffic: TrafficClass) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, int(self.settings.silence_seconds * 1000)))
        tos = self.settings.dscp[traffic] << 2
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, tos)
        else:
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, tos)


class TcpChannel(SocketChannel):
    """The initiator's end: one thread sends requests, the other receives replies and what was read."""

    def __init__(self, transport: TcpTransport, sock: socket.socket, peer_address: str, traffic: TrafficClass) -> None:
        super().__init__(transport, sock, peer_address, traffic)
        silence = transport.settings.silence_seconds
        self._ping_seconds = silence / 4
        self._line = Line(sock, silence, patient=True)
        self._sent: queue.SimpleQueue[Transfer] = queue.SimpleQueue()
        self._turn = threading.Lock()  # to say something, if the mover has nothing to move
        self._queued = 0  # transfers that it has
        self._rest: list[memoryview] = []  # what is left of the first of them, if it has begun

    def _interrupt(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _start(self, transfer: Transfer) -> Status | None:
        # A thread less to wake up, for a transfer that costs about as much as that.
        little = len(transfer.ops) <= _FEW_OPS and (not transfer.write or transfer.ticket.nbytes <= _LITTLE_BYTES)
        with self._turn:
            if little and not self._queued and not self._stopping:
                self._sent.put(transfer)
                self._rest = self._line.send_now(_request(transfer, transfer.ops, True))
                if not self._rest:
                    return None
            self._queued += 1
        return super()._start(transfer)

    def _move_all(self) -> None:
        alive = REQUEST.pack(Request.ALIVE, 0, 0, 0, 0, 0, 0, 0)
        while True:
            try:
                transfer = self._transfers.get(timeout=self._ping_seconds)
            except queue.Empty:
                with self._turn:
                    if not self._queued:
                        self._line.send_now([alive])
                continue
            if transfer is None or self._stopping:
                return
            if self._rest:
                self._line.send(self._rest)
                self._rest = []
            else:
                self._sent.put(transfer)
                for ops, last in _parts(transfer.ops):
                    self._line.send(_request(transfer, ops, last))
            with self._turn:
                self._queued -= 1

    def _release(self) -> None:
        with self._turn:
            self._rest = []

    def _listen_all(self) -> None:
        while (reply := self._next_reply()) is not None:
            try:
                transfer = self._sent.get_nowait()
            except queue.Empty:
                raise ProtocolError("a reply to no request") from None
            if transfer.write:
                status = _status(transfer, reply)
            else:
                status = self._receive_data(transfer, reply)
            self._ledger.complete(transfer.ticket.number, status)

    def _next_reply(self) -> tuple[int, int, int] | None:
        """Kind, status and ticket of what comes next, or None at the end."""
        head = bytearray(REPLY.size)
        while self._line.receive([memoryview(head)]):
            kind, status, _, _, number = REPLY.unpack(head)
            if kind != Reply.ALIVE:
                return kind, status, number
        return None

    def _receive_data(self, transfer: Transfer, reply: tuple[int, int, int] | None) -> Status:
        """Receives what a read brings, its first reply's head being there."""
        worst = Status.OK
        for ops, last in _parts(transfer.ops):
            if reply is None:
                raise ProtocolError("closed instead of data")
            status = _status(transfer, reply)
            worst = max(worst, status)
            if status is Status.OK and not self._line.receive(_views(transfer.region, ops)):
                raise ProtocolError("closed instead of data")
            if not last:
                reply = self._next_reply()
        return worst


def _status(transfer: Transfer, reply: tuple[int, int, int]) -> Status:
    kind, status, number = reply
    expected = Reply.WRITTEN if transfer.write else Reply.DATA
    if kind != expected or number != transfer.ticket.number or status not in (Status.OK, Status.ACCESS):
        raise ProtocolError("a reply to another request")
    return Status(status)


class Target:
    """The passive end of one connection: takes requests, moves their bytes to and from the regions, replies."""

    def __init__(self, transport: TcpTransport, peer: Peer, sock: socket.socket) -> None:
        silence = transport.settings.silence_seconds
        self._transport = transport
        self._peer = peer
        self._line = Line(sock, silence, on_wait=self._say_alive)
        self._alive_seconds = silence / 4
        self._said = time.monotonic()
        self._scrap = memoryview(bytearray(0))

    def serve(self) -> None:
        """Returns when the peer has closed.

        Raises:
          ProtocolError: it sent what it may not.
          OSError: the connection broke, or silence.
        """
        head = bytearray(REQUEST.size)
        view = [memoryview(head)]
        refused = False  # a part of the transfer whose last part is still to come
        while self._line.receive(view):
            kind, flags, count, immediate, ticket, key, offset, length = REQUEST.unpack(head)
            if kind == Request.ALIVE:
                self._reply(REPLY.pack(Reply.ALIVE, 0, 0, 0, 0))
                continue
            known = kind == Request.READ and flags in (0, LAST)
            known = known or (kind == Request.WRITE and flags in (0, LAST, LAST | IMMEDIATE))
            if not known or count > MOST_OPS:
                raise ProtocolError(f"request of kind {kind} with flags {flags} and {count} ops")
            extents = [(offset, length), *self._further(count - 1)] if count else []
            if not all(size for _, size in extents):
                raise ProtocolError("an empty op")
            region = self._region(key, extents, write=kind == Request.WRITE)
            refused = refused or region is None
            ops = [Op(remote, remote, length) for remote, length in extents]
            if kind == Request.READ:
                status = Status.ACCESS if region is None else Status.OK
                data = [] if region is None else _views(region, ops)
                self._reply(REPLY.pack(Reply.DATA, status, 0, 0, ticket), *data)
            else:
                if region is None or refused:
                    self._discard(sum(op.length for op in ops))
                elif ops and not self._line.receive(_views(region, ops)):
                    raise ProtocolError("closed instead of data")
                if flags & LAST:
                    if flags & IMMEDIATE and not refused:
                        self._transport.received(self._peer, immediate)
                    self._reply(REPLY.pack(Reply.WRITTEN, Status.ACCESS if refused else Status.OK, 0, 0, ticket))
            if flags & LAST:
                refused = False

    def _further(self, count: int) -> list[tuple[int, int]]:
        """Remote offsets and lengths of a request's ops after the first."""
        if not count:
            return []
        data = bytearray(count * OP_BYTES)
        if not self._line.receive([memoryview(data)]):
            raise ProtocolError("closed instead of ops")
        return [(offset, length) for offset, length in struct.iter_unpack("<QQ", data)]

    def _region(self, key: int, extents: list[tuple[int, int]], *, write: bool) -> Region | None:
        """The region, if the peer may do this with all these bytes of it."""
        shared = self._transport.shared(key)
        if shared is None or not (shared.remote_write if write else shared.remote_read):
            return None
        length = shared.region.length
        return shared.region if all(offset + size <= length for offset, size in extents) else None

    def _discard(self, nbytes: int) -> None:
        if not self._scrap:
            self._scrap = memoryview(bytearray(_SCRAP_BYTES))
        while nbytes:
            part = self._scrap[: min(nbytes, _SCRAP_BYTES)]
            if not self._line.receive([part]):
                raise ProtocolError("closed instead of data")
            nbytes -= part.nbytes

    def _reply(self, head: bytes, *data: memoryview) -> None:
        self._line.send([head, *data])
        self._said = time.monotonic()

    def _say_alive(self) -> None:
        if time.monotonic() - self._said >= self._alive_seconds:
            self._reply(REPLY.pack(Reply.ALIVE, 0, 0, 0, 0))


def _request(transfer: Transfer, ops: list[Op], last: bool) -> list[bytes | memoryview]:
    """A request for some ops of a transfer, with their bytes if it is a write."""
    kind = Request.WRITE if transfer.write else Request.READ
    flags, immediate = (LAST if last else 0), 0
    if last and transfer.immediate is not None:
        flags, immediate = flags | IMMEDIATE, transfer.immediate
    _, offset, length = ops[0] if ops else (0, 0, 0)
    head = REQUEST.pack(kind, flags, len(ops), immediate, transfer.ticket.number, transfer.remote.key, offset, length)
    if len(ops) > 1:
        extents = [number for op in ops[1:] for number in (op.remote, op.length)]
        head += struct.pack(f"<{len(extents)}Q", *extents)
    views: list[bytes | memoryview] = [head]
    if transfer.write:
        views += _views(transfer.region, ops)
    return views


def _parts(ops: list[Op]) -> list[tuple[list[Op], bool]]:
    """The ops of each request of a transfer, and whether it is the last; at least one."""
    starts = range(0, len(ops), MOST_OPS) or (0,)
    return [(ops[start : start + MOST_OPS], start + MOST_OPS >= len(ops)) for start in starts]


def _views(region: Region, ops: list[Op]) -> list[memoryview]:
    return [region.buffer[op.local : op.local + op.length] for op in ops]
