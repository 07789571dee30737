"""KV accounting under random use, against the contents that its copies and page lists lead to."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdual.kv.keys import KeyChain, root_key
from jaxdual.kv.manager import Admission, KVManager
from jaxdual.kv.slots import IntegrityError
from tests.kv.memory import Memory

PAGE = 2
ROOT = root_key(b"model", b"layout")
OPERATIONS = ("admit", "admit", "compute", "compute", "compute", "publish", "release", "swap", "flush", "reserve")


class Job:
    """A sequence, and how far it is."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.keys = KeyChain(ROOT, PAGE)
        self.state = "waiting"
        self.computed = 0


class World:
    """A manager, a few sequences with common prefixes, and the contents of both tiers."""

    def __init__(self, num_pages: int, host_pages: int, prefix_caching: bool) -> None:
        self.kv = KVManager(num_pages, PAGE, host_pages=host_pages, prefix_caching=prefix_caching)
        self.memory = Memory(PAGE)
        self.limit = num_pages * PAGE
        self.sequences: dict[int, Job] = {}
        self.ids = 0
        self.seen = {"refused": 0, "deduplicated": 0, "swap_refused": 0, "swapped_back": 0, "host_prefix": 0}

    def run(self, operations: Sequence[tuple[int, int]]) -> None:
        for kind, detail in operations:
            getattr(self, OPERATIONS[kind % len(OPERATIONS)])(detail)
            self.kv.check_integrity()
        self.flush(0)
        for seq_id in list(self.sequences):
            self.kv.release(seq_id)
            self.kv.check_integrity()
        assert self.kv.num_held == 0
        assert self.kv.num_available == self.kv.num_pages

    def flush(self, _: int) -> None:
        self.memory.execute(self.kv.take_copies())
        assert self.kv.take_copies() == ()
        for seq_id, sequence in self.sequences.items():
            if sequence.state == "running":
                self.memory.check(self.kv.pages_of(seq_id), sequence.tokens, sequence.computed)

    def admit(self, detail: int, reserve: int = 0) -> None:
        seq_id = self._waiting(detail)
        sequence = self.sequences[seq_id]
        length = len(sequence.tokens)
        keys = sequence.keys.upto(sequence.tokens, (length - 1) // PAGE)
        before = self.observe()
        available, host_hits = self.kv.num_available, self.kv.stats.host_hits
        admission = self.kv.admit(seq_id, keys, length, reserve=reserve, use_cache=detail % 7 != 0)
        if admission is None:
            self.seen["refused"] += 1
            assert self.observe() == before
            assert available < self.kv.pages_for(length) + reserve, "there was room"
            return
        assert self.kv.num_available >= reserve
        assert 0 <= admission.cached <= admission.computed < length
        assert admission.cached % PAGE == 0
        if detail % 7 == 0 or not self.kv.prefix_caching:
            assert admission.cached == 0
        if sequence.state == "waiting":
            assert admission.computed == admission.cached
        else:
            self.seen["swapped_back"] += admission.computed > admission.cached
        self.seen["host_prefix"] += self.kv.stats.host_hits > host_hits
        assert len(self.kv.pages_of(seq_id)) == self.kv.pages_for(length)
        assert len(set(self.kv.pages_of(seq_id))) == self.kv.pages_for(length)
        sequence.state, sequence.computed = "running", admission.computed

    def reserve(self, detail: int) -> None:
        self.admit(detail, reserve=detail % 3)

    def compute(self, detail: int) -> None:
        """A chunk, or one token for a sequence that has only its newest token left; the last one gives a new token."""
        seq_id = self._running(detail)
        if seq_id is None:
            return
        sequence = self.sequences[seq_id]
        before, available = self.observe(), self.kv.num_available
        missing = self.kv.pages_for(len(sequence.tokens)) - len(self.kv.pages_of(seq_id))
        if not self.kv.grow(seq_id, len(sequence.tokens)):
            assert missing > available
            assert self.observe() == before
            return
        assert len(self.kv.pages_of(seq_id)) == self.kv.pages_for(len(sequence.tokens))
        self.flush(0)
        end = min(len(sequence.tokens), sequence.computed + 1 + detail % 3)
        for position in range(sequence.computed, end):
            self.memory.write(self.kv.pages_of(seq_id), position, tuple(sequence.tokens[: position + 1]))
        sequence.computed = end
        if end == len(sequence.tokens):
            if len(sequence.tokens) < self.limit:
                sequence.tokens.append(detail % 2)
            else:
                self.release(0, seq_id)

    def publish(self, detail: int) -> None:
        seq_id = self._running(detail)
        if seq_id is None:
            return
        sequence = self.sequences[seq_id]
        pages = list(self.kv.pages_of(seq_id))
        self.kv.publish(seq_id, sequence.keys.upto(sequence.tokens, sequence.computed // PAGE))
        self.seen["deduplicated"] += pages != self.kv.pages_of(seq_id)

    def release(self, detail: int, seq_id: int | None = None) -> None:
        if seq_id is None:
            if not self.sequences:
                return
            seq_id = list(self.sequences)[detail % len(self.sequences)]
        self.kv.release(seq_id)
        del self.sequences[seq_id]

    def swap(self, detail: int) -> None:
        seq_id = self._running(detail)
        if seq_id is None:
            return
        sequence = self.sequences[seq_id]
        held, pages = self.kv.num_held, list(self.kv.pages_of(seq_id))
        if self.kv.swap_out(seq_id, sequence.computed):
            sequence.state = "swapped"
        else:
            self.seen["swap_refused"] += 1
            assert self.kv.pages_of(seq_id) == pages
        assert self.kv.num_held == held

    def observe(self) -> tuple[object, ...]:
        """All that a caller can see, and what the next eviction would take."""
        kv = self.kv
        pages = {i: list(kv.pages_of(i)) for i, s in self.sequences.items() if s.state == "running"}
        order = [(node.key, node.page, node.host_slot, node.locks) for node in kv._tree._device_lru.values()]
        host = list(kv._tree._host_lru)
        copies, stats = list(kv._copies), copy.copy(kv.stats)
        return kv.num_available, kv.num_cached, kv.num_held, pages, order, host, copies, stats

    def _running(self, detail: int) -> int | None:
        ids = [i for i, sequence in self.sequences.items() if sequence.state == "running"]
        return ids[detail % len(ids)] if ids else None

    def _waiting(self, detail: int) -> int:
        ids = [i for i, sequence in self.sequences.items() if sequence.state != "running"]
        if ids and (detail % 2 or len(self.sequences) > 5):
            return ids[detail % len(ids)]
        # Few different tokens, so that prefixes are common.
        length = 1 + detail % min(8, self.limit)
        tokens = [(detail >> (4 + position // 3)) & 1 for position in range(length)]
        self.ids += 1
        self.sequences[self.ids] = Job(tokens)
        return self.ids


operations = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 1023)), min_size=40, max_size=100)


@pytest.mark.parametrize(("host_pages", "prefix_caching"), [(0, True), (1, True), (3, True), (6, True), (2, False)])
@settings(max_examples=40, derandomize=True, deadline=None)
@given(num_pages=st.integers(1, 7), operations=operations)
def test_pages_hold_what_the_accounting_says(
    host_pages: int, prefix_caching: bool, num_pages: int, operations: list[tuple[int, int]]
) -> None:
    World(num_pages, host_pages, prefix_caching).run(operations)


def test_long_random_runs_reach_every_way_of_the_accounting() -> None:
    seen: dict[str, int] = {}
    evictions = copied_in = 0
    for seed in range(120):
        draw = random.Random(seed)
        world = World(4 + seed % 4, 1 + seed % 5, prefix_caching=True)
        world.run([(draw.randrange(10), draw.randrange(1024)) for _ in range(150)])
        for name, count in world.seen.items():
            seen[name] = seen.get(name, 0) + count
        evictions += world.kv.stats.evictions
        copied_in += world.kv.stats.copied_in
    assert min(seen.values()) > 20, seen
    assert evictions > 200
    assert copied_in > 200


# Single steps with known results.


def keys_of(tokens: Sequence[int], blocks: int | None = None) -> list[bytes]:
    return KeyChain(ROOT, PAGE).upto(tokens, len(tokens) // PAGE if blocks is None else blocks)


def from_cache(tokens: int) -> Admission:
    return Admission(computed=tokens, cached=tokens)


def cache(kv: KVManager, seq_id: int, tokens: Sequence[int]) -> None:
    """Computes, publishes and releases a sequence of whole blocks."""
    assert kv.admit(seq_id, keys_of(tokens, (len(tokens) - 1) // PAGE), len(tokens)) is not None
    kv.publish(seq_id, keys_of(tokens))
    kv.release(seq_id)


def cached(kv: KVManager, tokens: Sequence[int]) -> int:
    """Cached tokens that a longer sequence would find; leaves the order as it is."""
    probe = copy.deepcopy(kv)
    admission = probe.admit(10**6, keys_of(tokens), len(tokens) + 1)
    return 0 if admission is None else admission.cached


def test_least_recently_used_block_is_evicted_first() -> None:
    kv = KVManager(4, PAGE)
    for seq_id, token in enumerate((1, 2, 3)):
        cache(kv, seq_id, [token] * PAGE)
    assert kv.admit(10, keys_of([1, 1]), 3) is not None  # uses block 1 and the free page
    kv.release(10)
    assert kv.admit(11, [], 2 * PAGE) is not None  # takes the free page and the oldest block's
    assert [cached(kv, [token] * PAGE) for token in (1, 2, 3)] == [2, 0, 2]
    kv.check_integrity()


def test_leaf_is_evicted_before_its_ancestors() -> None:
    kv = KVManager(3, PAGE)
    cache(kv, 0, [1, 2, 3, 4, 5, 6])
    assert kv.admit(1, [], PAGE) is not None
    kv.release(1)
    assert kv.admit(2, keys_of([1, 2, 3, 4]), 5) == from_cache(4)


def test_at_least_the_last_token_is_computed() -> None:
    kv = KVManager(4, PAGE)
    cache(kv, 0, [1, 2, 3, 4])
    admission = kv.admit(1, keys_of([1, 2, 3, 4], 1), 4)
    assert admission == from_cache(2)


def test_equal_blocks_of_two_sequences_end_in_one_page() -> None:
    kv = KVManager(4, PAGE)
    tokens = [1, 2, 3]
    for seq_id in (0, 1):
        kv.admit(seq_id, [], len(tokens))
    first, second = kv.pages_of(0)[0], kv.pages_of(1)[0]
    assert first != second
    kv.publish(0, keys_of(tokens))
    kv.publish(1, keys_of(tokens))
    assert kv.pages_of(1)[0] == first
    assert kv.num_available == 1  # of four pages, the shared one and two of their own are used
    kv.release(0)
    assert kv.num_available == 2
    kv.release(1)
    assert (kv.num_available, kv.num_cached) == (4, 1)


def test_without_prefix_caching_nothing_is_shared() -> None:
    kv = KVManager(4, PAGE, prefix_caching=False)
    cache(kv, 0, [1, 2])
    assert kv.num_cached == 0
    assert kv.admit(1, keys_of([1, 2]), 3) == from_cache(0)


def test_admitting_twice_is_an_integrity_error() -> None:
    kv = KVManager(4, PAGE)
    kv.admit(0, [], 1)
    with pytest.raises(IntegrityError, match="admitted already"):
        kv.admit(0, [], 1)


def test_releasing_an_unknown_sequence_does_nothing() -> None:
    kv = KVManager(2, PAGE)
    kv.release(7)
    kv.check_integrity()
    assert kv.num_available == 2


def test_evicted_block_comes_back_from_the_host() -> None:
    kv = KVManager(2, PAGE, host_pages=2)
    memory = Memory(PAGE)
    tokens = [1, 2, 3]
    kv.admit(0, [], 3)
    for position in range(3):
        memory.write(kv.pages_of(0), position, tuple(tokens[: position + 1]))
    kv.publish(0, keys_of(tokens))
    kv.release(0)
    kv.admit(1, [], 2 * PAGE)
    memory.execute(kv.take_copies())
    for position in range(4):
        memory.write(kv.pages_of(1), position, (9,) * (position + 1))
    kv.release(1)
    assert kv.admit(2, keys_of(tokens), 3) == from_cache(2)
    memory.execute(kv.take_copies())
    memory.check(kv.pages_of(2), tokens, 2)
    assert kv.stats.host_hits == PAGE


def test_integrity_check_finds_a_lost_page_and_a_wrong_lock() -> None:
    kv = KVManager(3, PAGE)
    kv.admit(0, [], 3)
    kv.publish(0, keys_of([1, 2, 3]))
    kv.check_integrity()
    broken = copy.deepcopy(kv)
    broken._held[0].pages.pop()
    with pytest.raises(IntegrityError):
        broken.check_integrity()
    broken = copy.deepcopy(kv)
    next(iter(broken._tree)).locks += 1
    with pytest.raises(IntegrityError):
        broken.check_integrity()
