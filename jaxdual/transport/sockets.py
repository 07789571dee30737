"""What the carriers over stream sockets share: who listens, the threads of channels and of peers, and how they end.

A channel has two threads: one moves the transfers in the order of their tickets, the other receives what the peer says.
A peer has one, which serves it. Threads so that the interpreter's lock is free while bytes move.
"""

from __future__ import annotations

import abc
import contextlib
import logging
import queue
import secrets
import socket
import threading
import time
from collections.abc import Buffer, Sequence
from dataclasses import dataclass

from jaxdual.kv.slots import IntegrityError
from jaxdual.transport.base import (
    Channel,
    Event,
    Op,
    Peer,
    PeerLost,
    Received,
    Region,
    RemoteRegion,
    Status,
    Ticket,
    TrafficClass,
    Transport,
    check_transfer,
    joined,
    pack_descriptor,
)
from jaxdual.transport.events import EventQueue, Ledger, Transfer

_LOG = logging.getLogger(__name__)
_CLOSE_SECONDS = 5.0  # that peers have to let go of this side's memory


class ProtocolError(Exception):
    """The other side sent what it may not; the connection is closed."""


@dataclass(frozen=True, slots=True)
class Shared:
    """A region, and what peers may do with it."""

    region: Region
    remote_write: bool
    remote_read: bool


class SocketChannel(Channel):
    """The initiator's end.

    Args:
      transport: that it is a channel of.
      sock: connected, and greeted by both sides.
      peer_address: where it leads.
      traffic: its class.
    """

    def __init__(
        self, transport: SocketTransport, sock: socket.socket, peer_address: str, traffic: TrafficClass
    ) -> None:
        self.peer_address = peer_address
        self.traffic = traffic
        self._transport = transport
        self._socket = sock
        self._ledger = Ledger(self, transport.events)
        self._transfers: queue.SimpleQueue[Transfer | None] = queue.SimpleQueue()
        self._closing = False
        self._broken: str | None = None
        self._end_lock = threading.Lock()
        name = f"{transport.carrier}-{traffic.name.lower()}"
        self._mover = threading.Thread(target=self._run, name=f"{name}-move", daemon=True)
        self._listener = threading.Thread(target=self._listen, name=f"{name}-listen", daemon=True)

    def start(self) -> None:
        """Starts the threads."""
        self._listener.start()
        self._mover.start()

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
            return self._start(Transfer(ticket, write, region, remote, runs, immediate))

        return self._ledger.post(nbytes, start)

    @property
    def outstanding_bytes(self) -> int:
        return self._ledger.outstanding_bytes

    def close(self) -> None:
        with self._end_lock:
            if not self._closing:
                self._closing = True
                self._ledger.close()
                self._transfers.put(None)
                self._interrupt()
        self._mover.join()

    def check(self) -> None:
        """Raises `IntegrityError` if a ticket is lost or nobody moves them."""
        self._ledger.check()
        if not self._mover.is_alive():
            raise IntegrityError(f"the channel to {self.peer_address} has no thread")

    @property
    def _stopping(self) -> bool:
        """Whether nothing more may be moved."""
        return self._closing or self._broken is not None

    def _break(self, reason: str) -> None:
        """Notes why the channel is of no use any more, and has its threads end."""
        with self._end_lock:
            if self._broken is None:
                self._broken = reason
        self._transfers.put(None)
        self._interrupt()

    def _run(self) -> None:
        try:
            self._move_all()
        except (OSError, ProtocolError) as error:
            self._break(str(error))
        except Exception as error:
            _LOG.exception("channel to %s", self.peer_address)
            self._break(repr(error))
        # Only now, since the peer takes this as word that nothing will be moved any more.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._listener.join()
        self._release()
        self._socket.close()
        with self._end_lock:
            closing = self._closing
        self._ledger.fail(Status.CANCELLED if closing else Status.BROKEN)
        self._transport.channel_ended(self, None if closing else self._broken or "unknown")

    def _listen(self) -> None:
        try:
            self._listen_all()
            self._break("the peer has closed the connection")
        except (OSError, ProtocolError) as error:
            self._break(str(error))
        except Exception as error:
            _LOG.exception("channel to %s", self.peer_address)
            self._break(repr(error))

    def _start(self, transfer: Transfer) -> Status | None:
        """Takes a posted transfer, one at a time, in the order of tickets; how it ended, if it is over already."""
        self._transfers.put(transfer)
        return None

    @abc.abstractmethod
    def _move_all(self) -> None:
        """Moves what is in `_transfers` until None comes or `_stopping`."""

    @abc.abstractmethod
    def _listen_all(self) -> None:
        """Takes what the peer says until it has closed its end."""

    def _interrupt(self) -> None:
        """Has the mover return from whatever it waits for; called by any thread, more than once."""

    def _release(self) -> None:
        """Lets go of what was made for this channel; both threads have ended."""


class Serving:
    """A peer's connection at this side, and its thread."""

    def __init__(self, sock: socket.socket, transport: SocketTransport) -> None:
        self.socket = sock
        self.peer: Peer | None = None  # before it is greeted
        self.abandoned = False
        self.thread = threading.Thread(
            target=transport.serve, args=(self,), name=f"{transport.carrier}-serve", daemon=True
        )


class SocketTransport(Transport):
    """Regions, channels and served peers of this process.

    Args:
      listener: bound and listening.
      address: by which others connect to it.
      most_peers: connections to here; more are refused.
    """

    def __init__(self, listener: socket.socket, address: str, *, most_peers: int) -> None:
        self.address = address
        self.events = EventQueue()
        self._listener = listener
        self._most_peers = most_peers
        self._lock = threading.Lock()
        self._closed = False
        self._regions: dict[int, Shared] = {}
        self._channels: set[SocketChannel] = set()
        self._servings: set[Serving] = set()
        self._refused: set[str] = set()  # addresses
        self._peers = 0
        self._acceptor = threading.Thread(target=self._accept, name=f"{self.carrier}-accept", daemon=True)

    def register(self, buffer: Buffer, *, remote_write: bool = True, remote_read: bool = True) -> Region:
        view = memoryview(buffer)
        if not view.contiguous or not view.nbytes:
            raise ValueError("the buffer must be contiguous and not empty")
        view = view.cast("B")
        if remote_write and view.readonly:
            raise ValueError("peers can't write a read-only buffer")
        key = secrets.randbits(64)
        remote = RemoteRegion(key, 0, view.nbytes)
        region = Region(view, key, pack_descriptor(self.carrier, remote), not view.readonly)
        with self._lock:
            self._refuse_if_closed()
            self._regions[key] = Shared(region, remote_write, remote_read)
        return region

    def connect(self, peer_address: str, traffic: TrafficClass) -> Channel:
        with self._lock:
            self._refuse_if_closed()
        channel = self._open_channel(peer_address, traffic)
        with self._lock:
            closed = self._closed
            self._channels.add(channel)
            channel.start()
        if closed:
            channel.close()
        return channel

    def peers(self) -> list[Peer]:
        with self._lock:
            return [serving.peer for serving in self._servings if serving.peer is not None]

    def disconnect(self, peer: Peer) -> None:
        with self._lock:
            found = [serving for serving in self._servings if serving.peer == peer]
        for serving in found:
            self._hang_up(serving)

    def refuse(self, address: str) -> None:
        with self._lock:
            self._refused.add(address)

    def poll(self) -> list[Event]:
        return self.events.take()

    def fileno(self) -> int:
        return self.events.fileno()

    def check_integrity(self) -> None:
        with self._lock:
            for channel in self._channels:
                channel.check()
            for serving in self._servings:
                if not serving.thread.is_alive():
                    raise IntegrityError(f"the connection of {serving.peer} is served by nobody")

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            channels, servings = list(self._channels), list(self._servings)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join()
        self._listener.close()
        for channel in channels:
            channel.close()
        for serving in servings:
            self._hang_up(serving)
        deadline = time.monotonic() + _CLOSE_SECONDS
        holding = []
        for serving in servings:
            serving.thread.join(max(0.0, deadline - time.monotonic()))
            if serving.thread.is_alive():
                serving.abandoned = True
                holding.append(str(serving.peer))
                with contextlib.suppress(OSError):
                    serving.socket.shutdown(socket.SHUT_RDWR)
                serving.thread.join()
        for shared in self._regions.values():
            with contextlib.suppress(BufferError):  # the program still has a part of it
                shared.region.buffer.release()
        self._regions.clear()
        self.events.close()
        if holding:
            raise TimeoutError(f"peers have not let go of the memory: {', '.join(holding)}")

    def check_region(self, region: Region) -> None:
        shared = self._regions.get(region.key)
        if shared is None or shared.region is not region:
            raise ValueError("the region is not registered with this transport")

    def shared(self, key: int) -> Shared | None:
        """What a peer means by a key."""
        return self._regions.get(key)

    def channel_ended(self, channel: SocketChannel, broken: str | None) -> None:
        """Forgets a channel; with the reason if it broke."""
        with self._lock:
            self._channels.discard(channel)
        if broken is not None:
            _LOG.info("channel to %s: %s", channel.peer_address, broken)
            self.events.push(PeerLost(channel, broken))

    def received(self, peer: Peer, immediate: int) -> None:
        """Reports an immediate.

        Raises:
          ProtocolError: nobody polls, and too many wait.
        """
        if not self.events.push_received(Received(peer, immediate)):
            raise ProtocolError("too many immediates that nobody polls")

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                if self._closed:
                    return
                time.sleep(0.01)  # no descriptor free, or the stranger is gone again
                continue
            with self._lock:
                refused = self._closed or len(self._servings) >= self._most_peers
                if not refused:
                    serving = Serving(sock, self)
                    self._servings.add(serving)
                    serving.thread.start()
            if refused:
                sock.close()

    def serve(self, serving: Serving) -> None:
        """Greets and serves a connection; run by its thread."""
        reason = "the peer has closed the connection"
        try:
            address, traffic = self._greet(serving.socket)
            with self._lock:
                if address in self._refused:
                    raise ProtocolError(f"{address} is refused")
                self._peers += 1
                serving.peer = Peer(self._peers, address, traffic)
            self._serve(serving.peer, serving.socket)
        except (OSError, ProtocolError) as error:
            reason = str(error)
        except Exception as error:
            _LOG.exception("peer %s", serving.peer)
            reason = repr(error)
        with self._lock:
            self._servings.discard(serving)
        serving.socket.close()
        if serving.peer is None:
            _LOG.warning("refused a connection: %s", reason)
        elif not serving.abandoned:
            _LOG.info("%s: %s", serving.peer, reason)
            self.events.push(PeerLost(serving.peer, reason))

    def _hang_up(self, serving: Serving) -> None:
        with contextlib.suppress(OSError):
            serving.socket.shutdown(self._hang_up_how)

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise ValueError("the transport is closed")

    _hang_up_how = socket.SHUT_RDWR

    @abc.abstractmethod
    def _open_channel(self, peer_address: str, traffic: TrafficClass) -> SocketChannel:
        """A connected channel whose threads have not started; raises as `connect`."""

    @abc.abstractmethod
    def _greet(self, sock: socket.socket) -> tuple[str, TrafficClass]:
        """The initiator's address and class of traffic, once it has shown that it may connect.

        Raises:
          ProtocolError, OSError: it may not, or didn't in time.
        """

    @abc.abstractmethod
    def _serve(self, peer: Peer, sock: socket.socket) -> None:
        """Serves a peer until its end of the connection is closed. When it returns or raises, nothing of the peer's can
        reach the regions any more."""
