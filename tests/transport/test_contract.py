"""What every carrier must do, alone and shaped."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import os
import random
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from jaxdual.transport import Completed, Op, PeerLost, Received, Status, TrafficClass
from tests.transport.nodes import KINDS, MIB, RDMA_DEVICES, WHY_NO_RDMA, Node, Process

KV, MODEL = TrafficClass.KV, TrafficClass.MODEL
NodeMaker = Callable[..., Node]


VERBS = pytest.param("verbs", marks=[pytest.mark.rdma, pytest.mark.skipif(not RDMA_DEVICES, reason=WHY_NO_RDMA)])


@pytest.fixture(params=[*KINDS, VERBS])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def node(kind: str, tmp_path: Path) -> Iterator[NodeMaker]:
    made: list[Node] = []

    def make(**options: float) -> Node:
        made.append(Node(kind, tmp_path, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def process(kind: str, tmp_path: Path) -> Iterator[Callable[..., Process]]:
    made: list[Process] = []

    def make(**options: float) -> Process:
        made.append(Process(kind, tmp_path, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        one.close()


def fill(node: Node, seed: int) -> None:
    node.memory[:] = np.random.default_rng(seed).integers(0, 256, node.memory.nbytes, np.uint8)


def large(kind: str) -> int:
    """Bytes that take a while to move; soft-RoCE on an emulated processor moves about 20 MB/s."""
    return 2 * MIB if kind == "verbs" else 16 * MIB


def scattered(rng: random.Random, size: int, nbytes: int) -> list[Op]:
    """Ops of `size` bytes at most, anywhere locally, remotely not upon each other."""
    ops = []
    at = 0
    while at < nbytes - size:
        length = rng.randint(1, size)
        ops.append(Op(rng.randint(0, nbytes - length), at, length))
        at += length + rng.choice((0, 0, rng.randint(1, size)))
    rng.shuffle(ops)
    return ops


def expected(source: np.ndarray, target: np.ndarray, ops: list[Op]) -> np.ndarray:
    result = target.copy()
    for op in ops:
        result[op.remote : op.remote + op.length] = source[op.local : op.local + op.length]
    return result


@pytest.mark.parametrize("size", [1, 100, 5000, 3 * MIB])
def test_writes_put_exactly_these_bytes_there(node: NodeMaker, size: int) -> None:
    a, b = node(), node()
    fill(a, 1)
    fill(b, 2)
    ops = scattered(random.Random(size), size, 4 * MIB if size > 100 else 2000 * size)
    want = expected(a.memory, b.memory, ops)
    ticket = a.connect(b).write(a.region, a.remote(b), ops)
    assert ticket.nbytes == sum(op.length for op in ops)
    assert a.status(ticket) is Status.OK
    np.testing.assert_array_equal(b.memory, want)


@pytest.mark.parametrize("size", [1, 5000, 3 * MIB])
def test_reads_bring_exactly_these_bytes_here(node: NodeMaker, size: int) -> None:
    a, b = node(), node()
    fill(a, 1)
    fill(b, 2)
    ops = [Op(r, lo, n) for lo, r, n in scattered(random.Random(size), size, 4 * MIB if size > 100 else 2000 * size)]
    want = expected(b.memory, a.memory, [Op(op.remote, op.local, op.length) for op in ops])
    before = b.memory.copy()
    assert a.status(a.connect(b).read(a.region, a.remote(b), ops)) is Status.OK
    np.testing.assert_array_equal(a.memory, want)
    np.testing.assert_array_equal(b.memory, before)


def test_immediates_come_in_order_and_after_their_bytes(node: NodeMaker) -> None:
    a, b = node(), node()
    channel = a.connect(b)
    tickets = []
    for number in range(1, 9):
        region = a.memory[number * 400_000 : number * 400_000 + 400_000]
        region[:] = number
        op = Op(number * 400_000, number * 400_000, 400_000)
        tickets.append(channel.write(a.region, a.remote(b), [op], immediate=number))
    seen: list[int] = []

    def check() -> bool:
        for number in b.immediates()[len(seen) :]:
            seen.append(number)
            for earlier in seen:
                assert (b.memory[earlier * 400_000 : (earlier + 1) * 400_000] == earlier).all()
        return len(seen) == 8

    b.wait(check, "immediates")
    assert seen == list(range(1, 9))
    peers = {event.peer for event in b.events if isinstance(event, Received)}
    assert [(peer.address, peer.traffic) for peer in peers] == [(a.address, KV)]
    assert a.status(tickets[-1]) is Status.OK
    done = [event.ticket for event in a.events if isinstance(event, Completed)]
    assert done == tickets


@pytest.mark.parametrize("immediate", [0, 2**32 - 1])
def test_an_immediate_needs_no_bytes(node: NodeMaker, immediate: int) -> None:
    a, b = node(), node()
    ticket = a.connect(b).write(a.region, a.remote(b), [], immediate)
    assert a.status(ticket) is Status.OK
    b.wait(b.immediates, "immediate")
    assert b.immediates() == [immediate]


def test_both_directions_classes_and_channels_at_once(node: NodeMaker) -> None:
    a, b = node(nbytes=8 * MIB), node(nbytes=8 * MIB)
    for one in (a, b):
        one.memory[: 4 * MIB] = np.random.default_rng(5).integers(0, 256, 4 * MIB, np.uint8)
    pairs = [(a, b, KV), (b, a, KV), (a, b, MODEL), (b, a, MODEL)]
    work = [(here, there, here.connect(there, traffic)) for here, there, traffic in pairs]
    tickets = []
    for round_number in range(4):
        for index, (here, there, channel) in enumerate(work):
            at = (round_number * 4 + index) * 256 * 1024
            ops = [Op(at, 4 * MIB + at, 256 * 1024)]
            tickets.append((here, channel.write(here.region, here.remote(there), ops)))
            tickets.append((here, channel.read(here.region, here.remote(there), [Op(at, at, 256 * 1024)])))
    for here, ticket in tickets:
        assert here.status(ticket) is Status.OK
    for index, (here, there, channel) in enumerate(work):
        assert channel.traffic is pairs[index][2]
        assert channel.outstanding_bytes == 0
        for round_number in range(4):
            at = (round_number * 4 + index) * 256 * 1024
            landed = there.memory[4 * MIB + at : 4 * MIB + at + 256 * 1024]
            np.testing.assert_array_equal(landed, here.memory[at : at + 256 * 1024])


def test_who_is_refused_keeps_its_channels_and_gets_no_others(node: NodeMaker) -> None:
    a, b, c = node(), node(), node()
    fill(a, 1)
    fill(b, 2)
    channel = a.connect(b)
    b.wait(b.transport.peers)
    b.transport.refuse(a.address)
    assert a.status(channel.write(a.region, a.remote(b), [Op(0, 0, 100)])) is Status.OK
    want = b.memory.copy()
    for peer in b.transport.peers():
        b.transport.disconnect(peer)
    b.wait(b.lost, "PeerLost")
    with contextlib.suppress(OSError):  # the end may also come just after the beginning
        again = a.connect(b)
        assert a.status(again.write(a.region, a.remote(b), [Op(0, 200, 100)])) is Status.BROKEN
    assert not b.transport.peers()
    np.testing.assert_array_equal(b.memory, want)
    assert c.status(c.connect(b).write(c.region, c.remote(b), [Op(0, 0, 100)])) is Status.OK


@pytest.mark.parametrize("size", [10, 1 * MIB])
def test_bad_remote_ranges_are_refused_and_touch_nothing(node: NodeMaker, size: int) -> None:
    a, b = node(), node()
    fill(a, 1)
    fill(b, 2)
    want = b.memory.copy()
    channel = a.connect(b)
    remote = a.remote(b)
    half = b.transport.register(b.memory[MIB : 2 * MIB])
    no_write = b.transport.register(b.memory[:MIB], remote_write=False)
    no_read = b.transport.register(b.memory[:MIB], remote_read=False)
    stranger = type(remote)(remote.key ^ 1, 0, remote.length)
    good, end = Op(0, 0, size), Op(0, b.region.length - size + 1, size)
    refused = [
        channel.write(a.region, remote, [end], 1),
        channel.write(a.region, remote, [Op(0, 2**62, size)], 2),
        channel.write(a.region, a.transport.remote(half.descriptor), [Op(0, MIB - size + 1, size)], 3),
        channel.write(a.region, a.transport.remote(no_write.descriptor), [good], 4),
        channel.write(a.region, stranger, [good], 5),
        channel.read(a.region, remote, [end]),
        channel.read(a.region, a.transport.remote(no_read.descriptor), [good]),
    ]
    here = a.memory.copy()
    assert [a.status(ticket) for ticket in refused] == [Status.ACCESS] * len(refused)
    np.testing.assert_array_equal(b.memory, want)
    np.testing.assert_array_equal(a.memory, here)
    assert a.status(channel.write(a.region, a.transport.remote(no_read.descriptor), [good], 6)) is Status.OK
    assert a.status(channel.read(a.region, a.transport.remote(no_write.descriptor), [good])) is Status.OK
    b.wait(b.immediates, "immediate")
    assert b.immediates() == [6]


@pytest.mark.parametrize("claimed", [None, 2**40])
def test_a_refused_op_keeps_back_the_immediate_of_a_long_write(node: NodeMaker, claimed: int | None) -> None:
    """Also where the descriptor claims more than the region has."""
    a, b = node(), node()
    channel = a.connect(b)
    remote = a.remote(b) if claimed is None else dataclasses.replace(a.remote(b), length=claimed)
    ops = [Op(0, 0, MIB), Op(0, b.region.length, MIB), Op(0, MIB, MIB)]
    assert a.status(channel.write(a.region, remote, ops, 1)) is Status.ACCESS
    assert a.status(channel.write(a.region, remote, [Op(0, 0, 1)], 2)) is Status.OK
    b.wait(b.immediates, "immediate")
    assert b.immediates() == [2]


def test_wrong_calls_are_refused_here(node: NodeMaker) -> None:
    a, b = node(), node()
    channel = a.connect(b)
    remote = a.remote(b)
    for op in (Op(-1, 0, 2), Op(0, 0, 0), Op(0, 0, -1), Op(a.region.length - 1, 0, 2), Op(0, -1, 1), Op(0, 2**63, 1)):
        with pytest.raises(ValueError, match="Op"):
            channel.write(a.region, remote, [Op(0, 0, 1), op])
        with pytest.raises(ValueError, match="Op"):
            channel.read(a.region, remote, [op])
    for immediate in (-1, 2**32):
        with pytest.raises(ValueError, match="immediate"):
            channel.write(a.region, remote, [], immediate)
    with pytest.raises(ValueError, match="not registered"):
        channel.write(b.region, remote, [Op(0, 0, 1)])
    constant = a.transport.register(b"read-only", remote_write=False, remote_read=False)
    with pytest.raises(ValueError, match="read-only"):
        channel.read(constant, remote, [Op(0, 0, 1)])
    assert a.status(channel.write(constant, remote, [Op(0, 0, 9)])) is Status.OK
    assert b.memory[:9].tobytes() == b"read-only"
    with pytest.raises(ValueError, match="descriptor"):
        a.transport.remote(b"nonsense")
    with pytest.raises(ValueError, match="descriptor of carrier"):
        a.transport.remote(b"other\0\0\0" + b.descriptor[8:])
    with pytest.raises(ValueError, match="not"):
        a.transport.connect("\0nowhere", KV)
    channel.close()
    with pytest.raises(ValueError, match="closed"):
        channel.write(a.region, remote, [Op(0, 0, 1)])


def test_fileno_is_readable_exactly_while_there_is_something(node: NodeMaker) -> None:
    a, b = node(), node()

    def readable(one: Node) -> bool:
        return bool(select.select([one.transport.fileno()], [], [], 0)[0])

    assert not readable(a)
    ticket = a.connect(b).write(a.region, a.remote(b), [Op(0, 0, 100)], 1)
    for one in (a, b):
        assert select.select([one.transport.fileno()], [], [], 10)[0]
        assert readable(one)
        assert len(one.transport.poll()) == 1
        assert not readable(one)
        assert one.transport.poll() == []
    assert ticket.channel.outstanding_bytes == 0


def test_an_event_loop_can_wait_for_it(node: NodeMaker) -> None:
    a, b = node(), node()
    channel = a.connect(b)

    async def transfer() -> list[object]:
        loop = asyncio.get_running_loop()
        done = loop.create_future()
        loop.add_reader(b.transport.fileno(), lambda: done.done() or done.set_result(b.transport.poll()))
        channel.write(a.region, a.remote(b), [Op(0, 0, MIB)], 7)
        events = await asyncio.wait_for(done, 10)
        loop.remove_reader(b.transport.fileno())
        return events

    (event,) = asyncio.run(transfer())
    assert event.immediate == 7


@pytest.mark.parametrize("write", [True, False])
@pytest.mark.parametrize("seed", range(2))
def test_a_killed_target_breaks_each_ticket_once(
    kind: str, node: NodeMaker, process: Callable[..., Process], seed: int, write: bool
) -> None:
    rng = random.Random(seed)
    size = large(kind)
    a, peer = node(nbytes=size), process(nbytes=size)
    channel = a.connect(peer)
    post = channel.write if write else channel.read
    ops = [Op(0, 0, size)]
    tickets = [post(a.region, a.remote(peer), ops) for _ in range(40)]
    finished = rng.randint(0, 6)
    a.wait(lambda: sum(isinstance(event, Completed) for event in a.events) >= finished, "" if not finished else "some")
    end = time.monotonic() + rng.uniform(0, 0.01)
    while time.monotonic() < end:  # somewhere within a transfer
        pass
    peer.send(signal.SIGKILL)
    a.wait(a.lost, "PeerLost")
    assert [event.source for event in a.lost()] == [channel]
    assert isinstance(a.events[-1], PeerLost)
    ends = [a.ended(ticket) for ticket in tickets]
    assert all(len(end) == 1 for end in ends)
    order = [end[0] for end in ends]
    assert order == sorted(order)  # OK, then BROKEN
    assert order[-1] is Status.BROKEN
    assert channel.outstanding_bytes == 0
    assert a.status(post(a.region, a.remote(peer), ops)) is Status.BROKEN
    a.poll()
    assert len(a.lost()) == 1


@pytest.mark.parametrize("write", [True, False])
def test_after_a_writer_was_killed_nothing_lands(
    kind: str, node: NodeMaker, process: Callable[..., Process], write: bool
) -> None:
    b, peer = node(), process()
    peer.flood(b, write=write, fill=1)
    if write:
        b.wait(lambda: b.memory.any())
    peer.send(signal.SIGKILL)
    b.wait(b.lost, "PeerLost")
    b.memory[:] = 0x55
    other = process()
    other.flood(b, write=False)
    channel = b.connect(other)
    for _ in range(20):
        assert b.status(channel.write(b.region, b.remote(other), [Op(0, 0, large(kind) // 16)])) is Status.OK
    assert (b.memory == 0x55).all()
    assert len(b.lost()) == 1


@pytest.mark.parametrize("progress", [0.0, 0.1, 0.6])
def test_after_close_nothing_lands_and_nothing_local_is_used(kind: str, node: NodeMaker, progress: float) -> None:
    size = 2 * large(kind)
    a, b = node(nbytes=size), node(nbytes=size)
    a.memory[:] = 1
    b.memory[:] = 0
    channel = a.connect(b)
    tickets = [channel.write(a.region, a.remote(b), [Op(0, 0, size)]) for _ in range(4)]
    tickets.append(channel.read(a.region, a.remote(b), [Op(0, 0, MIB)]))
    a.wait(lambda: b.memory[int(progress * size)])
    channel.close()
    a.memory[:] = 0xEE
    assert channel.outstanding_bytes == 0
    b.wait(b.lost, "PeerLost")
    assert not (b.memory == 0xEE).any(), "local bytes were sent after close"
    b.memory[:] = 0x55
    assert a.status(tickets[-1]) is Status.CANCELLED
    channel.close()
    again = a.connect(b)
    assert a.status(again.write(a.region, a.remote(b), [Op(0, 0, 1)])) is Status.OK
    assert (b.memory[1:] == 0x55).all(), "bytes landed after PeerLost"
    assert (a.memory == 0xEE).all(), "a read landed after close"
    assert not a.lost()  # it was no loss


def test_a_target_can_end_a_peer_and_gets_its_memory_back(node: NodeMaker, process: Callable[..., Process]) -> None:
    b, peer = node(), process()
    peer.flood(b, fill=1)
    b.wait(lambda: b.memory.any())
    a = node()
    channel = a.connect(b)
    a.status(channel.write(a.region, a.remote(b), [Op(0, 0, 1)], 9))
    b.wait(b.immediates, "immediate")
    (mine,) = [event.peer for event in b.events if isinstance(event, Received)]
    assert mine in b.transport.peers()
    assert len(b.transport.peers()) == 2
    b.transport.disconnect(mine)
    b.wait(b.lost, "PeerLost")
    assert mine not in b.transport.peers()
    assert [event.source for event in b.lost()] == [mine]
    a.wait(a.lost, "PeerLost")
    assert a.status(channel.write(a.region, a.remote(b), [Op(0, 0, 1)])) is Status.BROKEN
    b.transport.disconnect(mine)  # has no effect any more
    again = a.connect(b)
    assert a.status(again.write(a.region, a.remote(b), [Op(0, 0, 1)])) is Status.OK


def test_closing_the_target_breaks_its_peers_channels(node: NodeMaker) -> None:
    a, b = node(nbytes=16 * MIB), node(nbytes=16 * MIB)
    channel = a.connect(b)
    tickets = [channel.write(a.region, a.remote(b), [Op(0, 0, 16 * MIB)]) for _ in range(20)]
    a.wait(lambda: b.memory[0] == a.memory[0])
    b.transport.close()
    b.memory[:] = 0x55
    a.wait(a.lost, "PeerLost")
    assert [a.ended(ticket) for ticket in tickets[-1:]] == [[Status.BROKEN]]
    assert (b.memory == 0x55).all()
    b.transport.close()
    with pytest.raises(ValueError, match="closed"):
        b.transport.fileno()
    with pytest.raises(ConnectionRefusedError):
        a.transport.connect(b.address, KV)


def test_nothing_is_left_after_close(kind: str, tmp_path: Path) -> None:
    def held() -> tuple[int, list[str], list[str]]:
        gc.collect()
        threads = sorted(thread.name for thread in threading.enumerate())
        return len(os.listdir("/proc/self/fd")), threads, sorted(os.listdir("/dev/shm"))

    before = held()
    for _ in range(3):
        a, b = Node(kind, tmp_path), Node(kind, tmp_path)
        channels = [a.connect(b, traffic) for traffic in (KV, MODEL, KV)]
        for channel in channels:
            channel.write(a.region, a.remote(b), [Op(0, 0, MIB)], 1)
            channel.read(a.region, a.remote(b), [Op(0, 0, MIB)])
        a.status(channels[-1].write(a.region, a.remote(b), [Op(0, 0, 1)]))
        channels[0].close()
        b.close()
        a.wait(lambda a=a: len(a.lost()) == 2, "PeerLost")
        a.close()
    assert held() == before
