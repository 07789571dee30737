"""Which blocks a store with a capacity keeps: against a model, and in exact small cases."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdual.kv.slots import IntegrityError
from jaxdual.kv.store import BlockStore, FileStore, MemoryStore, Outcome, memory
from jaxdual.kv.store.format import Trailer
from tests.kv.store.blocks import Clock, aligned, content, get, key, keys, put, result

MINUTE, MICROSECOND = 60 * 10**9, 10**3
CHAINS = [keys(0, 5), [*keys(0, 2), *keys(10, 3)], keys(20, 4)]  # the first two share their first two blocks
PARENTS = {block: parent for chain in CHAINS for parent, block in zip([None, *chain], chain, strict=False)}
LENGTHS = {block: 4096 * (1 + number % 4) - number % 3 for number, block in enumerate(PARENTS)}
BLOCKS = list(PARENTS)


class Model:
    """What a store must hold, and when each block was used, by the rules in words.

    Args:
      in_files: a block takes a padded payload and a page; times are kept in files to a minute, and in memory exactly.
    """

    def __init__(self, capacity: int, clock: Clock, in_files: bool) -> None:
        self.capacity, self.clock, self.in_files = capacity, clock, in_files
        self.held: dict[bytes, int] = {}
        self.used: dict[bytes, int] = {}
        self.recorded: dict[bytes, int] = {}
        self.in_file: dict[bytes, int] = {}
        self.evictions = 0

    def size(self, block: bytes) -> int:
        length = LENGTHS[block]
        return (length + 4095) // 4096 * 4096 + 4096 if self.in_files else length

    def use(self, block: bytes, record: bool = False) -> None:
        time, parent = self.clock.now, PARENTS[block]
        if parent in self.used and time - self.used[parent] < MINUTE:
            time = max(self.used[parent] - MICROSECOND, self.used.get(block, 0))
        self.set(block, time, record)

    def set(self, block: bytes, time: int, record: bool = False) -> None:
        self.used[block] = time
        if block in self.held and (record or time - self.recorded.get(block, 0) >= MINUTE):
            self.recorded[block] = self.in_file[block] = time

    def hit(self, chain: Sequence[bytes]) -> None:
        if not self.in_files:
            chain = [block for block in chain if block in self.held]
        if all(self.clock.now - self.used.get(block, 0) < 10**9 for block in (chain[0], chain[-1])):
            return
        for number, block in enumerate(chain):
            self.set(block, self.clock.now - number * MICROSECOND)

    def write(self, block: bytes) -> Outcome:
        if block in self.held:
            self.use(block)
            return Outcome.OK
        if self.size(block) > self.capacity:
            return Outcome.FULL
        self.make_room(self.size(block))
        self.held[block] = self.size(block)
        self.use(block, record=True)
        return Outcome.OK

    def read(self, block: bytes) -> Outcome:
        if block not in self.held:
            return Outcome.MISS
        self.use(block)
        return Outcome.OK

    def make_room(self, wanted: int) -> None:
        if sum(self.held.values()) + wanted <= self.capacity:
            return
        while self.held and sum(self.held.values()) + wanted > 0.95 * self.capacity:
            self.remove(min(self.held, key=lambda block: max(self.used.get(block, 0), self.in_file.get(block, 0))))
            self.evictions += 1

    def remove(self, block: bytes) -> None:
        for times in (self.held, self.used, self.recorded, self.in_file):
            times.pop(block, None)

    def reopen(self) -> None:
        self.used.clear()
        self.recorded.clear()


def follow(store: BlockStore, model: Model, step: tuple[str, int, int]) -> None:
    """One operation on both, and a comparison."""
    kind, detail, milliseconds = step
    model.clock.pass_seconds(milliseconds / 1000)
    block = BLOCKS[detail % len(BLOCKS)]
    if kind == "write":
        assert put(store, block, LENGTHS[block], PARENTS[block]) is model.write(block)
    elif kind == "read":
        assert get(store, block, LENGTHS[block]) is model.read(block)
    else:
        chain = CHAINS[detail % len(CHAINS)]
        (count,) = store.hits([chain])
        there = [block in model.held for block in chain]
        leading = (*there, False).index(False)
        assert count == 0 or there[count - 1]
        if not any(there[leading:]):
            assert count == leading
        if count:
            model.hit(chain[:count])
    assert dict(zip(BLOCKS, store._present(BLOCKS), strict=True)) == {block: block in model.held for block in BLOCKS}
    stats = store.stats()
    assert (stats.blocks, stats.bytes) == (len(model.held), sum(model.held.values()))
    assert stats.bytes <= model.capacity


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "write", "read", "hits"]),
        st.integers(0, 99),
        st.sampled_from([1, 1, 300, 2_000, 45_000, 70_000]),
    ),
    min_size=20,
    max_size=60,
)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(capacity=st.integers(4096, 80_000), steps=STEPS)
def test_memory_keeps_what_the_model_keeps(capacity: int, steps: list[tuple[str, int, int]]) -> None:
    clock = Clock()
    model = Model(capacity, clock, in_files=False)
    with MemoryStore(capacity, clock=clock) as store:
        for step in steps:
            follow(store, model, step)
            store.check_integrity()
        assert store.stats().evictions == model.evictions


@settings(max_examples=60, derandomize=True, deadline=None)
@given(capacity=st.integers(8192, 120_000), steps=STEPS, reopened=st.sets(st.integers(0, 59), max_size=4))
def test_files_are_those_that_the_model_keeps(
    capacity: int, steps: list[tuple[str, int, int]], reopened: set[int]
) -> None:
    clock = Clock()
    model = Model(capacity, clock, in_files=True)
    with tempfile.TemporaryDirectory() as folder:
        store = FileStore(folder, capacity, clock=clock, threads=1, write_threads=1)
        for number, step in enumerate(steps):
            follow(store, model, step)
            if number in reopened:
                store.close()
                store = FileStore(folder, capacity, clock=clock, threads=1, write_threads=1)
                model.reopen()
        store.check_integrity()
        store.close()


@pytest.fixture(params=["memory", "file"])
def small(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[BlockStore, Clock]:
    """A store with room for twenty blocks of 4096 bytes."""
    clock = Clock()
    if request.param == "memory":
        return MemoryStore(20 * 4096, clock=clock), clock
    return FileStore(tmp_path / "store", 20 * 8192, clock=clock, write_threads=1), clock


def fill(store: BlockStore, clock: Clock, blocks: Sequence[bytes], parents: bool = False) -> None:
    for parent, block in zip([None, *blocks], blocks, strict=False):
        clock.pass_seconds(2)
        assert put(store, block, 4096, parent if parents else None) is Outcome.OK


def test_the_least_recently_used_block_goes_first(small: tuple[BlockStore, Clock]) -> None:
    store, clock = small
    with store:
        fill(store, clock, keys(0, 20))
        clock.pass_seconds(2)
        assert get(store, key(0), 4096) is Outcome.OK
        clock.pass_seconds(2)
        assert store.hits([[key(1)]]) == [1]
        clock.pass_seconds(2)
        assert put(store, key(2), 4096) is Outcome.OK
        fill(store, clock, [key(20)])  # 95 % of twenty blocks are nineteen
        assert [n for n in range(21) if not store._present([key(n)])[0]] == [3, 4]
        assert store.stats().evictions == 2


def test_a_chain_loses_its_last_blocks_first(small: tuple[BlockStore, Clock]) -> None:
    store, clock = small
    with store:
        chain = keys(0, 10)
        fill(store, clock, chain, parents=True)
        assert store.hits([chain]) == [10]
        fill(store, clock, keys(100, 12))
        assert store.hits([chain]) == [8]


def test_a_hit_chain_outlives_newer_blocks(small: tuple[BlockStore, Clock]) -> None:
    store, clock = small
    with store:
        chain = keys(0, 10)
        fill(store, clock, chain)
        fill(store, clock, keys(100, 10))
        clock.pass_seconds(2)
        assert store.hits([chain]) == [10]
        fill(store, clock, keys(200, 9))
        assert store.hits([chain]) == [10]


def test_a_block_larger_than_the_capacity_is_refused_and_evicts_nothing(small: tuple[BlockStore, Clock]) -> None:
    store, clock = small
    with store:
        fill(store, clock, keys(0, 20))
        assert put(store, key(50), 20 * 8192 + 1) is Outcome.FULL
        assert all(store._present(keys(0, 20)))
        assert store.stats().refused == 1
        store.check_integrity()


def test_integrity_errors_are_found(small: tuple[BlockStore, Clock]) -> None:
    store, clock = small
    with store:
        fill(store, clock, keys(0, 3))
        store.check_integrity()
        if isinstance(store, MemoryStore):
            store._held += 1
        else:
            store._reserved += 1  # type: ignore[attr-defined]
        with pytest.raises(IntegrityError):
            store.check_integrity()


def test_memory_that_was_overwritten_is_a_miss_and_removed() -> None:
    with MemoryStore(1 << 20) as store:
        put(store, key(1), 4096)
        put(store, key(2), 4096)
        store._blocks[key(1)].payload[77] ^= 1
        assert get(store, key(1), 4096) is Outcome.CORRUPT
        assert get(store, key(1), 4096) is Outcome.MISS
        assert get(store, key(2), 4096) is Outcome.OK
        store.check_integrity()


def test_a_block_copied_twice_at_once_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(2, timeout=60)

    def meet(*block: Any) -> Trailer:
        together.wait()
        return Trailer.of(*block)

    monkeypatch.setattr(memory, "Trailer", SimpleNamespace(of=meet))
    with MemoryStore(1 << 20) as store:
        payload = aligned(4096, content(key(1), 4096))
        assert {result(write) for write in [store.write(key(1), None, payload) for _ in range(2)]} == {Outcome.OK}
        assert (store.stats().blocks, store.stats().bytes, store.stats().writes) == (1, 4096, 1)
        store.check_integrity()


def test_a_machine_without_memory_refuses_blocks_and_the_store_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: Any) -> Trailer:
        raise MemoryError

    with MemoryStore(1 << 20) as store:
        with monkeypatch.context() as patch:
            patch.setattr(memory, "Trailer", SimpleNamespace(of=none_left))
            assert put(store, key(1), 4096) is Outcome.FULL
        assert put(store, key(1), 4096) is Outcome.OK
        assert store.stats().bytes == 4096
        store.check_integrity()


def test_times_reach_the_files_once_a_minute_and_parents_last(tmp_path: Path) -> None:
    clock = Clock()
    chain = keys(0, 6)
    with FileStore(tmp_path / "store", 1 << 20, clock=clock) as store:
        fill(store, clock, chain, parents=True)
        written = [os.stat(store._folder.block(block)).st_mtime_ns for block in chain]
        for _ in range(9):
            clock.pass_seconds(5)
            assert store.hits([chain]) == [6]
            assert get(store, chain[3], 4096) is Outcome.OK
    assert [os.stat(store._folder.block(block)).st_mtime_ns for block in chain] == written
    with FileStore(tmp_path / "store", 1 << 20, clock=clock) as store:
        clock.pass_seconds(60)
        assert store.hits([chain]) == [6]
    times = [os.stat(store._folder.block(block)).st_mtime_ns for block in chain]
    assert times == [clock.now - number * MICROSECOND for number in range(6)]


def test_a_store_opened_with_a_smaller_capacity_evicts_at_once(tmp_path: Path) -> None:
    clock = Clock()
    with FileStore(tmp_path / "store", 20 * 8192, clock=clock) as store:
        fill(store, clock, keys(0, 20))
    with FileStore(tmp_path / "store", 10 * 8192, clock=clock) as store:
        assert [n for n in range(20) if store._present([key(n)])[0]] == list(range(11, 20))
        assert (store.stats().blocks, store.stats().evictions) == (9, 11)


def test_what_other_processes_wrote_is_seen_after_a_part_of_the_capacity(tmp_path: Path) -> None:
    """Two stores in one folder: none passes the capacity by more than 5 % of it."""
    clock = Clock()
    capacity = 100 * 8192
    with (
        FileStore(tmp_path / "store", capacity, clock=clock, write_threads=1) as one,
        FileStore(tmp_path / "store", capacity, clock=clock, write_threads=1) as two,
    ):
        for number in range(150):
            fill((one, two)[number % 2], clock, [key(number)])
            files = sum(1 for path in (tmp_path / "store").glob("*/*"))
            assert files <= 105
        assert files > 90


# How hits are counted.


class Listed(BlockStore):
    """A store of which only presence matters; counts how often it is asked."""

    def __init__(self, there: set[bytes]) -> None:
        super().__init__(read_threads=1, write_threads=1, capacity_bytes=None)
        self.there = there
        self.asked: list[bytes] = []

    def _present(self, keys: Sequence[bytes]) -> list[bool]:
        self.asked += keys
        return [block in self.there for block in keys]

    def _read(self, key: bytes, into: memoryview) -> Outcome:
        raise NotImplementedError

    def _write(self, key: bytes, parent: bytes | None, payload: memoryview) -> Outcome:
        raise NotImplementedError

    def _check(self) -> None:
        raise NotImplementedError


@settings(max_examples=200, derandomize=True, deadline=None)
@given(lengths=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), max_size=6), shared=st.integers(0, 50))
def test_hits_of_whole_chains_equal_those_counted_one_by_one(lengths: list[tuple[int, int]], shared: int) -> None:
    chains = [[*keys(0, shared), *keys(1000 * (i + 1), length)] for i, (length, _) in enumerate(lengths)]
    depths = [min(depth, len(chain)) for chain, (_, depth) in zip(chains, lengths, strict=True)]
    there = {block for chain, depth in zip(chains, depths, strict=True) for block in chain[:depth]}
    want = [(*(block in there for block in chain), False).index(False) for chain in chains]
    with Listed(there) as store:
        assert store.hits(chains) == want
        assert len(store.asked) == len(set(store.asked))
        assert len(store.asked) <= sum(2 * len(chain).bit_length() for chain in chains)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(there=st.lists(st.booleans(), max_size=40))
def test_the_last_block_counted_is_always_there(there: list[bool]) -> None:
    chain = keys(0, len(there))
    with Listed({block for block, present in zip(chain, there, strict=True) if present}) as store:
        (count,) = store.hits([chain])
    assert count == 0 or there[count - 1]
    assert count >= (1 if there[:1] == [True] else 0)
