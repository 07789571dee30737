"""On one host: the initiator's thread copies between slabs that both processes have mapped.

Regions that peers may touch lie in a `SharedSlab`, whose descriptor the owner passes over a Unix socket (abstract, so
that nothing is left in the file system) to processes of the same user and nobody else. Bounds and directions are
checked here, at the initiator, against what the owner said when it passed the descriptor; a refusal leaves the channel
usable. That holds peers to the rules, not enemies: whoever runs as this user can write the slab anyway.

**The end.** Closing its end of the socket is the initiator's word that its copying is over, and the kernel gives it for
a process that was killed: descriptors are closed by the last of its threads to end, and a thread that has ended copies
no more. So `PeerLost(peer)` is reported when the socket says so, never earlier: a peer that is stopped (SIGSTOP) keeps
the memory in quarantine until it runs or dies. A stopped target disturbs no writer, since its program takes no part.
"""

from __future__ import annotations

import contextlib
import enum
import mmap
import os
import queue
import secrets
import socket
import struct
import threading
from collections.abc import Buffer
from typing import ClassVar

import numpy as np

from jaxdual.transport.base import Peer, Region, Status, TrafficClass
from jaxdual.transport.events import Transfer
from jaxdual.transport.slab import SharedSlab, map_slab
from jaxdual.transport.sockets import ProtocolError, SocketChannel, SocketTransport

_MESSAGE = struct.Struct("<BBxxIQQQQ")  # kind, flags or class, immediate, then key or slab and extent
_VERSION = b"jaxdual shm 1\n"
_MOST_MESSAGE = 512
_READABLE = 1
_WRITABLE = 2
# Between two looks at whether to stop. Large, since memcpy goes past the caches for more than they hold, twice as fast.
_COPY_BYTES = 64 << 20
_LITTLE_BYTES = 1 << 20  # copied by whoever posts it, if the copying thread is idle: waking it up costs as much
_FEW_OPS = 256
_SEND_SECONDS = 0.05  # between two looks at whether to stop, while the peer's socket is full


class _Kind(enum.IntEnum):
    HELLO = 1  # from the initiator: class, then version and address. Answered by the same kind
    MAP = 2  # from the initiator: key. Answered by the next or the one after
    GRANT = 3  # flags, slab, offset and length; with the descriptor
    REFUSE = 4
    IMMEDIATE = 5  # from the initiator


class _Granted:
    """A peer's region as it is mapped here."""

    def __init__(self, memory: np.ndarray, flags: int) -> None:
        self.memory = memory
        self.flags = flags


class ShmTransport(SocketTransport):
    """The shared-memory carrier.

    Args:
      slabs: in which regions of this transport may lie; they must outlive it.
      connect_seconds: within which a peer must greet.
      most_peers: connections to here.
    """

    carrier: ClassVar[str] = "shm"

    def __init__(self, *slabs: SharedSlab, connect_seconds: float = 5.0, most_peers: int = 1024) -> None:
        self._slabs = slabs
        self._connect_seconds = connect_seconds
        self._places: dict[int, tuple[int, int]] = {}  # by key: index of the slab, offset in it
        self._read_only = [os.open(slab.path, os.O_RDONLY | os.O_CLOEXEC) for slab in slabs]
        address = f"jaxdual-{os.getpid()}-{secrets.token_hex(8)}"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind("\0" + address)
        listener.listen(128)
        super().__init__(listener, address, most_peers=most_peers)
        self._acceptor.start()

    def register(self, buffer: Buffer, *, remote_write: bool = True, remote_read: bool = True) -> Region:
        """See the base; memory outside of the slabs can be registered for this side's use alone."""
        place = None
        for index, slab in enumerate(self._slabs):
            offset = slab.offset_of(buffer)
            if offset is not None:
                place = (index, offset)
        if place is None and (remote_write or remote_read):
            raise ValueError("memory that peers may touch must lie in a slab of this transport")
        region = super().register(buffer, remote_write=remote_write, remote_read=remote_read)
        if place is not None:
            self._places[region.key] = place
        return region

    def close(self) -> None:
        try:
            super().close()
        finally:
            while self._read_only:
                os.close(self._read_only.pop())

    _hang_up_how = socket.SHUT_WR  # asks the peer to stop; what it says to that must still be heard

    def _open_channel(self, peer_address: str, traffic: TrafficClass) -> SocketChannel:
        if not peer_address.startswith("jaxdual-") or "\0" in peer_address:
            raise ValueError(f"{peer_address!r} is not an address of this carrier")
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.settimeout(self._connect_seconds)
            sock.connect("\0" + peer_address)
            _check_user(sock)
            hello = _pack(_Kind.HELLO, traffic) + _VERSION + self.address.encode()
            sock.send(hello)
            if sock.recv(_MOST_MESSAGE) != _pack(_Kind.HELLO, traffic) + _VERSION:
                raise ProtocolError("of another version, or full")
            sock.settimeout(None)
            return ShmChannel(self, sock, peer_address, traffic)
        except ProtocolError as error:
            sock.close()
            raise PermissionError(str(error)) from error
        except BaseException:
            sock.close()
            raise

    def _greet(self, sock: socket.socket) -> tuple[str, TrafficClass]:
        sock.settimeout(self._connect_seconds)
        _check_user(sock)
        hello = sock.recv(_MOST_MESSAGE)
        text = hello[_MESSAGE.size :]
        if len(hello) < _MESSAGE.size or not text.startswith(_VERSION):
            raise ProtocolError("not the hello of this protocol")
        kind, traffic, *_ = _MESSAGE.unpack_from(hello)
        if kind != _Kind.HELLO or traffic not in iter(TrafficClass):
            raise ProtocolError("not the hello of this protocol")
        sock.send(_pack(_Kind.HELLO, traffic) + _VERSION)
        sock.settimeout(None)
        return text[len(_VERSION) :].decode("ascii", "replace"), TrafficClass(traffic)

    def _serve(self, peer: Peer, sock: socket.socket) -> None:
        try:
            while message := sock.recv(_MOST_MESSAGE):
                self._answer(peer, sock, message)
        finally:
            # Whatever went wrong, the peer copies until it has closed its end.
            with contextlib.suppress(OSError):
                sock.shutdown(self._hang_up_how)
            _wait_for_end(sock)

    def _answer(self, peer: Peer, sock: socket.socket, message: bytes) -> None:
        if len(message) != _MESSAGE.size:
            raise ProtocolError(f"a message of {len(message)} bytes")
        kind, _, immediate, key, *_ = _MESSAGE.unpack(message)
        if kind == _Kind.IMMEDIATE:
            self.received(peer, immediate)
        elif kind == _Kind.MAP:
            self._grant(sock, key)
        else:
            raise ProtocolError(f"a message of kind {kind}")

    def _grant(self, sock: socket.socket, key: int) -> None:
        shared, place = self.shared(key), self._places.get(key)
        if shared is None or place is None or not (shared.remote_read or shared.remote_write):
            sock.send(_pack(_Kind.REFUSE))
            return
        index, offset = place
        flags = _READABLE * shared.remote_read | _WRITABLE * shared.remote_write
        fd = self._slabs[index].fd if shared.remote_write else self._read_only[index]
        grant = _pack(_Kind.GRANT, flags, 0, key, index, offset, shared.region.length)
        socket.send_fds(sock, [grant], [fd])


class ShmChannel(SocketChannel):
    """The initiator's end: one thread copies, the other waits for the end and for answers."""

    def __init__(self, transport: ShmTransport, sock: socket.socket, peer_address: str, traffic: TrafficClass) -> None:
        super().__init__(transport, sock, peer_address, traffic)
        self._answers: queue.SimpleQueue[tuple[tuple[int, ...], int] | None] = queue.SimpleQueue()
        self._granted: dict[int, _Granted] = {}
        self._mapped: dict[tuple[int, bool], mmap.mmap] = {}  # by slab, and whether writable
        self._turn = threading.Lock()  # of whoever copies for the one that posts, and of the end of all copying
        self._over = False
        _give_up_sending(sock)

    def _interrupt(self) -> None:
        self._answers.put(None)

    def _start(self, transfer: Transfer) -> Status | None:
        little = transfer.ticket.nbytes <= _LITTLE_BYTES and len(transfer.ops) <= _FEW_OPS
        waits = transfer.immediate is not None or transfer.remote.key not in self._granted
        if little and not waits and self._ledger.idle_but_for(transfer.ticket):
            with self._turn:
                status = None if self._over else self._copy(transfer)
            if status is not None:
                return status
        return super()._start(transfer)

    def _move_all(self) -> None:
        try:
            while (transfer := self._transfers.get()) is not None and not self._stopping:
                status = self._copy(transfer)
                if status is None:
                    return
                self._ledger.complete(transfer.ticket.number, status)
        finally:
            with self._turn:
                self._over = True

    def _copy(self, transfer: Transfer) -> Status | None:
        """Moves a transfer; None if it was interrupted."""
        if transfer.ops:
            granted = self._grant(transfer.remote.key)
            if self._stopping:
                return None
            need = _WRITABLE if transfer.write else _READABLE
            if granted is None or not granted.flags & need:
                return Status.ACCESS
            there = granted.memory
            if any(op.remote + op.length > there.nbytes for op in transfer.ops):
                return Status.ACCESS
            here = np.frombuffer(transfer.region.buffer, np.uint8)
            for op in transfer.ops:
                for start in range(0, op.length, _COPY_BYTES):
                    if self._stopping:
                        return None
                    count = min(_COPY_BYTES, op.length - start)
                    local = here[op.local + start : op.local + start + count]
                    remote = there[op.remote + start : op.remote + start + count]
                    if transfer.write:
                        np.copyto(remote, local)
                    else:
                        np.copyto(local, remote)
        if transfer.immediate is not None and not self._send(_pack(_Kind.IMMEDIATE, 0, transfer.immediate)):
            return None
        return None if self._stopping else Status.OK

    def _grant(self, key: int) -> _Granted | None:
        """The peer's region, asked for when it is first used; None if it is refused."""
        if key in self._granted:
            return self._granted[key]
        # One that was refused is asked for again: the peer may have registered it in the meantime.
        if not self._send(_pack(_Kind.MAP, 0, 0, key)):
            return None
        answer = self._answers.get()
        if answer is None:
            return None
        (kind, flags, _, _, slab, offset, length), fd = answer
        if kind == _Kind.REFUSE:
            return None
        try:
            writable = bool(flags & _WRITABLE)
            if (slab, writable) not in self._mapped:
                self._mapped[slab, writable] = map_slab(fd, writable=writable)
            mapped = self._mapped[slab, writable]
            if offset + length > len(mapped):
                raise ProtocolError("a region beyond its slab")
            memory = np.frombuffer(mapped, np.uint8, length, offset)
        except ValueError as error:
            raise ProtocolError(str(error)) from error
        finally:
            os.close(fd)
        granted = self._granted[key] = _Granted(memory, flags)
        return granted

    def _send(self, message: bytes) -> bool:
        """Sends a message, or gives up when the channel ends."""
        while not self._stopping:
            with contextlib.suppress(BlockingIOError):
                self._socket.send(message)
                return True
        return False

    def _listen_all(self) -> None:
        while True:
            message, fd = _receive_with_fd(self._socket)
            if not message:
                return
            if len(message) != _MESSAGE.size:
                raise ProtocolError(f"a message of {len(message)} bytes")
            fields = _MESSAGE.unpack(message)
            if fields[0] not in (_Kind.GRANT, _Kind.REFUSE) or (fields[0] == _Kind.GRANT) != (fd >= 0):
                raise ProtocolError(f"a message of kind {fields[0]}")
            self._answers.put((fields, fd))

    def _release(self) -> None:
        self._granted.clear()
        for mapped in self._mapped.values():
            mapped.close()
        self._mapped.clear()
        with contextlib.suppress(queue.Empty):
            while True:
                answer = self._answers.get_nowait()
                if answer is not None and answer[1] >= 0:
                    os.close(answer[1])


def _pack(
    kind: _Kind, flags: int = 0, immediate: int = 0, key: int = 0, slab: int = 0, offset: int = 0, length: int = 0
) -> bytes:
    return _MESSAGE.pack(kind, flags, immediate, key, slab, offset, length)


def _check_user(sock: socket.socket) -> None:
    """Raises `ProtocolError` unless the other end is a process of this user."""
    _, user, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if user != os.geteuid():
        raise ProtocolError(f"a process of user {user}")


def _give_up_sending(sock: socket.socket) -> None:
    """Has a send return after `_SEND_SECONDS` at the latest."""
    interval = struct.pack("@ll", 0, int(_SEND_SECONDS * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, interval)


def _receive_with_fd(sock: socket.socket) -> tuple[bytes, int]:
    """A message, and the descriptor that came with it, or -1."""
    message, fds, _, _ = socket.recv_fds(sock, _MOST_MESSAGE, 1, socket.MSG_CMSG_CLOEXEC)
    return message, fds[0] if fds else -1


def _wait_for_end(sock: socket.socket) -> None:
    """Returns when the other end is closed, whatever is still said before."""
    with contextlib.suppress(OSError):
        while sock.recv(_MOST_MESSAGE):
            pass
