"""Speed of `jaxdual.transport` between two processes of this machine, beside what its carriers can't be faster than.

`python -m bench.transport --json FILE`. Shared memory is set against numpy's copy between the same two slabs in one
process, TCP against a bare loop of `sendall`, `recv_into` and a byte of acknowledgement, with the same memory and
kernel buffers, and NIXL's shared memory is measured if it is installed. Transfers walk through memory that is larger
than the caches. `shm` and `tcp` have one transfer under way at a time, as the bare loop has; `shm_4` and `tcp_4` have
four. All ways take turns, size by size; medians are reported, with the CPU seconds of both processes for each GiB.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import queue
import select
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bench.report import header, table, write_json
from bench.worker_loop import serve_lines
from bench.workers import Worker
from jaxdual.transport import (
    Channel,
    Completed,
    Op,
    Region,
    RemoteRegion,
    SharedSlab,
    ShmTransport,
    Status,
    TcpSettings,
    TcpTransport,
    TrafficClass,
    Transport,
)

_SLAB_BYTES = 256 << 20
_SIZES = (64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20)
_BYTES = 64 << 20  # moved by one way in one turn, at least
_DEPTHS = (1, 4)  # transfers under way at once
_SECRET = b"between two processes of a benchmark"
_LEAST = 1 << 20  # from which size there are goals
# Of which way, and how much of it.
_BASES = {"shm": ("memcpy", 0.7), "tcp": ("raw_socket", 0.8), "nixl": ("memcpy", None)}

# Moves `count` transfers of a size.
Way = Callable[[int, int], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the measurements; returns the exit status: 1 if a goal was missed."""
    options = _parse(arguments)
    if options.worker:
        serve_lines(_Target().operations())
        return 0
    report = header("bench.transport")
    report["slab_bytes"] = _SLAB_BYTES
    command = [sys.executable, "-m", "bench.transport", "--worker"]
    with Worker("target", command, cores=sorted(os.sched_getaffinity(0))) as worker, _Initiator(worker) as initiator:
        report["sizes"] = {}
        for size in options.size or _SIZES:
            report["sizes"][size] = _measure(initiator.ways(), size, options.repeats, worker)
            write_json(options.json, report)
    report["goals"] = _goals(report["sizes"])
    write_json(options.json, report)
    print(_table(report["sizes"]))
    for goal in report["goals"]:
        print(f"{goal['name']}: {goal['ratio']:.2f}, goal {goal['goal']}", file=sys.stderr, flush=True)
    return 0 if all(goal["ratio"] >= goal["goal"] for goal in report["goals"]) else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.transport", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="where results go")
    parser.add_argument("--repeats", type=int, default=7, help="turns of each way and size")
    parser.add_argument("--size", type=int, action="append", metavar="BYTES", help="only this; may be repeated")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


class _Target:
    """The other process: memory, both transports, and the far end of the bare loop."""

    def __init__(self) -> None:
        self._slab = SharedSlab(_SLAB_BYTES, populate=True)
        self._listener = _listen()
        self._expected: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        self._transports: list[Transport] = [ShmTransport(self._slab), TcpTransport(_SECRET)]
        threading.Thread(target=self._take, daemon=True).start()

    def operations(self) -> dict[str, Callable[..., Mapping[str, Any]]]:
        return {
            "open": self._open,
            "nixl": self._open_nixl,
            "expect": self._expect,
            "cpu": lambda: {"seconds": time.process_time()},
        }

    def _open(self) -> dict[str, Any]:
        regions = [transport.register(self._slab.view()) for transport in self._transports]
        return {
            "slab": self._slab.path,
            "raw_port": self._listener.getsockname()[1],
            "transports": [
                {"address": transport.address, "descriptor": region.descriptor.hex()}
                for transport, region in zip(self._transports, regions, strict=True)
            ],
        }

    def _open_nixl(self) -> dict[str, Any]:
        self._nixl, descriptors = _nixl_agent("target", self._slab)
        return {
            "metadata": self._nixl.get_agent_metadata().hex(),
            "address": descriptors[0][0],
        }

    def _expect(self, size: int, count: int) -> dict[str, Any]:
        self._expected.put((size, count))
        return {}

    def _take(self) -> None:
        sock, _ = self._listener.accept()
        view = self._slab.view()
        while True:
            size, count = self._expected.get()
            for at in _places(size, count):
                got = 0
                while got < size:
                    got += sock.recv_into(view[at + got : at + size])
                sock.send(b"x")


class _Initiator:
    """This process's memory and its ways to the other's."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._slab = SharedSlab(_SLAB_BYTES, populate=True)
        self._slab.array[:] = np.arange(_SLAB_BYTES, dtype=np.uint32).view(np.uint8)[:_SLAB_BYTES]
        target = worker.ask("open")
        self._target = SharedSlab.open(target["slab"])
        self._raw = _dial(target["raw_port"])
        self._transports: dict[str, Transport] = {"shm": ShmTransport(self._slab), "tcp": TcpTransport(_SECRET)}
        self._channels = {}
        for (name, transport), there in zip(self._transports.items(), target["transports"], strict=True):
            channel = transport.connect(there["address"], TrafficClass.KV)
            region = transport.register(self._slab.view())
            self._channels[name] = (channel, region, transport.remote(bytes.fromhex(there["descriptor"])))

        self._nixl = _Nixl(self._slab, worker.ask("nixl")) if importlib.util.find_spec("nixl") else None

    def __enter__(self) -> _Initiator:
        return self

    def __exit__(self, *error: object) -> None:
        for transport in self._transports.values():
            transport.close()
        self._raw.close()

    def ways(self) -> dict[str, Way]:
        """By name."""
        ways: dict[str, Way] = {"memcpy": self._copy, "raw_socket": self._send}
        for depth in _DEPTHS:
            for name, transport in self._transports.items():
                ways[name if depth == 1 else f"{name}_{depth}"] = _transfer(transport, *self._channels[name], depth)
        if self._nixl is not None:
            ways["nixl"] = self._nixl.move
        return ways

    def _copy(self, size: int, count: int) -> None:
        for at in _places(size, count):
            np.copyto(self._target.array[at : at + size], self._slab.array[at : at + size])

    def _send(self, size: int, count: int) -> None:
        self._worker.ask("expect", size=size, count=count)
        view = self._slab.view()
        for at in _places(size, count):
            self._raw.sendall(view[at : at + size])
            if not self._raw.recv(1):
                raise ConnectionError("the bare loop was closed")


class _Nixl:
    """NIXL's writes over UCX's shared memory; a handle for each place and size is made in the first turn."""

    def __init__(self, slab: SharedSlab, target: Mapping[str, Any]) -> None:
        self._agent, ((self._here, _, _, _),) = _nixl_agent("initiator", slab)
        self._peer = self._agent.add_remote_agent(bytes.fromhex(target["metadata"]))
        self._there = target["address"]
        self._handles: dict[tuple[int, int], Any] = {}

    def move(self, size: int, count: int) -> None:
        agent = self._agent
        for at in _places(size, count):
            if (size, at) not in self._handles:
                ends = [agent.get_xfer_descs([(start + at, size, 0)], "DRAM") for start in (self._here, self._there)]
                self._handles[size, at] = agent.initialize_xfer("WRITE", *ends, self._peer)
            handle = self._handles[size, at]
            state = agent.transfer(handle)
            while state == "PROC":
                state = agent.check_xfer_state(handle)
            if state != "DONE":
                raise ConnectionError(f"NIXL says {state}")


def _nixl_agent(name: str, slab: SharedSlab) -> tuple[Any, list[tuple[int, int, int, str]]]:
    os.environ["UCX_TLS"] = "posix,sysv,cma,self"
    api = importlib.import_module("nixl._api")
    # Its progress thread would spin beside whatever else is measured, and writes to shared memory need none.
    agent = api.nixl_agent(name, api.nixl_agent_config(enable_prog_thread=False, backends=[]))
    agent.create_backend("UCX", {"ucx_error_handling_mode": "none"})
    descriptors = [(int(slab.array.ctypes.data), slab.nbytes, 0, "")]
    agent.register_memory(descriptors, "DRAM")
    return agent, descriptors


def _transfer(transport: Transport, channel: Channel, region: Region, remote: RemoteRegion, depth: int) -> Way:
    ready = select.poll()
    ready.register(transport.fileno(), select.POLLIN)

    def move(size: int, count: int) -> None:
        under_way = 0
        places = iter(_places(size, count))
        at = next(places, None)
        while at is not None or under_way:
            while at is not None and under_way < depth:
                channel.write(region, remote, [Op(at, at, size)])
                under_way += 1
                at = next(places, None)
            ready.poll()
            for event in transport.poll():
                if not isinstance(event, Completed) or event.status is not Status.OK:
                    raise ConnectionError(f"{event}")
                under_way -= 1

    return move


def _places(size: int, count: int) -> list[int]:
    """Offsets of transfers, one after the other and around."""
    return [index * size % _SLAB_BYTES for index in range(count)]


def _measure(ways: Mapping[str, Way], size: int, repeats: int, worker: Worker) -> dict[str, Any]:
    count = max(1, _BYTES // size)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            before = time.process_time() + worker.ask("cpu")["seconds"]
            start = time.perf_counter()
            way(size, count)
            took = time.perf_counter() - start
            spent = time.process_time() + worker.ask("cpu")["seconds"] - before
            if turn:  # the first one warms up
                seconds[name].append(took)
                cpu[name].append(spent)
    moved = size * count
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    report: dict[str, Any] = {
        name: {
            "gb_per_second": moved / medians[name] / 1e9,
            "fastest_gb_per_second": moved / min(seconds[name]) / 1e9,
            "cpu_seconds_per_gib": statistics.median(cpu[name]) / moved * 2**30,
        }
        for name in ways
    }
    for name in ways:
        if name.partition("_")[0] in _BASES:
            base, _ = _BASES[name.partition("_")[0]]
            report[name][f"of_{base}"] = medians[base] / medians[name]
    return report


def _goals(sizes: Mapping[int, Mapping[str, Any]]) -> list[dict[str, Any]]:
    goals = []
    for size, by in sizes.items():
        for name in by:
            base, goal = _BASES.get(name.partition("_")[0], (None, None))
            if goal is not None and size >= _LEAST:
                text = f"{name} at {_size(size)} of {base}"
                goals.append({"name": text, "ratio": by[name][f"of_{base}"], "goal": goal})
    return goals


def _table(sizes: Mapping[int, Mapping[str, Any]]) -> str:
    names = list(next(iter(sizes.values())))
    head = ["GB/s (of its base; CPU s/GiB)", *names]
    rows = []
    for size, by in sizes.items():
        cells = []
        for name in names:
            one = by[name]
            ratio = next((f"{value:.2f}; " for key, value in one.items() if key.startswith("of_")), "")
            cells.append(f"{one['gb_per_second']:.2f} ({ratio}{one['cpu_seconds_per_gib']:.2f})")
        rows.append([_size(size), *cells])
    return table(head, rows)


def _size(nbytes: int) -> str:
    return f"{nbytes >> 20} MiB" if nbytes >= 1 << 20 else f"{nbytes >> 10} KiB"


def _listen() -> socket.socket:
    listener = socket.create_server(("127.0.0.1", 0))
    _set_options(listener)
    return listener


def _dial(port: int) -> socket.socket:
    sock = socket.socket()
    _set_options(sock)
    sock.connect(("127.0.0.1", port))
    return sock


def _set_options(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    buffers = TcpSettings().buffer_bytes
    if buffers is not None:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, buffers)


if __name__ == "__main__":
    sys.exit(main())
