"""Any carrier, at the rates of the network cards at both ends.

A write is charged to the local card's reading side and to the remote card's writing side, a read the other way around,
before its bytes move. With a rate on its way a transfer goes to the carrier in chunks, of which the last brings the
immediate, once all others are known to be in place.
"""

from __future__ import annotations

import os
import queue
import select
import threading
from collections import deque
from collections.abc import Buffer, Callable, Sequence
from dataclasses import dataclass

from jaxdual.kv.slots import IntegrityError
from jaxdual.transport.base import (
    Channel,
    Completed,
    Event,
    Op,
    Peer,
    PeerLost,
    Region,
    RemoteRegion,
    Status,
    Ticket,
    TrafficClass,
    Transport,
    check_transfer,
    joined,
)
from jaxdual.transport.events import EventQueue, Ledger, Transfer
from jaxdual.transport.shaping import CHUNK_BYTES, Direction, Nic


class ShapedTransport(Transport):
    """A transport over another one, which it owns from now on.

    The initiator charges both cards; the target needs no shaping of its own for that.

    Args:
      inner: the carrier.
      nic: the card at this side.
      nic_of: the card at an address, or None where it can't be reached from here: on another host.
      chunk_bytes: given to the carrier at once while there is a rate.
    """

    def __init__(
        self,
        inner: Transport,
        nic: Nic,
        nic_of: Callable[[str], Nic | None] = lambda address: None,
        *,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        if chunk_bytes < 1:
            raise ValueError(f"{chunk_bytes=} must be at least 1")
        self.carrier = inner.carrier  # type: ignore[misc]  # the class of an object made at run time
        self.address = inner.address
        self.nic = nic
        self.chunk_bytes = chunk_bytes
        self._inner = inner
        self._nic_of = nic_of
        self._events = EventQueue()
        self._lock = threading.Lock()
        self._channels: dict[Channel, _ShapedChannel] = {}  # by the carrier's
        self._connecting = 0
        self._lost_early: dict[Channel, str] = {}  # while connecting: channels that broke before they were known here
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._closed = False
        self._pump = threading.Thread(target=self._run, name="shaped-pump", daemon=True)
        self._pump.start()

    def register(self, buffer: Buffer, *, remote_write: bool = True, remote_read: bool = True) -> Region:
        return self._inner.register(buffer, remote_write=remote_write, remote_read=remote_read)

    def check_region(self, region: Region) -> None:
        self._inner.check_region(region)

    def remote(self, descriptor: bytes) -> RemoteRegion:
        return self._inner.remote(descriptor)

    def connect(self, peer_address: str, traffic: TrafficClass) -> Channel:
        remote_nic = self._nic_of(peer_address)
        with self._lock:
            self._connecting += 1
        try:
            inner = self._inner.connect(peer_address, traffic)
            channel = _ShapedChannel(self, inner, remote_nic, self._events)
            with self._lock:
                self._channels[inner] = channel
                lost = self._lost_early.get(inner)
        finally:
            with self._lock:
                self._connecting -= 1
                if not self._connecting:
                    self._lost_early.clear()
        if lost is not None:
            self._handle([PeerLost(inner, lost)])
        return channel

    def peers(self) -> list[Peer]:
        return self._inner.peers()

    def disconnect(self, peer: Peer) -> None:
        self._inner.disconnect(peer)

    def refuse(self, address: str) -> None:
        self._inner.refuse(address)

    def poll(self) -> list[Event]:
        return self._events.take()

    def fileno(self) -> int:
        return self._events.fileno()

    def check_integrity(self) -> None:
        self._inner.check_integrity()
        if not self._closed and not self._pump.is_alive():
            raise IntegrityError("nobody takes the carrier's events")
        with self._lock:
            channels = list(self._channels.values())
        for channel in channels:
            channel.check()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with self._lock:
            channels = list(self._channels.values())
        for channel in channels:
            channel.close()
        try:
            self._inner.close()
        finally:
            os.eventfd_write(self._stop, 1)
            self._pump.join()
            os.close(self._stop)
            self._handle(self._inner.poll())
            self._events.close()

    def forget(self, inner: Channel) -> None:
        """Has nothing more of a channel of the carrier's reported."""
        with self._lock:
            self._channels.pop(inner, None)

    def _run(self) -> None:
        wanted = select.poll()  # select.select takes no descriptor above 1023
        wanted.register(self._inner.fileno(), select.POLLIN)
        wanted.register(self._stop, select.POLLIN)
        while not any(fd == self._stop for fd, _ in wanted.poll()):
            self._handle(self._inner.poll())

    def _handle(self, events: list[Event]) -> None:
        for event in events:
            match event:
                case Completed(ticket, status):
                    with self._lock:
                        channel = self._channels.get(ticket.channel)
                    if channel is not None:
                        channel.moved(status)
                case PeerLost(Channel() as source, reason):
                    with self._lock:
                        channel = self._channels.pop(source, None)
                        if channel is None and self._connecting:
                            self._lost_early[source] = reason
                    if channel is not None:
                        channel.broke()
                        self._events.push(PeerLost(channel, reason))
                case _:
                    self._events.push(event)


@dataclass(slots=True)
class _Progress:
    """How much of a ticket is with the carrier, and how its chunks ended."""

    number: int
    posted: int = 0
    moved: int = 0
    all_posted: bool = False
    status: Status = Status.OK


class _ShapedChannel(Channel):
    """A channel over one of the carrier's; with a rate on its way it has a thread that waits for tokens."""

    def __init__(self, transport: ShapedTransport, inner: Channel, remote_nic: Nic | None, events: EventQueue) -> None:
        self.peer_address = inner.peer_address
        self.traffic = inner.traffic
        self._transport = transport
        self._inner = inner
        self._cards: list[tuple[Nic, Direction]] = [(transport.nic, Direction.READ)]  # of a write
        if remote_nic is not None:
            self._cards.append((remote_nic, Direction.WRITE))
        self._ledger = Ledger(self, events)
        self._transfers: queue.SimpleQueue[Transfer | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._ended = False
        self._changed = threading.Condition()
        self._chunks: deque[_Progress] = deque()  # with the carrier, oldest first: whose they are
        self._thread: threading.Thread | None = None
        if any(nic.limited(direction) for nic, _ in self._cards for direction in Direction):
            self._thread = threading.Thread(target=self._run, name="shaped-move", daemon=True)
            self._thread.start()

    def write(self, region: Region, remote: RemoteRegion, ops: Sequence[Op], immediate: int | None = None) -> Ticket:
        return self._post(True, region, remote, ops, immediate)

    def read(self, region: Region, remote: RemoteRegion, ops: Sequence[Op]) -> Ticket:
        return self._post(False, region, remote, ops, None)

    def _post(
        self, write: bool, region: Region, remote: RemoteRegion, ops: Sequence[Op], immediate: int | None
    ) -> Ticket:
        self._transport.check_region(region)
        nbytes = check_transfer(region, ops, write=write, immediate=immediate)
        runs = joined(ops)

        def start(ticket: Ticket) -> Status | None:
            transfer = Transfer(ticket, write, region, remote, runs, immediate)
            if self._thread is None:
                self._move(transfer, [runs])
            else:
                self._transfers.put(transfer)
            return None

        with self._changed:  # before the ledger's lock, as everywhere
            return self._ledger.post(nbytes, start)

    @property
    def outstanding_bytes(self) -> int:
        return self._ledger.outstanding_bytes

    def close(self) -> None:
        self._ledger.close()
        self._end()
        self._inner.close()
        self._transport.forget(self._inner)
        self._ledger.fail(Status.CANCELLED)

    def broke(self) -> None:
        """The carrier's channel is gone, and all that it had is reported."""
        self._end()
        self._ledger.fail(Status.BROKEN)

    def moved(self, status: Status) -> None:
        """The carrier has completed its oldest chunk."""
        with self._changed:
            if self._ended:
                return
            progress = self._chunks.popleft()
            progress.moved += 1
            if progress.status is Status.OK:
                progress.status = status
            self._complete_if_moved(progress)
            self._changed.notify_all()

    def check(self) -> None:
        """Raises `IntegrityError` if a ticket is lost."""
        self._ledger.check()

    def _end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._stop.set()
        self._transfers.put(None)
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while (transfer := self._transfers.get()) is not None and not self._ended:
            if any(op.remote + op.length > transfer.remote.length for op in transfer.ops):
                self._move(transfer, [transfer.ops])  # as a whole, so that the carrier refuses it before a byte moves
            else:
                self._move(transfer, _cut(transfer.ops, self._transport.chunk_bytes))

    def _move(self, transfer: Transfer, chunks: list[list[Op]]) -> None:
        """Hands a transfer's chunks to the carrier, each once it is charged."""
        progress = _Progress(transfer.ticket.number)
        for index, ops in enumerate(chunks):
            last = index == len(chunks) - 1
            if not self._charge(sum(op.length for op in ops), transfer.write):
                return
            immediate = transfer.immediate if last else None
            with self._changed:
                if immediate is not None:
                    # A chunk may have been refused; then the carrier must not see the immediate.
                    self._changed.wait_for(lambda: progress.moved == progress.posted or self._ended)
                if self._ended:
                    return
                if progress.status is not Status.OK:
                    break
                progress.posted += 1
                self._chunks.append(progress)
                if transfer.write:
                    self._inner.write(transfer.region, transfer.remote, ops, immediate)
                else:
                    self._inner.read(transfer.region, transfer.remote, ops)
        with self._changed:
            progress.all_posted = True
            if not self._ended:
                self._complete_if_moved(progress)

    def _charge(self, nbytes: int, write: bool) -> bool:
        for nic, direction in self._cards:
            if not write:
                direction = Direction.WRITE if direction is Direction.READ else Direction.READ
            if not nic.charge(direction, nbytes, self.traffic, self._stop):
                return False
        return True

    def _complete_if_moved(self, progress: _Progress) -> None:
        if progress.all_posted and progress.moved == progress.posted:
            self._ledger.complete(progress.number, progress.status)


def _cut(ops: list[Op], chunk_bytes: int) -> list[list[Op]]:
    """The same bytes in lists of at most `chunk_bytes`; at least one list."""
    chunks: list[list[Op]] = [[]]
    room = chunk_bytes
    for local, remote, length in ops:
        while length:
            if not room:
                chunks.append([])
                room = chunk_bytes
            part = min(length, room)
            chunks[-1].append(Op(local, remote, part))
            local, remote, length, room = local + part, remote + part, length - part, room - part
    return chunks
