"""Layout sizes, block keys, free lists, prefix tree: exact small cases."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdual.kv.keys import KeyChain, child_key, root_key
from jaxdual.kv.layout import KVLayout, first_block, most_blocks
from jaxdual.kv.prefix_tree import PrefixTree
from jaxdual.kv.slots import IntegrityError, SlotPool

SIZES = {"kv_heads": 2, "head_dim": 5, "page_size": 4, "dtype": "bfloat16", "itemsize": 2}
LAYOUT = KVLayout.of_layers((None,) * 3, **SIZES)  # type: ignore[arg-type]


def test_layout_sizes_agree_with_an_array_of_that_shape() -> None:
    arena = np.zeros(LAYOUT.arena_shape(7), np.float16)
    assert arena.nbytes == 7 * LAYOUT.full_block_bytes()
    assert np.zeros(LAYOUT.block_shape(), np.float16).nbytes == LAYOUT.full_block_bytes()
    assert LAYOUT.full_block_bytes() == 4 * 3 * 2 * 2 * 5 * 2  # tokens, layers, K and V, heads, head_dim, bytes


def test_layers_of_one_window_share_a_group() -> None:
    layout = KVLayout.of_layers((8, None, 8, 4, None, 8), **SIZES)  # type: ignore[arg-type]
    assert [(group.layers, group.window) for group in layout.groups] == [((1, 4), None), ((3,), 4), ((0, 2, 5), 8)]
    assert [layout.place_of(layer) for layer in range(6)] == [(2, 0), (0, 0), (2, 1), (1, 0), (0, 1), (2, 2)]
    assert [layout.full_block_bytes(group) for group in range(3)] == [320, 160, 480]
    assert layout.arena_shape(5, 2) == (5 * 6, 4, 2, 5)
    with pytest.raises(ValueError, match="layer=6"):
        layout.place_of(6)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.integers(0, 100))
def test_most_blocks_is_the_greatest_number_that_queries_see(
    window: int, queries: int, page_size: int, start: int
) -> None:
    def seen(start: int) -> int:
        return (start + queries - 1) // page_size - first_block(window, start, page_size) + 1

    most = most_blocks(window, queries, page_size, 10**6)
    assert seen(start) <= most
    assert most == max(seen(window + offset) for offset in range(page_size))
    assert most_blocks(window, queries, page_size, 2) == min(most, 2)
    assert most_blocks(None, queries, page_size, 7) == 7


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_pages_for_rounds_up(tokens: int, pages: int) -> None:
    assert LAYOUT.pages_for(tokens) == pages


@pytest.mark.parametrize("field", ["windows", "kv_heads", "head_dim", "page_size", "dtype"])
@pytest.mark.parametrize("windows", [(None, None), (None, None, 8), (None, None, None, None)])
def test_layout_fingerprint_depends_on_every_part(field: str, windows: tuple[int | None, ...]) -> None:
    values = SIZES | {"windows": (None,) * 3, field: {"windows": windows, "dtype": "float16"}.get(field, 9)}
    assert KVLayout.of_layers(**values).fingerprint() != LAYOUT.fingerprint()  # type: ignore[arg-type]


def test_root_key_keeps_its_parts_apart() -> None:
    parts = [(b"ab", b"c", b""), (b"a", b"bc", b""), (b"a", b"b", b"c"), (b"ab", b"", b"c"), (b"ab", b"c", b"s")]
    assert len({root_key(*part) for part in parts}) == len(parts)


def test_child_key_depends_on_parent_order_and_every_token() -> None:
    root, other = root_key(b"m", b"l"), root_key(b"m", b"l", b"salt")
    keys = {child_key(root, [1, 2]), child_key(root, [2, 1]), child_key(root, [1, 3]), child_key(other, [1, 2])}
    assert len(keys) == 4
    assert child_key(root, [1, 2]) == child_key(root, (1, 2))


@settings(max_examples=50, derandomize=True, deadline=None)
@given(st.lists(st.integers(0, 2**31 - 1), max_size=20), st.integers(1, 5), st.lists(st.integers(0, 20), max_size=5))
def test_key_chain_of_a_growing_sequence_equals_that_of_the_whole(
    tokens: list[int], page_size: int, cuts: list[int]
) -> None:
    root = root_key(b"m", b"l")
    want, parent = [], root
    for start in range(0, len(tokens) - page_size + 1, page_size):
        parent = child_key(parent, tokens[start : start + page_size])
        want.append(parent)
    chain = KeyChain(root, page_size)
    for cut in sorted(cuts):
        blocks = min(cut, len(tokens)) // page_size
        assert chain.upto(tokens[:cut], blocks) == want[:blocks]
    assert chain.upto(tokens, len(want)) == want
    assert chain.upto(tokens, 0) == []


def test_copies_of_a_key_chain_go_on_by_themselves() -> None:
    root, tokens = root_key(b"m", b"l"), list(range(8))
    chain = KeyChain(root, 2)
    chain.upto(tokens, 2)
    copy = chain.copy()
    assert copy.known == chain.known == KeyChain(root, 2).upto(tokens, 2)
    assert copy.upto([0, 1, 2, 3, 9, 9], 3) == KeyChain(root, 2).upto([0, 1, 2, 3, 9, 9], 3)
    assert chain.upto(tokens, 4) == KeyChain(root, 2).upto(tokens, 4)


def test_key_chain_refuses_blocks_that_are_not_full() -> None:
    with pytest.raises(ValueError, match="blocks=2 of 4 tokens need more than 7 tokens"):
        KeyChain(root_key(b"m", b"l"), 4).upto([1] * 7, 2)


def test_slots_are_handed_out_once_and_most_recently_freed_first() -> None:
    pool = SlotPool(3)
    taken = [pool.take() for _ in range(3)]
    assert sorted(taken) == [0, 1, 2]  # type: ignore[type-var]
    assert pool.take() is None
    pool.free([taken[1]])  # type: ignore[list-item]
    pool.check([taken[0], taken[2]])  # type: ignore[list-item]
    assert pool.num_free == 1
    assert pool.take() == taken[1]


def test_slot_pool_refuses_double_frees_and_sees_wrong_owners() -> None:
    with pytest.raises(ValueError, match="capacity=-1"):
        SlotPool(-1)
    pool = SlotPool(2)
    slot = pool.take()
    assert slot is not None
    with pytest.raises(IntegrityError, match="two owners"):
        pool.check([slot, slot])
    with pytest.raises(IntegrityError, match="owned by nobody"):
        pool.check([])
    with pytest.raises(IntegrityError, match="owned by nobody"):
        pool.check([slot, 1 - slot])
    pool.free([slot])
    with pytest.raises(IntegrityError, match="freed twice"):
        pool.free([slot])


def chain_of(tree: PrefixTree, *keys: bytes) -> list:  # type: ignore[type-arg]
    path = []  # type: ignore[var-annotated]
    for page, key in enumerate(keys):
        node = tree.get(key)
        if node is None:
            node = tree.insert(path[-1] if path else None, key)
            node.page = page
        tree.lock([node])
        path.append(node)
    return path


def test_tree_matches_the_longest_cached_prefix_and_changes_nothing() -> None:
    tree = PrefixTree()
    path = chain_of(tree, b"a", b"b")
    assert tree.match([b"a", b"b", b"c"]) == path
    assert tree.match([b"c", b"a"]) == []
    assert [node.locks for node in path] == [1, 1]
    tree.check()


def test_tree_evicts_unlocked_leaves_first_and_nothing_locked() -> None:
    tree = PrefixTree()
    path = chain_of(tree, b"a", b"b")
    assert tree.pop_device_victim() is None
    tree.unlock(path)
    assert tree.num_evictable == 2
    assert tree.pop_device_victim() is path[1]


def test_tree_refuses_double_insert_extra_unlock_and_removal_of_a_locked_block() -> None:
    tree = PrefixTree()
    path = chain_of(tree, b"a")
    with pytest.raises(IntegrityError, match="already"):
        tree.insert(None, b"a")
    with pytest.raises(IntegrityError, match="in use"):
        tree.remove(path[0])
    tree.unlock(path)
    with pytest.raises(IntegrityError, match="more often"):
        tree.unlock(path)


def test_removing_a_block_removes_all_below_it() -> None:
    tree = PrefixTree()
    path = chain_of(tree, b"a", b"b", b"c")
    tree.unlock(path)
    removed = tree.remove(path[1])
    assert {node.key for node in removed} == {b"b", b"c"}
    assert [node.key for node in tree] == [b"a"]
    assert path[0].children == {}
    tree.check()
