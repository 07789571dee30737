"""Stands in for pyverbs: moves bytes within this process, records what it was asked, and objects to dangerous calls.

It keeps to what the tests need: two ends of reliable queue pairs, one completion queue each.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import select
import sys
import threading
from collections import deque
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ENUMS = SimpleNamespace(
    IBV_ACCESS_LOCAL_WRITE=1,
    IBV_ACCESS_REMOTE_WRITE=2,
    IBV_ACCESS_REMOTE_READ=4,
    IBV_GID_TYPE_SYSFS_ROCE_V2=1,
    IBV_LINK_LAYER_ETHERNET=2,
    IBV_QPS_ERR=6,
    IBV_QPT_RC=2,
    IBV_QP_STATE=1,
    IBV_SEND_SIGNALED=2,
    IBV_WC_REM_ACCESS_ERR=10,
    IBV_WC_SUCCESS=0,
    IBV_WC_WR_FLUSH_ERR=5,
    IBV_WR_RDMA_READ=4,
    IBV_WR_RDMA_WRITE=0,
    IBV_WR_RDMA_WRITE_WITH_IMM=1,
)


class PyverbsError(Exception):
    error_code = 22


class Fields:
    """Holds what it is given, by keyword or by attribute."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)


class Fabric:
    """All devices, and what happened on them.

    Attributes:
      held: sends are posted, but not done until `run`.
      late: they are done when a completion queue is asked to announce what comes next, but right before.
      flushes: whether a queue pair that was stopped gives back what is posted; else at `flush`.
      posts: of each `post_send`, the requests.
      faults: what a caller of pyverbs must not do.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.names = ["rdma1", "rdma0"]
        self.port = Fields(active_mtu=5, lid=0, link_layer=2, gid_tbl_len=3)
        self.gids = [
            "fe80:0000:0000:0000:0000:0000:0000:0001",
            "0000:0000:0000:0000:0000:ffff:0a09:0101",
            "0:0:0:0:0:0:0:0",
        ]
        self.refuse_memory = False
        self.refuse_post = False
        self.held = self.late = False
        self.flushes = True
        self.posts: list[list[SendWR]] = []
        self.pairs: dict[int, QP] = {}
        self.memory: dict[int, MR] = {}
        self.open: set[Any] = set()
        self.faults: list[str] = []
        self.numbers = itertools.count(1)
        self.waiting: deque[tuple[QP, SendWR]] = deque()
        self.refused: set[int] = set()  # remote addresses

    def run(self, count: int | None = None) -> None:
        """Does what is posted, or so many of it; an immediate waits for a receive."""
        with self.lock:
            while self.waiting and count != 0:
                pair, request = self.waiting[0]
                if not pair.do(request):
                    return
                self.waiting.popleft()
                count = None if count is None else count - 1

    def flush(self) -> None:
        """Gives back what stopped queue pairs have."""
        with self.lock:
            for pair in self.pairs.values():
                if pair.stopped:
                    pair.flush()


class Resource:
    """Something that must be closed."""

    fabric: Fabric

    def __init__(self) -> None:
        self.fabric.open.add(self)
        self.closed = False

    def close(self) -> None:
        self.closed = True
        self.fabric.open.discard(self)


class Request(Resource):
    """Freed by `close`, which frees twice if it is called twice."""

    def close(self) -> None:
        if self.closed:
            self.fabric.faults.append(f"{type(self).__name__} closed twice")
        super().close()


class SGE(Request):
    def __init__(self, addr: int, length: int, lkey: int) -> None:
        super().__init__()
        self.addr, self.length, self.lkey = addr, length, lkey


class SendWR(Request):
    def __init__(self, wr_id: int, opcode: int, num_sge: int, sg: list[SGE], send_flags: int, next_wr: Any) -> None:
        super().__init__()
        assert num_sge == len(sg) == 1
        self.wr_id, self.opcode, self.send_flags, self.next_wr = wr_id, opcode, send_flags, next_wr
        self.addr, self.length, self.lkey = sg[0].addr, sg[0].length, sg[0].lkey
        self.imm_data = 0

    def set_wr_rdma(self, rkey: int, addr: int) -> None:
        self.rkey, self.remote = rkey, addr


class RecvWR(Request):
    def __init__(self, wr_id: int, num_sge: int, sg: list[SGE]) -> None:
        super().__init__()
        self.wr_id = wr_id


class Context(Resource):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def query_port(self, port: int) -> Fields:
        return self.fabric.port

    def query_device(self) -> Fields:
        return Fields(max_qp_rd_atom=16, max_qp_init_rd_atom=4)

    def query_gid(self, port: int, index: int) -> str:
        return self.fabric.gids[index]

    def query_gid_type(self, port: int, index: int) -> int:
        return 1


class PD(Resource):
    def __init__(self, context: Context) -> None:
        super().__init__()


class MR(Resource):
    def __init__(self, domain: PD, nbytes: int, access: int, address: int) -> None:
        if self.fabric.refuse_memory:
            raise PyverbsError("Failed to register a MR")
        super().__init__()
        self.lkey = self.rkey = next(self.fabric.numbers)
        self.address, self.nbytes, self.access = address, nbytes, access
        self.fabric.memory[self.rkey] = self


class CompChannel(Resource):
    def __init__(self, context: Context) -> None:
        super().__init__()
        self.fd = os.eventfd(0, os.EFD_SEMAPHORE)

    def get_cq_event(self, queue: CQ) -> None:
        if not select.select([self.fd], [], [], 0)[0]:
            self.fabric.faults.append("waited for an event with the interpreter's lock held")
        os.eventfd_read(self.fd)
        queue.fetched += 1

    def close(self) -> None:
        os.close(self.fd)
        super().close()


class CQ(Resource):
    def __init__(self, context: Context, entries: int, _: None, channel: CompChannel, vector: int) -> None:
        super().__init__()
        self.channel, self.entries = channel, entries
        self.found: deque[Fields] = deque()
        self.armed = False
        self.fetched = self.acknowledged = 0

    def push(self, **fields: Any) -> None:
        self.found.append(Fields(**fields))
        if len(self.found) > self.entries:
            self.fabric.faults.append("completion queue overrun")
        if self.armed:
            self.armed = False
            os.eventfd_write(self.channel.fd, 1)

    def poll(self, most: int) -> tuple[int, list[Fields]]:
        with self.fabric.lock:
            some = [self.found.popleft() for _ in range(min(most, len(self.found)))]
            return len(some), some

    def req_notify(self) -> None:
        with self.fabric.lock:
            if self.fabric.late:
                self.fabric.run()
            self.armed = True

    def ack_events(self, count: int) -> None:
        self.acknowledged += count

    def close(self) -> None:
        if self.fetched != self.acknowledged:
            self.fabric.faults.append("closing the completion queue would wait for ever")
        super().close()


class QP(Resource):
    def __init__(self, domain: PD, wanted: Fields) -> None:
        super().__init__()
        self.queue: CQ = wanted.scq
        self.capacity: Fields = wanted.cap
        self.signals_all = wanted.sq_sig_all
        self.qp_num = next(self.fabric.numbers)
        self.fabric.pairs[self.qp_num] = self
        self.attributes: Any = None
        self.sent: deque[SendWR] = deque()
        self.receives: deque[int] = deque()
        self.stopped = False

    def to_rts(self, attributes: Any) -> None:
        self.attributes = attributes

    def post_send(self, head: SendWR) -> None:
        with self.fabric.lock:
            if self.fabric.refuse_post:
                raise PyverbsError("Failed to post send")
            requests = [head]
            while (following := requests[-1].next_wr) is not None:
                requests.append(following)
            if any(one.closed for one in requests):
                self.fabric.faults.append("posted what was freed")
            self.fabric.posts.append(requests)
            self.sent += requests
            if len(self.sent) > self.capacity.max_send_wr:
                self.fabric.faults.append("send queue overrun")
            self.fabric.waiting += [(self, one) for one in requests]
            if not self.fabric.held:
                self.fabric.run()

    def post_recv(self, request: RecvWR) -> None:
        with self.fabric.lock:
            self.receives.append(request.wr_id)
            if self.attributes is None:
                self.fabric.faults.append("receive posted to a queue pair in RESET")
            if not self.fabric.held:
                self.fabric.run()

    def do(self, request: SendWR) -> bool:
        """One message; False if its immediate has to wait."""
        if self.stopped or self.closed:
            return True
        peer = self.fabric.pairs[self.attributes.dest_qp_num]
        immediate = request.opcode == ENUMS.IBV_WR_RDMA_WRITE_WITH_IMM
        if immediate and not peer.receives and not peer.closed:
            return False
        if peer.closed or not self._move(request):
            self.queue.push(wr_id=request.wr_id, status=ENUMS.IBV_WC_REM_ACCESS_ERR, imm_data=0)
            self._forget(request)
            self.stopped = True
            if self.fabric.flushes:
                self.flush()
            return True
        if immediate:
            peer.queue.push(wr_id=peer.receives.popleft(), status=0, imm_data=request.imm_data)
        if request.send_flags & ENUMS.IBV_SEND_SIGNALED:
            self.queue.push(wr_id=request.wr_id, status=0, imm_data=0)
            self._forget(request)
        return True

    def _forget(self, request: SendWR) -> None:
        while self.sent and self.sent[0].wr_id <= request.wr_id:
            self.sent.popleft()

    def _move(self, request: SendWR) -> bool:
        if not request.length:
            return True
        memory = self.fabric.memory.get(request.rkey)
        read = request.opcode == ENUMS.IBV_WR_RDMA_READ
        need = ENUMS.IBV_ACCESS_REMOTE_READ if read else ENUMS.IBV_ACCESS_REMOTE_WRITE
        if memory is None or memory.closed or not memory.access & need or request.remote in self.fabric.refused:
            return False
        if not 0 <= request.remote - memory.address <= memory.nbytes - request.length:
            return False
        ends = (request.addr, request.remote) if read else (request.remote, request.addr)
        ctypes.memmove(*ends, request.length)
        return True

    def modify(self, attributes: Any, mask: int) -> None:
        with self.fabric.lock:
            assert (attributes.qp_state, mask) == (ENUMS.IBV_QPS_ERR, ENUMS.IBV_QP_STATE)
            self.stopped = True
            if self.fabric.flushes:
                self.flush()

    def flush(self) -> None:
        for number in [*(one.wr_id for one in self.sent), *self.receives]:
            self.queue.push(wr_id=number, status=ENUMS.IBV_WC_WR_FLUSH_ERR, imm_data=0)
        self.sent.clear()
        self.receives.clear()

    def close(self) -> None:
        with self.fabric.lock:
            super().close()


def install(monkeypatch: pytest.MonkeyPatch, enums: str = "libibverbs_enums") -> Fabric:
    """Has `import pyverbs` find all this, its enums under the name of one version."""
    fabric = Fabric()
    monkeypatch.setattr(Resource, "fabric", fabric, raising=False)

    def devices() -> list[Fields]:
        return [Fields(name=name.encode()) for name in fabric.names]

    parts: dict[str, list[Callable[..., Any]]] = {
        "pd": [PD],
        "mr": [MR],
        "cq": [CQ, CompChannel],
        "wr": [SGE, SendWR, RecvWR],
        "qp": [QP],
        "pyverbs_error": [PyverbsError],
    }
    contents: dict[str, dict[str, Any]] = {part: {one.__name__: one for one in some} for part, some in parts.items()}
    contents["device"] = {"Context": Context, "get_device_list": devices}
    contents["qp"] |= {"QPAttr": Fields, "QPCap": Fields, "QPInitAttr": Fields}
    contents["addr"] = {"AHAttr": Fields, "GID": str, "GlobalRoute": Fields}
    contents[enums] = vars(ENUMS)
    package = ModuleType("pyverbs")
    package.__path__ = []
    monkeypatch.setitem(sys.modules, "pyverbs", package)
    for part in ("enums", "libibverbs_enums"):
        monkeypatch.delitem(sys.modules, f"pyverbs.{part}", raising=False)
    for part, names in contents.items():
        module = ModuleType(f"pyverbs.{part}")
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, f"pyverbs.{part}", module)
    return fabric
