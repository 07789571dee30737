"""Reliable queue pairs of RDMA verbs: a few calls and plain data, nothing of the carrier.

Two things about pyverbs shape this module. It never releases the interpreter's lock: completions are announced on a
descriptor, and an event is fetched only when there is one. Scatter-gather elements and work requests are freed by
`close` alone, which must be called once; a chain of requests holds bare pointers, so all live until it is posted.
"""

from __future__ import annotations

import enum
import logging
import secrets
import select
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxdual.transport.rdma_device import Device

_LOG = logging.getLogger(__name__)
_MOST_TAKEN = 64
_STOP_SECONDS = 2.0  # that a device has to flush what is posted
_ENDPOINT = struct.Struct("<20sIIHBB16s")
_MAGIC = b"jaxdual queue pair 1"


class Outcome(enum.Enum):
    """How a work request ended."""

    OK = enum.auto()
    REFUSED = enum.auto()  # by the remote side: key, bounds or direction
    FLUSHED = enum.auto()  # not done, since an earlier one failed or the queue pair was stopped
    FAILED = enum.auto()


class Completion(NamedTuple):
    """The end of work request `number`, and of those before it; `status` is the device's, `immediate` of 32 bits."""

    number: int
    outcome: Outcome
    status: int
    immediate: int


class SendRequest(NamedTuple):
    """One message: addresses and keys of both sides, bytes, and what comes with it."""

    write: bool
    local: int
    local_key: int
    remote: int
    remote_key: int
    length: int
    immediate: int | None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What the other side needs to address a queue pair.

    Attributes:
      number: of the queue pair.
      psn: that its first packet has.
      lid: of the port; 0 with Ethernet.
      mtu: of the port, as the verbs have it (5 is 4096 bytes).
      reads: of the peer, that it serves at once.
      gid: 16 bytes.
    """

    number: int
    psn: int
    lid: int
    mtu: int
    reads: int
    gid: bytes

    nbytes = _ENDPOINT.size

    def pack(self) -> bytes:
        """For `unpack` at the other side, `nbytes` long."""
        return _ENDPOINT.pack(_MAGIC, self.number, self.psn, self.lid, self.mtu, self.reads, self.gid)

    @classmethod
    def unpack(cls, data: bytes) -> Endpoint:
        """Raises `ValueError` unless it is the endpoint of a queue pair."""
        magic, number, psn, lid, mtu, reads, gid = _ENDPOINT.unpack(data)
        if magic != _MAGIC:
            raise ValueError("not the endpoint of a queue pair")
        return cls(number, psn, lid, mtu, reads, gid)


@dataclass(frozen=True, slots=True)
class Path:
    """How packets travel: service level, DSCP, ack timeout of 4.096 us * 2**n, and how often a packet is sent again."""

    service_level: int
    dscp: int
    ack_timeout: int
    retries: int


class QueuePair:
    """One reliable connection, with a completion queue of its own; one thread at a time uses it.

    It posts sends or receives, not both. Each gets the next number, from 1; `Completion.number` tells that all up to
    it have ended.

    Args:
      device: on which it is opened.
      sends: that are posted at once, at most; with 0 it is passive, and peers write and read by it.
      receives: likewise, if it is passive.

    Raises:
      OSError: the device has none left, or is closed.
    """

    def __init__(self, device: Device, *, sends: int = 0, receives: int = 0) -> None:
        self.depth = sends or receives
        self.posted = 0
        self.finished = 0
        self._api = device.pyverbs
        self._device = device
        self._passive = not sends
        self._armed = False
        self._closed = False
        self._psn = secrets.randbits(24)
        self._channel: Any = None
        self._opened: list[Any] = []  # in the order in which they were made
        device.hold()
        try:
            self._channel, self._fd = device.open_channel()
            with device.errors("queue pair"):
                self._open(sends or 1, receives or 1)
        except BaseException:
            self.close()
            raise
        self._poller = select.poll()
        self._poller.register(self._fd, select.POLLIN)

    def _open(self, sends: int, receives: int) -> None:
        api, device = self._api, self._device
        self._queue = api.CQ(device.context, self.depth + 1, None, self._channel, 0)
        self._opened.append(self._queue)
        capacity = api.QPCap(max_send_wr=sends, max_recv_wr=receives, max_send_sge=1, max_recv_sge=1)
        wanted = api.QPInitAttr(
            qp_type=api.enums.IBV_QPT_RC, scq=self._queue, rcq=self._queue, cap=capacity, sq_sig_all=0
        )
        self._pair = api.QP(device.domain, wanted)
        self._opened.append(self._pair)

    @property
    def endpoint(self) -> Endpoint:
        """For the other side."""
        device = self._device
        return Endpoint(self._pair.qp_num, self._psn, device.lid, device.mtu, device.serves_reads, device.gid)

    def connect(self, peer: Endpoint, path: Path) -> None:
        """Makes it ready to receive and to send.

        Raises:
          OSError: the device refuses, say since there is no way to that address.
        """
        api, device = self._api, self._device
        attributes = api.QPAttr(port_num=device.port)
        # Peers reach this side's memory by the queue pair that serves them, never by the one this side writes with.
        remote = api.enums.IBV_ACCESS_REMOTE_WRITE | api.enums.IBV_ACCESS_REMOTE_READ
        attributes.qp_access_flags = remote if self._passive else 0
        attributes.path_mtu = min(device.mtu, peer.mtu)
        attributes.dest_qp_num = peer.number
        attributes.rq_psn, attributes.sq_psn = peer.psn, self._psn
        attributes.max_rd_atomic = max(1, min(device.asks_reads, peer.reads))
        attributes.max_dest_rd_atomic = device.serves_reads
        attributes.min_rnr_timer = 12  # 0.64 ms
        attributes.timeout, attributes.retry_cnt = path.ack_timeout, path.retries
        attributes.rnr_retry = 7  # for ever: a peer that is slow to post receives is alive
        route = api.GlobalRoute(
            dgid=api.GID(peer.gid.hex(":", 2)),
            sgid_index=device.gid_index,
            hop_limit=64,
            traffic_class=path.dscp << 2,
        )
        attributes.ah_attr = api.AHAttr(
            dlid=peer.lid, sl=path.service_level, is_global=1, port_num=device.port, gr=route
        )
        with device.errors("queue pair"):
            self._pair.to_rts(attributes)

    @property
    def room(self) -> int:
        """Requests that may be posted now."""
        return self.depth - (self.posted - self.finished)

    def post_sends(self, requests: Sequence[SendRequest]) -> None:
        """Posts messages at once, at most `room`; the last one's completion stands for all.

        Raises:
          OSError: the device refuses; which of them were posted is not known.
        """
        api, flags = self._api, self._api.enums
        self.posted += len(requests)
        chain: list[Any] = []
        following = None
        try:
            for back, request in enumerate(reversed(requests)):
                if not request.write:
                    opcode = flags.IBV_WR_RDMA_READ
                elif request.immediate is None:
                    opcode = flags.IBV_WR_RDMA_WRITE
                else:
                    opcode = flags.IBV_WR_RDMA_WRITE_WITH_IMM
                element = api.SGE(request.local, request.length, request.local_key)
                try:
                    following = api.SendWR(
                        wr_id=self.posted - back,
                        opcode=opcode,
                        num_sge=1,
                        sg=[element],
                        send_flags=0 if back else flags.IBV_SEND_SIGNALED,
                        next_wr=following,
                    )
                finally:
                    element.close()
                chain.append(following)
                following.set_wr_rdma(request.remote_key, request.remote)
                if request.immediate is not None:
                    following.imm_data = socket.htonl(request.immediate)
            with self._device.errors("send"):
                self._pair.post_send(following)
        finally:
            for sent in chain:
                sent.close()

    def post_receives(self, count: int) -> None:
        """Makes room for so many immediates.

        Raises:
          OSError: the device refuses.
        """
        for _ in range(count):
            self.posted += 1
            element = self._api.SGE(0, 0, 0)  # an immediate comes without bytes, but pyverbs wants one
            try:
                request = self._api.RecvWR(wr_id=self.posted, num_sge=1, sg=[element])
            finally:
                element.close()
            try:
                with self._device.errors("receive"):
                    self._pair.post_recv(request)
            finally:
                request.close()

    def take(self) -> list[Completion]:
        """What has completed, oldest first; if nothing, `fileno` becomes readable when something does.

        Raises:
          OSError: the completion queue is broken.
        """
        with self._device.errors("completions"):
            count, found = self._queue.poll(_MOST_TAKEN)
            if not count and not self._armed:
                self._queue.req_notify()
                self._armed = True
                # What came before that is not announced.
                count, found = self._queue.poll(_MOST_TAKEN)
        completions = [self._completion(one) for one in found[:count]]
        if completions:
            self.finished = completions[-1].number
        return completions

    def fileno(self) -> int:
        """Readable when there is an event for `acknowledge`."""
        return self._fd

    def acknowledge(self) -> None:
        """Fetches the event that `fileno` announced; `take` says what it was about."""
        with self._device.errors("completion event"):
            self._channel.get_cq_event(self._queue)
        self._queue.ack_events(1)  # destroying the queue waits for that
        self._armed = False

    def stop(self) -> list[Completion]:
        """Has the device drop what it has not done, and waits until it has.

        Returns:
          What has completed in the meantime, in whatever way.

        Raises:
          OSError: as `take`.
        """
        found: list[Completion] = []
        if self.posted == self.finished:
            return found
        flags = self._api.enums
        with self._device.errors("stop"):
            self._pair.modify(self._api.QPAttr(qp_state=flags.IBV_QPS_ERR), flags.IBV_QP_STATE)
        deadline = time.monotonic() + _STOP_SECONDS
        while self.finished < self.posted:
            some = self.take()
            found += some
            if some:
                continue
            left = deadline - time.monotonic()
            if left <= 0:
                _LOG.warning("%d requests were not flushed", self.posted - self.finished)
                break
            if self._poller.poll(left * 1000):
                self.acknowledge()
        return found

    def close(self) -> None:
        """Destroys it: from now on the device moves nothing of it. May be called again."""
        if self._closed:
            return
        self._closed = True
        try:
            while self._opened:
                self._opened.pop().close()
            if self._channel is not None:
                self._device.close_channel(self._channel)
        finally:
            self._device.let_go()

    def _completion(self, found: Any) -> Completion:
        flags = self._api.enums
        if found.status == flags.IBV_WC_SUCCESS:
            outcome = Outcome.OK
        elif found.status == flags.IBV_WC_WR_FLUSH_ERR:
            outcome = Outcome.FLUSHED
        elif found.status == flags.IBV_WC_REM_ACCESS_ERR:
            outcome = Outcome.REFUSED
        else:
            outcome = Outcome.FAILED
        return Completion(found.wr_id, outcome, int(found.status), socket.ntohl(found.imm_data))
