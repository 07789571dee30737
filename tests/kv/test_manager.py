"""KV accounting under random use, against the contents that its copies and page lists lead to."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdual.kv.keys import KeyChain, root_key
from jaxdual.kv.layout import most_blocks
from jaxdual.kv.manager import Admission, GroupPages, KVManager
from jaxdual.kv.slots import IntegrityError
from tests.kv.memory import Memory

PAGE = 2
CHUNK = 3
LONGEST = 10  # blocks, where full attention does not set a limit
ROOT = root_key(b"model", b"layout")
OPERATIONS = ("admit", "admit", "compute", "compute", "compute", "publish", "release", "swap", "flush", "reserve")


def pages_for(num_tokens: int) -> int:
    return -(-num_tokens // PAGE)


class Job:
    """A sequence, and how far it is."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.keys = KeyChain(ROOT, PAGE)
        self.state = "waiting"
        self.computed = 0


class World:
    """A manager, a few sequences with common prefixes, and the contents of both tiers."""

    def __init__(
        self, num_pages: int, host_pages: int, prefix_caching: bool, windows: tuple[int | None, ...] = (None,)
    ) -> None:
        self.kv = KVManager(
            [GroupPages(num_pages, host_pages, window) for window in windows],
            PAGE,
            prefix_caching=prefix_caching,
            max_chunk=CHUNK,
        )
        self.windows = windows
        self.memory = Memory(PAGE, windows)
        self.limit = (num_pages if None in windows else LONGEST) * PAGE
        self.sequences: dict[int, Job] = {}
        self.ids = 0
        self.seen = {
            "refused": 0,
            "deduplicated": 0,
            "swap_refused": 0,
            "swapped_back": 0,
            "host_prefix": 0,
            "windowed_hit": 0,
        }

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
                self.check(seq_id, sequence.computed)

    def check(self, seq_id: int, position: int) -> None:
        """All that the query at `position` sees is there, and in each group no more pages are held than ever needed."""
        for group, window in enumerate(self.windows):
            pages, first = self.kv.pages_of(seq_id, group), self.kv.first_of(seq_id, group)
            assert len(set(pages)) == len(pages) <= most_blocks(window, CHUNK, PAGE, self.limit // PAGE)
            self.memory.check(pages, self.sequences[seq_id].tokens, position, group=group, first=first)

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
            if self.windows == (None,):
                assert available < pages_for(length) + reserve, "there was room"
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
        if self.windows[0] is None:
            assert len(self.kv.pages_of(seq_id)) == pages_for(length)
        self.seen["windowed_hit"] += admission.cached > 0 and self.kv.first_of(seq_id, len(self.windows) - 1) > 0
        sequence.state, sequence.computed = "running", admission.computed

    def reserve(self, detail: int) -> None:
        self.admit(detail, reserve=detail % 3)

    def compute(self, detail: int) -> None:
        """A chunk, or one token for a sequence that has only its newest token left; the last one gives a new token."""
        seq_id = self._running(detail)
        if seq_id is None:
            return
        sequence = self.sequences[seq_id]
        before = self.observe()
        end = min(len(sequence.tokens), sequence.computed + 1 + detail % CHUNK)
        if not self.kv.grow(seq_id, sequence.computed, end):
            assert any(
                self.kv.first_of(seq_id, group) + len(self.kv.pages_of(seq_id, group)) + account.num_available
                < pages_for(end)
                for group, account in enumerate(self.kv.groups)
            )
            if self.windows != (None,):
                before = self.observe()  # blocks out of sight were given back
                assert not self.kv.grow(seq_id, sequence.computed, end)
            assert self.observe() == before
            return
        self.flush(0)
        for position in range(sequence.computed, end):
            self.check(seq_id, position)
            for group in range(len(self.windows)):
                pages, first = self.kv.pages_of(seq_id, group), self.kv.first_of(seq_id, group)
                self.memory.write(pages, position, tuple(sequence.tokens[: position + 1]), group=group, first=first)
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
        pages = self.pages(seq_id)
        self.kv.publish(seq_id, sequence.keys.upto(sequence.tokens, sequence.computed // PAGE))
        self.seen["deduplicated"] += pages != self.pages(seq_id)

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
        held = self.kv.num_held
        for group in self.kv.groups:
            group.leave(seq_id, sequence.computed)
        pages = self.pages(seq_id)
        if self.kv.swap_out(seq_id, sequence.computed):
            sequence.state = "swapped"
        else:
            self.seen["swap_refused"] += 1
            assert self.pages(seq_id) == pages
        assert self.kv.num_held == held

    def observe(self) -> tuple[object, ...]:
        """All that a caller can see, and what the next eviction would take."""
        kv = self.kv
        pages = {i: self.pages(i) for i, s in self.sequences.items() if s.state == "running"}
        order = [
            (node.key, node.page, node.host_slot, node.locks)
            for group in kv.groups
            for node in group.tree._device_lru.values()
        ]
        host = [list(group.tree._host_lru) for group in kv.groups]
        copies, stats = list(kv._journal.copies), copy.copy(kv.stats)
        return kv.num_available, kv.num_cached, kv.num_held, pages, order, host, copies, stats

    def pages(self, seq_id: int) -> list[tuple[int, list[int]]]:
        """First block and pages of a running sequence in each group."""
        groups = range(len(self.windows))
        return [(self.kv.first_of(seq_id, group), list(self.kv.pages_of(seq_id, group))) for group in groups]

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
@pytest.mark.parametrize("windows", [(None,), (5,), (None, 3), (None, 1, 6)])
@settings(max_examples=40, derandomize=True, deadline=None)
@given(num_pages=st.integers(1, 7), operations=operations)
def test_pages_hold_what_the_accounting_says(
    host_pages: int,
    prefix_caching: bool,
    windows: tuple[int | None, ...],
    num_pages: int,
    operations: list[tuple[int, int]],
) -> None:
    World(num_pages, host_pages, prefix_caching, windows).run(operations)


@pytest.mark.parametrize("windows", [(None,), (5,), (None, 3)])
def test_long_random_runs_reach_every_way_of_the_accounting(windows: tuple[int | None, ...]) -> None:
    seen: dict[str, int] = {}
    evictions = copied_in = 0
    for seed in range(120):
        draw = random.Random(seed)
        world = World(4 + seed % 4, 1 + seed % 5, True, windows)
        world.run([(draw.randrange(10), draw.randrange(1024)) for _ in range(150)])
        for name, count in world.seen.items():
            seen[name] = seen.get(name, 0) + count
        evictions += world.kv.stats.evictions
        copied_in += world.kv.stats.copied_in
    if windows == (None,):
        assert seen.pop("windowed_hit") == 0
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
    kv = KVManager([GroupPages(4)], PAGE)
    for seq_id, token in enumerate((1, 2, 3)):
        cache(kv, seq_id, [token] * PAGE)
    assert kv.admit(10, keys_of([1, 1]), 3) is not None  # uses block 1 and the free page
    kv.release(10)
    assert kv.admit(11, [], 2 * PAGE) is not None  # takes the free page and the oldest block's
    assert [cached(kv, [token] * PAGE) for token in (1, 2, 3)] == [2, 0, 2]
    kv.check_integrity()


def test_leaf_is_evicted_before_its_ancestors() -> None:
    kv = KVManager([GroupPages(3)], PAGE)
    cache(kv, 0, [1, 2, 3, 4, 5, 6])
    assert kv.admit(1, [], PAGE) is not None
    kv.release(1)
    assert kv.admit(2, keys_of([1, 2, 3, 4]), 5) == from_cache(4)


def test_at_least_the_last_token_is_computed() -> None:
    kv = KVManager([GroupPages(4)], PAGE)
    cache(kv, 0, [1, 2, 3, 4])
    admission = kv.admit(1, keys_of([1, 2, 3, 4], 1), 4)
    assert admission == from_cache(2)


def test_equal_blocks_of_two_sequences_end_in_one_page() -> None:
    kv = KVManager([GroupPages(4)], PAGE)
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
    kv = KVManager([GroupPages(4)], PAGE, prefix_caching=False)
    cache(kv, 0, [1, 2])
    assert kv.num_cached == 0
    assert kv.admit(1, keys_of([1, 2]), 3) == from_cache(0)


def test_admitting_twice_is_an_integrity_error() -> None:
    kv = KVManager([GroupPages(4)], PAGE)
    kv.admit(0, [], 1)
    with pytest.raises(IntegrityError, match="admitted already"):
        kv.admit(0, [], 1)


def test_releasing_an_unknown_sequence_does_nothing() -> None:
    kv = KVManager([GroupPages(2)], PAGE)
    kv.release(7)
    kv.check_integrity()
    assert kv.num_available == 2


def test_evicted_block_comes_back_from_the_host() -> None:
    kv = KVManager([GroupPages(2, host_pages=2)], PAGE)
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
    kv = KVManager([GroupPages(3)], PAGE)
    kv.admit(0, [], 3)
    kv.publish(0, keys_of([1, 2, 3]))
    kv.check_integrity()
    broken = copy.deepcopy(kv)
    broken.groups[0].held[0].pages.pop()
    with pytest.raises(IntegrityError):
        broken.check_integrity()
    broken = copy.deepcopy(kv)
    next(iter(broken.groups[0].tree)).locks += 1
    with pytest.raises(IntegrityError):
        broken.check_integrity()


# Behind a window.


def windowed(num_pages: int, window: int, **more: bool) -> KVManager:
    return KVManager([GroupPages(num_pages, window=window)], PAGE, max_chunk=2, **more)


def run_through(kv: KVManager, seq_id: int, tokens: Sequence[int], start: int = 0) -> list[int]:
    """Computes a sequence in chunks of two, publishing after each; how many pages were held in each step."""
    held = []
    for position in range(start, len(tokens), 2):
        end = min(position + 2, len(tokens))
        assert kv.grow(seq_id, position, end)
        held.append(len(kv.pages_of(seq_id)))
        kv.publish(seq_id, keys_of(tokens, end // PAGE))
    return held


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_a_window_holds_a_bounded_number_of_pages(prefix_caching: bool) -> None:
    kv = windowed(4, 4, prefix_caching=prefix_caching)
    tokens = list(range(100))
    assert kv.admit(0, keys_of(tokens, 49), 100) == from_cache(0)
    held = run_through(kv, 0, tokens)
    assert held[:3] == [1, 2, 3]
    assert set(held[3:]) == {3}  # two tokens of the chunk and the three before it
    assert kv.first_of(0) == 47
    kv.release(0)
    assert (kv.num_available, kv.num_cached) == (4, 4 if prefix_caching else 0)


@pytest.mark.parametrize(("window", "depth"), [(1, 12), (2, 12), (3, 12), (4, 12), (5, 12), (7, 0)])
def test_a_hit_needs_only_the_blocks_that_the_next_query_sees(window: int, depth: int) -> None:
    """Three blocks stay cached of six: enough for windows of up to 6 tokens, one of which is the query's own."""
    kv = windowed(6, window)
    tokens = list(range(12))
    kv.admit(0, [], 12)
    run_through(kv, 0, tokens)
    kv.release(0)
    while len(kv.groups[0].tree) > 2 + (window == 5):
        kv.groups[0]._drop(next(iter(kv.groups[0].tree)))
    assert kv.num_cached_blocks(keys_of(tokens)) * PAGE == depth
    admission = kv.admit(1, keys_of(tokens), 13)
    assert admission == from_cache(depth)
    assert kv.first_of(1) == max(0, depth - window + 1) // PAGE
    kv.check_integrity()


def test_the_deepest_valid_hit_is_found_below_a_gap() -> None:
    kv = windowed(8, 3)
    tokens = list(range(16))
    kv.admit(0, [], 16)
    run_through(kv, 0, tokens)
    kv.release(0)
    keys = keys_of(tokens)
    for gone in (7, 6, 4):
        node = kv.groups[0].tree.get(keys[gone])
        assert node is not None
        kv.groups[0]._drop(node)
    assert kv.num_cached_blocks(keys) == 6  # block 5 holds the two tokens before position 12
    assert kv.num_cached_blocks(keys[:5]) == 4


def test_a_hit_is_as_deep_as_every_group_allows() -> None:
    kv = KVManager([GroupPages(8), GroupPages(8, window=3)], PAGE)
    tokens = list(range(8))
    kv.admit(1, keys_of(tokens, 3), 8)
    run_through(kv, 1, tokens)
    kv.release(1)
    keys = keys_of(tokens)
    assert kv.num_cached_blocks(keys) == 4
    node = kv.groups[1].tree.get(keys[3])
    assert node is not None
    kv.groups[1]._drop(node)
    assert kv.num_cached_blocks(keys) == 3
    assert kv.admit(2, keys, 9) == from_cache(6)
    assert [kv.first_of(2, group) for group in (0, 1)] == [0, 2]
    kv.check_integrity()
    kv.release(2)
    for gone in (0, 1, 2):
        kv.groups[1]._drop(kv.groups[1].tree.match(keys[gone:])[0])
    assert kv.num_cached_blocks(keys) == 0  # the group with full attention alone is of no use


def test_admission_behind_a_window_leaves_room_for_what_others_were_promised() -> None:
    kv = windowed(5, 4)
    assert kv.admit(0, [], 40) is not None  # promised three pages, holds none yet
    assert kv.admit(1, [], 40) is None
    assert kv.admit(1, [], 4) is not None  # two pages are enough for four tokens
    assert kv.num_available == 5


def test_table_changes_name_what_is_new_and_nothing_twice() -> None:
    kv = windowed(4, 4)
    kv.admit(0, [], 20)
    seen: list[tuple[int, int, int]] = []
    table: list[int] = []
    for position in range(0, 20, 2):
        assert kv.grow(0, position, position + 2)
        for change in kv.take_changes(0):
            table[change.start :] = change.pages
            seen.append((change.first, change.start, len(change.pages)))
        assert table == kv.pages_of(0)
        assert kv.take_changes(0) == []
    assert seen[:5] == [(0, 0, 1), (0, 1, 1), (0, 2, 1), (1, 0, 3), (2, 0, 3)]
