"""What every carrier does: one-sided writes and reads between regions of memory of two processes.

A process has one `Transport` per carrier. It registers its memory once, and hands the descriptors of its regions to its
peers by whatever control messages they have. A peer connects (one `Channel` per traffic class) and from then on writes
and reads these regions by itself: the program of the owner takes no part in a transfer, and learns of it only by an
immediate, where the writer sends one. The calls map to queue pairs of type RC: a list of operations, one completion a
ticket, memory registered once.

**Threads.** Calls may come from any thread. What happened is reported by `Transport.poll` and nowhere else.

**Ownership of local bytes.** From the call of `write` until the ticket completes, the local bytes must not change; from
the call of `read` until then they must not be looked at. No deadline revokes a transfer in flight: a caller who has
lost patience closes the channel.

**Order.** Tickets of one channel complete in the order in which they were posted. An immediate is in the peer's `poll`
only after all bytes of its write, and of earlier writes of the channel, are in place. Nothing is said about two
channels.

**The end of a channel**, by which quarantined memory is released:

* When `Channel.close` has returned, or `PeerLost(channel)` or the last completion of a broken channel was reported, no
  local byte of any of its transfers is read or written any more.
* When the transport at the other side has reported `PeerLost(peer)`, no byte of a write of that channel can land there
  any more, and none is read there.
* The second needs no help of the initiator's program, which may have been killed. It may need the initiator's process
  to run or to be gone: each carrier says so. Until it is reported the memory is in quarantine.

**Failure.** After an error every outstanding ticket of the channel completes with `BROKEN`, once, and then
`PeerLost(channel)` is reported. The bytes of a ticket that is not `OK` may have landed in part. A new channel is made
by `connect`.
"""

from __future__ import annotations

import abc
import enum
import struct
from collections.abc import Buffer, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

_DESCRIPTOR = struct.Struct("<8sQQQ")
_OFFSETS = 2**63  # offsets and lengths are below


class TrafficClass(enum.IntEnum):
    """What a transfer is for: what the model's computation waits for, or KV cache that is moved beside it."""

    MODEL = 0
    KV = 1


class Status(enum.IntEnum):
    """How a ticket ended."""

    OK = 0  # all bytes are in place
    ACCESS = 1  # the remote side refused region, offset or direction
    BROKEN = 2  # the connection or the peer is gone
    CANCELLED = 3  # the channel was closed here


class Op(NamedTuple):
    """A run of bytes to move: offsets in the local and in the remote region, and bytes."""

    local: int
    remote: int
    length: int


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """Registered local memory.

    Attributes:
      buffer: its bytes.
      key: by which the transport knows it.
      descriptor: what a peer needs to address it.
      writable: here, which `read` needs.
    """

    buffer: memoryview
    key: int
    descriptor: bytes
    writable: bool

    @property
    def length(self) -> int:
        """Bytes."""
        return self.buffer.nbytes


@dataclass(frozen=True, slots=True)
class RemoteRegion:
    """A peer's region as its descriptor has it: key and address as its carrier uses them, length in bytes."""

    key: int
    address: int
    length: int


@dataclass(frozen=True, slots=True, eq=False)
class Ticket:
    """A posted transfer of `nbytes`; `number` counts those of its channel."""

    channel: Channel
    number: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Peer:
    """The other end of a channel that was opened from elsewhere.

    Attributes:
      number: counts the peers of this transport; the same process has another one after it has connected again.
      address: of the peer's own transport, as it says itself.
      traffic: class of the channel.
    """

    number: int
    address: str
    traffic: TrafficClass


@dataclass(frozen=True, slots=True)
class Completed:
    """A ticket of a channel of this transport has ended."""

    ticket: Ticket
    status: Status


@dataclass(frozen=True, slots=True)
class Received:
    """A write of a peer is in place; it came with this immediate, of 32 bits."""

    peer: Peer
    immediate: int


@dataclass(frozen=True, slots=True)
class PeerLost:
    """A channel broke, or a peer's channel has ended, in whatever way. The last event of its source."""

    source: Channel | Peer
    reason: str


Event = Completed | Received | PeerLost


class Channel(abc.ABC):
    """A connection to one peer for one class of traffic; this side posts, the other is passive.

    Nothing bounds what is posted: the caller does, by `outstanding_bytes`.
    """

    peer_address: str
    traffic: TrafficClass

    @abc.abstractmethod
    def write(self, region: Region, remote: RemoteRegion, ops: Sequence[Op], immediate: int | None = None) -> Ticket:
        """Copies local bytes to the peer.

        Args:
          region: local side of `ops`.
          remote: the peer's side.
          ops: any number of them; one that overlaps another at the remote side leaves either's bytes there.
          immediate: delivered after the last byte; 0 to 2**32 - 1. Not delivered unless the ticket is `OK`.

        Returns:
          The ticket. On a broken channel it completes with `BROKEN`.

        Raises:
          ValueError: an op is not within `region`, the region is of another transport, or the channel is closed.
        """

    @abc.abstractmethod
    def read(self, region: Region, remote: RemoteRegion, ops: Sequence[Op]) -> Ticket:
        """Copies the peer's bytes here; see `write`. `region` must be writable here."""

    @property
    @abc.abstractmethod
    def outstanding_bytes(self) -> int:
        """Bytes of the tickets that have not completed."""

    @abc.abstractmethod
    def close(self) -> None:
        """Ends the channel and waits until nothing of it touches local memory.

        Outstanding tickets complete with `CANCELLED`. May be called again. Nothing that the peer does delays it.
        """


class Transport(abc.ABC):
    """This process's end of one carrier: its regions, its channels, and the peers that have channels to it."""

    carrier: ClassVar[str]  # at most 8 ASCII letters
    address: str  # what a peer connects to

    @abc.abstractmethod
    def register(self, buffer: Buffer, *, remote_write: bool = True, remote_read: bool = True) -> Region:
        """Makes memory known for the life of the transport.

        Args:
          buffer: contiguous; may be read-only if peers don't write.
          remote_write: whether peers may write it.
          remote_read: whether peers may read it.

        Raises:
          ValueError: this carrier can't use that memory.
        """

    @abc.abstractmethod
    def check_region(self, region: Region) -> None:
        """Raises `ValueError` unless `region` is registered with this transport."""

    def remote(self, descriptor: bytes) -> RemoteRegion:
        """The region that a peer's descriptor stands for; whether it is there shows when it is used.

        Raises:
          ValueError: not a descriptor of this carrier.
        """
        if len(descriptor) != _DESCRIPTOR.size:
            raise ValueError(f"a descriptor has {_DESCRIPTOR.size} bytes, this one {len(descriptor)}")
        name, key, address, length = _DESCRIPTOR.unpack(descriptor)
        if name.rstrip(b"\0") != self.carrier.encode():
            raise ValueError(f"descriptor of carrier {name!r}, expected {self.carrier!r}")
        return RemoteRegion(key, address, length)

    @abc.abstractmethod
    def connect(self, peer_address: str, traffic: TrafficClass) -> Channel:
        """Opens a channel, in bounded time.

        Raises:
          ValueError: not an address of this carrier.
          ConnectionRefusedError: nobody listens there.
          PermissionError: who listens there doesn't let us in, or is not what we look for.
          OSError: another reason, such as `TimeoutError`.
        """

    @abc.abstractmethod
    def peers(self) -> list[Peer]:
        """Those that have a channel to here; one that is not in it any more can't reach our memory."""

    @abc.abstractmethod
    def disconnect(self, peer: Peer) -> None:
        """Starts to end a peer's channel to here; `PeerLost(peer)` says when it has. Unknown peers are ignored."""

    @abc.abstractmethod
    def refuse(self, address: str) -> None:
        """Takes no channel of this transport any more; those that it has stay. No other one ever has its address."""

    @abc.abstractmethod
    def poll(self) -> list[Event]:
        """What has happened since the last call; does not wait."""

    @abc.abstractmethod
    def fileno(self) -> int:
        """A descriptor that is readable whenever `poll` would return something."""

    @abc.abstractmethod
    def check_integrity(self) -> None:
        """Checks that no ticket is lost, and that every channel and peer that has not ended is looked after.

        Raises:
          IntegrityError: a defect of the transport.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Closes all channels, ends the peers' and lets go of all memory. What has happened can still be polled.

        Raises:
          TimeoutError: all is closed here, but a peer has not let go of the regions: its process must end before
            their memory is used again.
        """


def pack_descriptor(carrier: str, remote: RemoteRegion) -> bytes:
    """The descriptor that `Transport.remote` reads."""
    return _DESCRIPTOR.pack(carrier.encode(), remote.key, remote.address, remote.length)


def check_transfer(region: Region, ops: Sequence[Op], *, write: bool, immediate: int | None) -> int:
    """Bytes that a transfer moves.

    Raises:
      ValueError: an op is empty, not within `region`, or has a remote offset that can't be; a read into a region that
        is read-only; an immediate that is not of 32 bits.
    """
    if immediate is not None and not 0 <= immediate < 2**32:
        raise ValueError(f"{immediate=} must be from 0 to 2**32 - 1")
    if not write and not region.writable:
        raise ValueError("the local region is read-only")
    total = 0
    size = region.length
    for op in ops:
        local, remote, length = op
        if length < 1 or local < 0 or local + length > size:
            raise ValueError(f"{op} is not within the local region of {size} bytes, or empty")
        if not 0 <= remote < _OFFSETS - length:
            raise ValueError(f"{op} has a remote offset outside of 0 to 2**63")
        total += length
    return total


def joined(ops: Sequence[Op]) -> list[Op]:
    """The same bytes in as few ops as neighbours allow: what ends where the next begins, on both sides, is one run."""
    runs: list[Op] = []
    local, remote, length = 0, 0, 0
    for op in ops:
        if length and op.local == local + length and op.remote == remote + length:
            length += op.length
        else:
            if length:
                runs.append(Op(local, remote, length))
            local, remote, length = op
    if length:
        runs.append(Op(local, remote, length))
    return runs
