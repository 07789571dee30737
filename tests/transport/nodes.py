"""Transports of every kind under test, with memory and a record of what they reported."""

from __future__ import annotations

import itertools
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxdual.transport import (
    Channel,
    Completed,
    Event,
    Nic,
    Op,
    PeerLost,
    Received,
    RemoteRegion,
    ShapedTransport,
    SharedSlab,
    ShmTransport,
    Status,
    TcpSettings,
    TcpTransport,
    Ticket,
    TrafficClass,
)
from jaxdual.transport.rdma_device import device_names
from jaxdual.transport.verbs import VerbsSettings, VerbsTransport

ROOT = Path(__file__).resolve().parents[2]
SECRET = b"0123456789abcdef"
RATE = 600e6  # bytes per second of the cards of shaped kinds
CHUNK = 64 << 10
MIB = 1 << 20
DEADLINE = 20.0  # seconds that anything may take
KINDS = ("shm", "tcp", "shaped_shm", "shaped_tcp")


def rdma_devices() -> tuple[list[str], str]:
    """Devices for the verbs carrier, or why there are none.

    Of soft-RoCE's in the guest, those on the two ends of a link, so that packets go over it.
    """
    try:
        found = device_names()
    except NotImplementedError as error:
        return [], str(error)
    linked = [name for name in found if name in ("rxea", "rxeb")]
    return linked or found, "no RDMA device"


RDMA_DEVICES, WHY_NO_RDMA = rdma_devices()
_NEXT_DEVICE = itertools.cycle(RDMA_DEVICES)


class Node:
    """A transport with a slab, of which all is one region.

    Args:
      kind: one of `KINDS`, or "verbs".
      directory: of the cards.
      nbytes: of the slab.
      silence: seconds, of TCP.
    """

    def __init__(self, kind: str, directory: Path, nbytes: int = 4 * MIB, silence: float = 10.0) -> None:
        self.kind = kind
        self.slab = SharedSlab(nbytes)
        self.memory = self.slab.array
        self.nics: dict[str, Nic] = {}
        inner: Any
        if kind.endswith("shm"):
            inner = ShmTransport(self.slab)
        elif kind == "verbs":
            # An emulated processor is slow: packets are not lost that are not there within a second. Small messages and
            # queues, so that transfers have many.
            settings = VerbsSettings(
                silence_seconds=max(4.0, silence), ack_timeout=18, message_bytes=64 << 10, send_depth=32
            )
            inner = VerbsTransport(SECRET, device=next(_NEXT_DEVICE), settings=settings)
        else:
            inner = TcpTransport(SECRET, settings=TcpSettings(silence_seconds=silence))
        if kind.startswith("shaped"):
            self.nic = Nic.create(directory, f"nic-{os.getpid()}-{id(self)}", read_rate=RATE, write_rate=RATE)
            self.transport: Any = ShapedTransport(inner, self.nic, self.nics.get, chunk_bytes=CHUNK)
        else:
            self.transport = inner
        view = self.slab.view()
        self.region = self.transport.register(view)
        view.release()
        self.events: list[Event] = []

    def remote(self, other: Node | Process) -> RemoteRegion:
        return self.transport.remote(other.descriptor)

    @property
    def descriptor(self) -> bytes:
        return self.region.descriptor

    def connect(self, other: Node | Process, traffic: TrafficClass = TrafficClass.KV) -> Channel:
        if isinstance(other, Node) and self.kind.startswith("shaped"):
            self.nics[other.transport.address] = other.nic
        return self.transport.connect(other.address, traffic)

    @property
    def address(self) -> str:
        return self.transport.address

    def poll(self) -> None:
        self.events += self.transport.poll()

    def wait(self, found: Callable[[], Any], what: str = "", seconds: float = DEADLINE) -> Any:
        """What `found` gives once it is true; only `fileno` wakes it up for events."""
        deadline = time.monotonic() + seconds
        while True:
            self.poll()
            if result := found():
                return result
            left = deadline - time.monotonic()
            assert left > 0, f"not in {seconds} s: {what} {self.events[-5:]}"
            # Some conditions are on memory, which nothing announces.
            select.select([self.transport.fileno()], [], [], min(left, 0.02) if not what else left)

    def status(self, ticket: Ticket) -> Status:
        """How a ticket ended; waits for it."""
        self.wait(lambda: self.ended(ticket), "completion")
        (status,) = self.ended(ticket)
        return status

    def ended(self, ticket: Ticket) -> list[Status]:
        return [event.status for event in self.events if isinstance(event, Completed) and event.ticket is ticket]

    def lost(self) -> list[PeerLost]:
        return [event for event in self.events if isinstance(event, PeerLost)]

    def immediates(self) -> list[int]:
        return [event.immediate for event in self.events if isinstance(event, Received)]

    def close(self) -> None:
        """Ends it, and has checked that it kept its books."""
        try:
            self.transport.check_integrity()
        finally:
            self.transport.close()
            self.memory = np.empty(0, np.uint8)
            self.slab.close()
            if self.kind.startswith("shaped"):
                self.nic.close()


def serve() -> None:
    """The program of `Process`: a node that obeys lines of JSON, and refills what it was told to keep posted."""
    settings = json.loads(sys.stdin.readline())
    node = Node(settings["kind"], Path(settings["directory"]), settings["nbytes"], settings["silence"])
    print(json.dumps({"address": node.address, "descriptor": node.descriptor.hex()}), flush=True)
    channel: Any = None
    post: Callable[[], Any] = lambda: None  # noqa: E731
    fd = sys.stdin.fileno()
    while True:
        ready, _, _ = select.select([fd, node.transport.fileno()], [], [])
        for event in node.transport.poll():
            if isinstance(event, Completed) and event.status is Status.OK:
                post()
        if fd not in ready:
            continue
        line = sys.stdin.readline()
        if not line:
            break
        request = json.loads(line)
        if request["op"] == "flood":
            node.memory[:] = request["fill"]
            channel = node.transport.connect(request["address"], TrafficClass.KV)
            remote = node.transport.remote(bytes.fromhex(request["descriptor"]))
            call = channel.write if request["write"] else channel.read

            def post(call: Any = call, remote: Any = remote) -> Any:
                return call(node.region, remote, [Op(0, 0, node.region.length)])

            for _ in range(4):
                post()
        print(json.dumps({}), flush=True)


class Process:
    """A node in a process of its own, which can be stopped and killed."""

    def __init__(self, kind: str, directory: Path, nbytes: int = 4 * MIB, silence: float = 10.0) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from tests.transport.nodes import serve; serve()"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        hello = self.ask(kind=kind, directory=str(directory), nbytes=nbytes, silence=silence)
        self.address = hello["address"]
        self.descriptor = bytes.fromhex(hello["descriptor"])

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        assert select.select([self._process.stdout], [], [], DEADLINE)[0], "the process doesn't answer"
        return json.loads(self._process.stdout.readline())

    def flood(self, node: Node, *, write: bool = True, fill: int = 1) -> None:
        """Has it move all of its memory to or from a node's, again and again."""
        self.ask(op="flood", address=node.address, descriptor=node.descriptor.hex(), write=write, fill=fill)

    def send(self, number: signal.Signals) -> None:
        """Sends a signal; one that stops has stopped every thread on return."""
        self._process.send_signal(number)
        if number == signal.SIGSTOP:
            tasks = Path(f"/proc/{self._process.pid}/task")
            deadline = time.monotonic() + DEADLINE
            while any(_state(task) != "T" for task in tasks.iterdir()):
                assert time.monotonic() < deadline, "it doesn't stop"

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def _state(task: Path) -> str:
    return (task / "stat").read_text().rpartition(")")[2].split()[0]
