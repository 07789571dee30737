"""Between hosts, over RDMA: the NICs move the bytes, by one reliable queue pair per peer and class of traffic.

A control connection (TCP) belongs to each queue pair. Over it the two show each other that they know the secret, tell
each other their queue pairs, and the initiator asks for a region's key and bounds when it first uses it. So bounds and
directions are checked here, at the initiator, against what the owner said, and a refusal leaves the channel usable; the
target's NIC checks them once more, and a refusal by it breaks the channel, as verbs have it. Nothing is encrypted, and
who can forge packets on the network needs no secret: this is for a network that its owner trusts.

Transfers are cut into messages and posted in batches of at most half the send queue, of which the last one is
signalled. An immediate comes with the last message of its write.

**The end.** `PeerLost(peer)` needs neither the initiator's program nor its host: when the control connection has ended
(the kernel's probes find out about a host that is gone) or `disconnect` has cut it, the target destroys its queue pair,
and reports it only then. No packet can touch memory by a queue pair that is no more. Likewise a channel stops its queue
pair, waits until the device has given back what was posted, and destroys it, before its tickets end and `close`
returns. A program that is stopped (SIGSTOP) disturbs nobody: its NIC goes on to serve and to send.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Buffer, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

from jaxdual.transport.base import Peer, Region, Status, TrafficClass
from jaxdual.transport.events import Transfer
from jaxdual.transport.frames import greet_as_initiator, greet_as_target
from jaxdual.transport.internet import check_secret, listen, socket_to
from jaxdual.transport.lanes import DSCP, SERVICE_LEVEL
from jaxdual.transport.queue_pair import Completion, Outcome, Path, QueuePair, SendRequest
from jaxdual.transport.rdma_device import Device, Memory, device_at
from jaxdual.transport.sockets import ProtocolError, SocketChannel, SocketTransport
from jaxdual.transport.verbs_control import (
    MESSAGE_BYTES,
    READABLE,
    WRITABLE,
    Kind,
    Message,
    parse,
    receive_endpoint,
    watch_host,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class VerbsSettings:
    """Limits of a verbs transport.

    Attributes:
      connect_seconds: within which a connection is there and both sides have greeted.
      silence_seconds: after which a host that doesn't answer is taken for gone; at least 4.
      port: of the device, counted from 1.
      gid_index: entry of the port's table of addresses; None for that of RoCE v2 over IPv4.
      message_bytes: of one work request, at most.
      send_depth: work requests of a channel that are posted at once.
      receive_depth: immediates of a peer that the device takes before the program has seen them; more wait.
      ack_timeout: of the device, 4.096 us * 2**ack_timeout; 1 to 31.
      retries: how often a packet is sent again without an answer; 0 to 7.
      dscp: code point of each class (RoCE v2), 0 to 63.
      service_level: of each class, 0 to 15 (InfiniBand), or priority, 0 to 7 (RoCE).
      most_peers: connections to here.
    """

    connect_seconds: float = 5.0
    silence_seconds: float = 10.0
    port: int = 1
    gid_index: int | None = None
    message_bytes: int = 1 << 20
    send_depth: int = 128
    receive_depth: int = 128
    ack_timeout: int = 14
    retries: int = 7
    dscp: Mapping[TrafficClass, int] = field(default_factory=lambda: DSCP)
    service_level: Mapping[TrafficClass, int] = field(default_factory=lambda: SERVICE_LEVEL)
    most_peers: int = 1024

    def __post_init__(self) -> None:
        ranges = {
            "connect_seconds": (0.001, 86400),
            "silence_seconds": (4, 86400),
            "port": (1, 255),
            "message_bytes": (4096, 1 << 30),
            "send_depth": (2, 1 << 15),
            "receive_depth": (1, 1 << 15),
            "ack_timeout": (1, 31),
            "retries": (0, 7),
            "most_peers": (1, 1 << 20),
        }
        for name, (least, most) in ranges.items():
            if not least <= (value := getattr(self, name)) <= most:
                raise ValueError(f"{name}={value} must be from {least} to {most}")
        if self.gid_index is not None and self.gid_index < 0:
            raise ValueError(f"gid_index={self.gid_index} must not be negative")
        for traffic in TrafficClass:
            if not 0 <= self.dscp.get(traffic, -1) < 64:
                raise ValueError(f"dscp={dict(self.dscp)} must have 0 to 63 for {traffic.name}")
            if not 0 <= self.service_level.get(traffic, -1) < 16:
                raise ValueError(f"service_level={dict(self.service_level)} must have 0 to 15 for {traffic.name}")

    def path(self, traffic: TrafficClass) -> Path:
        """How packets of a class travel."""
        return Path(self.service_level[traffic], self.dscp[traffic], self.ack_timeout, self.retries)


class VerbsTransport(SocketTransport):
    """The carrier by RDMA verbs; any memory that may be locked can be registered, which holds the interpreter's lock.

    Args:
      secret: that all peers share, at least 16 bytes.
      host: for the control connections: an address of this machine that peers can reach.
      port: likewise; 0 for a free one.
      device: None for the one that has the address of `host`, or else the first one.
      settings: limits.

    Raises:
      ValueError: the secret is too short, or no such device.
      NotImplementedError: no device or no pyverbs.
      OSError: can't listen there, or can't open the device.
    """

    carrier: ClassVar[str] = "verbs"

    def __init__(
        self,
        secret: bytes,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        device: str | None = None,
        settings: VerbsSettings | None = None,
    ) -> None:
        check_secret(secret)
        self._secret = secret
        self.settings = settings or VerbsSettings()
        self._memory: dict[int, Memory] = {}
        self._close_lock = threading.Lock()
        device = device or device_at(host, self.settings.port)
        self._device = Device(device, self.settings.port, self.settings.gid_index)
        try:
            listener, address = listen(host, port)
        except BaseException:
            self._device.close()
            raise
        super().__init__(listener, address, most_peers=self.settings.most_peers)
        self._acceptor.start()

    def register(self, buffer: Buffer, *, remote_write: bool = True, remote_read: bool = True) -> Region:
        region = super().register(buffer, remote_write=remote_write, remote_read=remote_read)
        try:
            self._memory[region.key] = self._device.register(
                region.buffer, remote_write=remote_write, remote_read=remote_read
            )
        except BaseException:
            del self._regions[region.key]
            region.buffer.release()
            raise
        return region

    def memory(self, key: int) -> Memory | None:
        """The device's registration of a region."""
        return self._memory.get(key)

    def close(self) -> None:
        with self._close_lock:
            try:
                super().close()
            finally:
                self._device.close()

    def _open_channel(self, peer_address: str, traffic: TrafficClass) -> SocketChannel:
        deadline = time.monotonic() + self.settings.connect_seconds
        sock, target = socket_to(peer_address)
        try:
            watch_host(sock, self.settings.silence_seconds)
            sock.settimeout(self.settings.connect_seconds)
            sock.connect(target)
            greet_as_initiator(sock, self._secret, self.address, traffic, deadline)
            pair = QueuePair(self._device, sends=self.settings.send_depth)
            try:
                sock.sendall(pair.endpoint.pack())
                pair.connect(receive_endpoint(sock, deadline), self.settings.path(traffic))
                return VerbsChannel(self, sock, peer_address, traffic, pair)
            except BaseException:
                pair.close()
                raise
        except ProtocolError as error:
            sock.close()
            raise PermissionError(f"not what we look for: {error}") from error
        except BaseException:
            sock.close()
            raise

    def _greet(self, sock: socket.socket) -> tuple[str, TrafficClass]:
        watch_host(sock, self.settings.silence_seconds)
        return greet_as_target(sock, self._secret, self.settings.connect_seconds)

    def _serve(self, peer: Peer, sock: socket.socket) -> None:
        pair = QueuePair(self._device, receives=self.settings.receive_depth)
        try:
            endpoint = receive_endpoint(sock, time.monotonic() + self.settings.connect_seconds)
            pair.connect(endpoint, self.settings.path(peer.traffic))
            pair.post_receives(pair.depth)
            sock.sendall(pair.endpoint.pack())
            _Target(self, peer, sock, pair).serve()
        finally:
            # The socket says that the peer is gone sooner than the last immediates are seen.
            with contextlib.closing(pair):
                for done in pair.stop():
                    if done.outcome is Outcome.OK:
                        self.received(peer, done.immediate)


class _Flight(NamedTuple):
    """A ticket that completes as `status` when work request `last` has ended."""

    last: int
    number: int
    status: Status


class VerbsChannel(SocketChannel):
    """The initiator's end: one thread posts and looks at completions, the other hears what the owner grants."""

    def __init__(
        self, transport: VerbsTransport, sock: socket.socket, peer_address: str, traffic: TrafficClass, pair: QueuePair
    ) -> None:
        super().__init__(transport, sock, peer_address, traffic)
        self._verbs = transport
        self._pair = pair
        self._wake = _Wakeup()
        self._poller = select.poll()
        self._poller.register(pair.fileno(), select.POLLIN)
        self._poller.register(self._wake.fileno(), select.POLLIN)
        self._grants: dict[int, Message] = {}
        self._asked = False
        self._transfer: Transfer | None = None  # that is being posted
        self._requests: Iterator[SendRequest] | None = None  # what is left of it, once it is known to be granted
        self._flights: deque[_Flight] = deque()
        self._done = 0  # all work requests up to it have ended well
        self._failure: Completion | None = None

    def _start(self, transfer: Transfer) -> Status | None:
        status = super()._start(transfer)
        self._wake.set()
        return status

    def _interrupt(self) -> None:
        self._wake.set()

    def _move_all(self) -> None:
        try:
            while not self._stopping:
                moved = self._settle(self._pair.take())
                if self._failure is not None:
                    raise ProtocolError(f"a work request ended with status {self._failure.status} of the device")
                if not self._advance() and not moved:
                    self._wait()
        finally:
            self._settle(self._pair.stop())
            if self._failure is not None and self._failure.outcome is Outcome.REFUSED and self._flights:
                self._ledger.complete(self._flights.popleft().number, Status.ACCESS)

    def _listen_all(self) -> None:
        while data := self._socket.recv(MESSAGE_BYTES, socket.MSG_WAITALL):
            grant = parse(data, Kind.GRANT)
            self._grants[grant.key] = grant
            self._wake.set()

    def _release(self) -> None:
        self._pair.close()
        self._wake.close()

    def _settle(self, completions: list[Completion]) -> bool:
        """Reports tickets that have ended well; whether there was something to look at."""
        for done in completions:
            if self._failure is None and done.outcome is Outcome.OK:
                self._done = done.number
            else:
                self._failure = self._failure or done
        while self._flights and self._flights[0].last <= self._done:
            flight = self._flights.popleft()
            self._ledger.complete(flight.number, flight.status)
        return bool(completions)

    def _advance(self) -> bool:
        """Takes a step of the transfer in hand, or of the next one; False if there is none that can be taken."""
        if self._transfer is None:
            try:
                self._transfer = self._transfers.get_nowait()
            except queue.Empty:
                return False
        transfer = self._transfer
        if transfer is None:  # the channel is ending
            return False
        if self._requests is None:
            grant = self._grant(transfer)
            if grant is None:
                return False
            if not _allows(grant, transfer):
                self._flights.append(_Flight(self._pair.posted, transfer.ticket.number, Status.ACCESS))
                self._transfer = None
                self._settle([])
                return True
            self._begin(transfer, grant)
        assert self._requests is not None
        batch = list(itertools.islice(self._requests, min(self._pair.room, self._pair.depth // 2)))
        if batch:
            self._pair.post_sends(batch)
        if self._pair.posted == self._flights[-1].last:
            self._transfer = self._requests = None
        return bool(batch)

    def _grant(self, transfer: Transfer) -> Message | None:
        """What the owner says of a transfer's region; None if it has not answered yet."""
        if not transfer.ops:
            return Message(Kind.GRANT, READABLE | WRITABLE, 0, 0, 0, 0)
        grant = self._grants.get(transfer.remote.key)
        if grant is not None:
            self._asked = False
            if not grant.flags:  # it may be registered by the time that it is used again
                del self._grants[transfer.remote.key]
        elif not self._asked:
            self._asked = True
            self._socket.sendall(Message(Kind.MAP, 0, 0, transfer.remote.key, 0, 0).pack())
        return grant

    def _begin(self, transfer: Transfer, grant: Message) -> None:
        most = self._verbs.settings.message_bytes
        count = sum(-(-op.length // most) for op in transfer.ops) or 1
        self._flights.append(_Flight(self._pair.posted + count, transfer.ticket.number, Status.OK))
        memory = self._verbs.memory(transfer.region.key)
        assert memory is not None
        self._requests = _messages(transfer, memory, grant, most)

    def _wait(self) -> None:
        for fd, _ in self._poller.poll():
            if fd == self._pair.fileno():
                self._pair.acknowledge()
            else:
                self._wake.clear()


class _Target:
    """The passive end: says where regions are, and takes immediates. The device does the rest by itself."""

    def __init__(self, transport: VerbsTransport, peer: Peer, sock: socket.socket, pair: QueuePair) -> None:
        self._transport = transport
        self._peer = peer
        self._socket = sock
        self._pair = pair
        self._message = b""  # what has come of it

    def serve(self) -> None:
        """Returns when the control connection was closed.

        Raises:
          ProtocolError: the peer sent what it may not, or the queue pair broke.
          OSError: the connection or the device broke.
        """
        poller = select.poll()
        poller.register(self._pair.fileno(), select.POLLIN)
        poller.register(self._socket.fileno(), select.POLLIN)
        while True:
            done = self._pair.take()
            for one in done:
                if one.outcome is not Outcome.OK:
                    raise ProtocolError(f"the queue pair broke with status {one.status} of the device")
                self._transport.received(self._peer, one.immediate)
            self._pair.post_receives(len(done))
            for fd, _ in poller.poll(0 if done else None):
                if fd == self._pair.fileno():
                    self._pair.acknowledge()
                elif not self._hear():
                    return

    def _hear(self) -> bool:
        """Takes what has come over the control connection; False if it was closed."""
        try:
            part = self._socket.recv(MESSAGE_BYTES - len(self._message), socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        self._message += part
        if len(self._message) == MESSAGE_BYTES:
            key = parse(self._message, Kind.MAP).key
            self._message = b""
            # The peer asks for one at a time, so that there is room for an answer.
            if self._socket.send(self._answer(key), socket.MSG_DONTWAIT) != MESSAGE_BYTES:
                raise ProtocolError("it asks without listening")
        return bool(part)

    def _answer(self, key: int) -> bytes:
        shared, memory = self._transport.shared(key), self._transport.memory(key)
        flags = 0
        if shared is not None:
            flags = READABLE * shared.remote_read | WRITABLE * shared.remote_write
        if memory is None or not flags:
            return Message(Kind.GRANT, 0, 0, key, 0, 0).pack()
        return Message(Kind.GRANT, flags, memory.remote_key, key, memory.address, memory.length).pack()


class _Wakeup:
    """A descriptor that is readable after `set`, until `clear`; any thread may call, also after it was closed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def fileno(self) -> int:
        return self._fd

    def set(self) -> None:
        with self._lock:
            if self._fd >= 0:
                os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        os.eventfd_read(self._fd)

    def close(self) -> None:
        with self._lock:
            os.close(self._fd)
            self._fd = -1


def _allows(grant: Message, transfer: Transfer) -> bool:
    need = WRITABLE if transfer.write else READABLE
    return bool(grant.flags & need) and all(op.remote + op.length <= grant.length for op in transfer.ops)


def _messages(transfer: Transfer, memory: Memory, grant: Message, most: int) -> Iterator[SendRequest]:
    """The work requests of a transfer, of at most `most` bytes; one without bytes if it has no ops."""
    if not transfer.ops:
        yield SendRequest(True, memory.address, memory.local_key, 0, 0, 0, transfer.immediate)
    for index, op in enumerate(transfer.ops):
        for start in range(0, op.length, most):
            length = min(most, op.length - start)
            last = index == len(transfer.ops) - 1 and start + length == op.length
            yield SendRequest(
                transfer.write,
                memory.address + op.local + start,
                memory.local_key,
                grant.address + op.remote + start,
                grant.remote_key,
                length,
                transfer.immediate if last else None,
            )
