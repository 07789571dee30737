"""Rates that processes share, what is counted, and who goes first."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jaxdual.transport import (
    Direction,
    Nic,
    Op,
    ShapedTransport,
    Status,
    TokenBucket,
    TrafficClass,
    shaped,
)
from tests.transport.nodes import MIB, ROOT, Node

KV, MODEL = TrafficClass.KV, TrafficClass.MODEL
# Takes chunks until the time is over; says how many bytes, and when it began and had the last of them.
SPEND = """
import sys, time
from jaxdual.transport import TokenBucket, TrafficClass
bucket = TokenBucket(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
total, start = 0, time.monotonic()
while time.monotonic() < start + float(sys.argv[2]):
    bucket.acquire(65536, TrafficClass[sys.argv[3]])
    total += 65536
print(total, start, time.monotonic(), flush=True)
"""
HOLD = """
import fcntl, os, sys, time
fd = os.open(sys.argv[1], os.O_RDWR)
fcntl.flock(fd, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "bucket"


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() in ("ready", "held")
    return process


def spend(path: Path, seconds: float, classes: list[TrafficClass]) -> tuple[list[int], float]:
    """Bytes that processes took at once, and the seconds from the first to the last."""
    processes = [start(SPEND, path, seconds, traffic.name) for traffic in classes]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    lines = [process.communicate(timeout=20)[0].split() for process in processes]
    took = max(float(end) for _, _, end in lines) - min(float(begin) for _, begin, _ in lines)
    return [int(total) for total, _, _ in lines], took


def test_two_processes_keep_one_rate_between_them(path: Path) -> None:
    rate = 50e6
    burst = rate / 2  # a busy machine wakes sleepers late; what they miss meanwhile is saved up
    bucket = TokenBucket.create(path, rate, burst)
    totals, took = spend(path, 1.2, [KV, KV])
    assert sum(totals) == pytest.approx(burst + rate * took, rel=0.03)
    assert min(totals) > 0.2 * sum(totals)
    assert bucket.counters() == {MODEL: 0, KV: sum(totals)}
    bucket.close()


def test_counters_are_exact_and_without_a_rate_nothing_waits(path: Path) -> None:
    bucket = TokenBucket.create(path)
    assert bucket.rate is None
    totals, _ = spend(path, 0.2, [KV, MODEL, KV])
    assert bucket.counters() == {KV: totals[0] + totals[2], MODEL: totals[1]}
    assert bucket.try_acquire(10**15, KV)
    bucket.close()


def test_the_model_goes_first(path: Path) -> None:
    bucket = TokenBucket.create(path, 20e6)
    totals, _ = spend(path, 0.8, [KV, MODEL, KV])
    assert totals[1] > 0.85 * sum(totals)
    totals, _ = spend(path, 0.4, [KV])
    assert totals[0] > 0.8 * 20e6 * 0.4  # alone it has all of it
    bucket.close()


def test_a_killed_holder_of_the_lock_wedges_nobody(path: Path) -> None:
    bucket = TokenBucket.create(path, 1e9)
    holder = start(HOLD, path)
    taken = threading.Event()
    thread = threading.Thread(target=lambda: bucket.acquire(1, KV) and taken.set())
    thread.start()
    assert not taken.wait(0.1), "the lock doesn't hold"
    holder.kill()
    holder.communicate()
    assert taken.wait(10)
    thread.join()
    bucket.close()


def test_a_killed_waiter_of_the_models_lets_kv_through_again(path: Path) -> None:
    bucket = TokenBucket.create(path, 1e6, burst=1000)
    process = start(SPEND, path, 60, "MODEL")
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    while not bucket.counters()[MODEL]:
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert bucket.acquire(1, KV)
    bucket.close()


def test_tokens_go_by_the_clock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    bucket = TokenBucket.create(path, 1000, burst=500)
    assert bucket.try_acquire(400, KV)
    assert bucket.try_acquire(200, KV)  # 100 of them are debt
    assert not bucket.try_acquire(1, MODEL)
    now[0] += 0.1
    assert not bucket.try_acquire(1, MODEL)
    now[0] += 0.01
    assert bucket.try_acquire(5000, MODEL)
    now[0] += 4.98
    assert not bucket.try_acquire(1, KV)
    now[0] += 100
    assert bucket.try_acquire(500, KV)  # no more than the burst was saved up
    assert not bucket.try_acquire(1, KV)
    now[0] -= 50  # a clock that was set back gives nothing, and takes nothing
    assert not bucket.try_acquire(1, KV)
    assert bucket.counters() == {KV: 1100, MODEL: 5000}
    bucket.close()


def test_waiting_ends_when_told(path: Path) -> None:
    bucket = TokenBucket.create(path, 1, burst=1)
    assert bucket.acquire(1000, KV)
    stop = threading.Event()
    threading.Timer(0.05, stop.set).start()
    assert not bucket.acquire(5, KV, stop)
    assert bucket.counters()[KV] == 1000
    bucket.close()


def test_wrong_calls(path: Path) -> None:
    for rate, burst in ((0, None), (-1, None), (float("inf"), None), (1, 0), (1, -5)):
        with pytest.raises(ValueError, match="must be above 0"):
            TokenBucket.create(path, rate, burst)
    bucket = TokenBucket.create(path)
    with pytest.raises(ValueError, match="nbytes"):
        bucket.acquire(-1, KV)
    bucket.close()
    bucket.close()
    for data in (b"", b"x" * 64):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="not a token bucket"):
            TokenBucket(path)
    with pytest.raises(ValueError, match="file name"):
        Nic.create(path.parent, "a/b")


def test_a_card_charges_a_store_s_reads_at_its_rate(tmp_path: Path) -> None:
    nic = Nic.create(tmp_path, "snic", write_rate=20e6)
    started = time.monotonic()
    assert nic.charge(Direction.WRITE, 6_000_000, KV)
    assert 0.2 < time.monotonic() - started < 1
    started = time.monotonic()
    assert nic.charge(Direction.READ, 10**12, MODEL)
    assert time.monotonic() - started < 0.2
    again = Nic(tmp_path, "snic")
    assert again.counters() == {
        Direction.READ: {MODEL: 10**12, KV: 0},
        Direction.WRITE: {MODEL: 0, KV: 6_000_000},
    }
    again.close()
    nic.close()


class Cards:
    """Two shaped nodes over shared memory, with given rates."""

    def __init__(self, directory: Path, local: dict[str, float], remote: dict[str, float]) -> None:
        self.nics = [Nic.create(directory, "a", **local), Nic.create(directory, "b", **remote)]
        self.nodes = [Node("shm", directory, 8 * MIB) for _ in self.nics]
        for node, nic in zip(self.nodes, self.nics, strict=True):
            by_address = {other.address: card for other, card in zip(self.nodes, self.nics, strict=True)}
            node.transport = ShapedTransport(node.transport, nic, by_address.get)

    def move(self, nbytes: int, *, write: bool, traffic: TrafficClass = KV) -> float:
        """Seconds that a transfer takes."""
        a, b = self.nodes
        channel = a.transport.connect(b.address, traffic)
        started = time.monotonic()
        post = channel.write if write else channel.read
        assert a.status(post(a.region, a.remote(b), [Op(0, 0, nbytes)])) is Status.OK
        took = time.monotonic() - started
        channel.close()
        return took

    def close(self) -> None:
        for node, nic in zip(self.nodes, self.nics, strict=True):
            node.close()
            nic.close()


SLOW = 20e6


@pytest.mark.parametrize("write", [True, False])
@pytest.mark.parametrize("side", ["local", "remote"])
def test_a_transfer_is_charged_at_both_ends(tmp_path: Path, write: bool, side: str) -> None:
    """The slower one decides, whichever it is; the other direction's rate has no part in it."""
    local, remote = ("read_rate", "write_rate") if write else ("write_rate", "read_rate")
    fast = 1e12
    rates = {"local": {local: fast, remote: 1.0}, "remote": {remote: fast, local: 1.0}}
    rates[side][local if side == "local" else remote] = SLOW
    cards = Cards(tmp_path, rates["local"], rates["remote"])
    nbytes = 8 * MIB
    took = cards.move(nbytes, write=write)
    assert 0.8 * nbytes / SLOW < took < 2 * nbytes / SLOW
    read, written = (cards.nics[0], cards.nics[1]) if write else (cards.nics[1], cards.nics[0])
    assert read.counters() == {Direction.READ: {MODEL: 0, KV: nbytes}, Direction.WRITE: {MODEL: 0, KV: 0}}
    assert written.counters() == {Direction.READ: {MODEL: 0, KV: 0}, Direction.WRITE: {MODEL: 0, KV: nbytes}}
    cards.close()


def test_without_rates_transfers_are_counted_and_given_to_the_carrier_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards = Cards(tmp_path, {}, {})
    assert cards.move(8 * MIB, write=True) < 2
    assert cards.move(5, write=False, traffic=MODEL) < 2
    assert cards.nics[0].counters() == {Direction.READ: {MODEL: 0, KV: 8 * MIB}, Direction.WRITE: {MODEL: 5, KV: 0}}
    assert cards.nics[1].counters() == {Direction.READ: {MODEL: 5, KV: 0}, Direction.WRITE: {MODEL: 0, KV: 8 * MIB}}
    assert not any("shaped-move" in thread.name for thread in threading.enumerate())
    cards.close()


def test_the_models_transfers_overtake_kv(tmp_path: Path) -> None:
    cards = Cards(tmp_path, {"read_rate": SLOW}, {})
    a, b = cards.nodes
    slow = a.transport.connect(b.address, KV)
    fast = a.transport.connect(b.address, MODEL)
    big = slow.write(a.region, a.remote(b), [Op(0, 0, 8 * MIB)])
    a.wait(lambda: cards.nics[0].counters()[Direction.READ][KV] > 0)
    small = [fast.write(a.region, a.remote(b), [Op(0, 0, MIB)]) for _ in range(2)]
    assert a.status(small[-1]) is Status.OK
    assert not a.ended(big)
    counted = cards.nics[0].counters()[Direction.READ]
    assert counted[MODEL] == 2 * MIB
    assert counted[KV] < 3 * MIB
    assert a.status(big) is Status.OK
    cards.close()


@pytest.mark.parametrize("chunk", [1, 3, 10, 100])
def test_cutting_keeps_all_bytes_and_the_limit(chunk: int) -> None:
    ops = [Op(0, 50, 7), Op(20, 10, 1), Op(30, 80, 12)]
    chunks = shaped._cut(ops, chunk)
    assert all(sum(op.length for op in part) == chunk for part in chunks[:-1])
    moved = [(op.local + i, op.remote + i) for part in chunks for op in part for i in range(op.length)]
    assert moved == [(op.local + i, op.remote + i) for op in ops for i in range(op.length)]
    assert shaped._cut([], chunk) == [[]]


def test_what_a_channel_had_when_it_broke_before_it_was_known_is_reported(tmp_path: Path) -> None:
    """The carrier may report the loss before `connect` has returned to the shaping."""
    cards = Cards(tmp_path, {}, {})
    a, b = cards.nodes
    inner = a.transport._inner
    connect = inner.connect

    def connect_and_lose(address: str, traffic: TrafficClass) -> object:
        channel = connect(address, traffic)
        for serving in list(b.transport._inner._servings):
            b.transport.disconnect(serving.peer)
        deadline = time.monotonic() + 10
        while not a.transport._lost_early:
            assert time.monotonic() < deadline
        return channel

    inner.connect = connect_and_lose
    channel = a.transport.connect(b.address, KV)
    a.wait(a.lost, "PeerLost")
    assert [event.source for event in a.lost()] == [channel]
    assert a.status(channel.write(a.region, a.remote(b), [Op(0, 0, 1)])) is Status.BROKEN
    cards.close()
