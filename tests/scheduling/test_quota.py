"""The compute quota: attention work, the fitted cost, and what enters a forward."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdual.scheduling.quota import (
    AttentionCost,
    ChunkRules,
    GroupedAttention,
    PrefillWork,
    ProfileSample,
    SparseLatentAttention,
    pack,
)

SHAPE = GroupedAttention(layers=1, heads=1, head_dim=1)
# 4 * (bsz * cached + bsz^2 / 2) operations of a quarter second each: from nothing, bsz tokens take bsz^2 / 2 seconds.
QUARTER = AttentionCost(SHAPE, base=0.0, per_flop=0.25, per_item=0.0)


def packed(queue: list[PrefillWork], quota: float, cost: AttentionCost = QUARTER, **rules: int) -> list[int]:
    return [bsz for _, bsz in pack(queue, quota, cost, ChunkRules(**rules))]


# Work.


def test_grouped_attention_work_is_that_of_the_formula() -> None:
    shape = GroupedAttention(layers=3, heads=5, head_dim=7)
    assert shape.flops(cached=11, bsz=4) == 3 * 4 * 5 * 7 * (4 * 11 + 4 * 4 / 2)
    assert shape.token_flops(100) == 3 * 4 * 5 * 7 * 100


@given(cached=st.integers(0, 40), bsz=st.integers(1, 40), top_k=st.integers(1, 50))
def test_sparse_attention_work_is_the_sum_over_queries(cached: int, bsz: int, top_k: int) -> None:
    shape = SparseLatentAttention(layers=2, heads=3, indexer_heads=5, indexer_dim=7, top_k=top_k)
    attended = sum(min(top_k, position) for position in range(cached + 1, cached + bsz + 1))
    indexer = 2 * 5 * 7 * (bsz * cached + Fraction(bsz * bsz, 2))
    assert shape.flops(cached, bsz) == 2 * (indexer + 2 * 3 * (576 + 512) * attended)


def test_sparse_attention_looks_at_top_k_tokens_and_indexes_all() -> None:
    shape = SparseLatentAttention(layers=2, heads=3, indexer_heads=5, indexer_dim=7, top_k=10)
    assert shape.token_flops(10) == 2 * (2 * 5 * 7 * 10 + 2 * 3 * 1088 * 10)
    assert shape.token_flops(25) == 2 * (2 * 5 * 7 * 25 + 2 * 3 * 1088 * 10)


# Cost.


def samples(base: float, per_flop: float, per_item: float) -> list[ProfileSample]:
    return [
        ProfileSample(flops, items, base + per_flop * flops + per_item * items)
        for flops in (10**9, 10**11, 10**12)
        for items in (1, 4, 9)
    ]


def test_fit_finds_the_coefficients_that_made_the_samples() -> None:
    cost = AttentionCost.fit(SHAPE, samples(2e-3, 3e-13, 4e-5))
    assert (cost.base, cost.per_flop, cost.per_item) == pytest.approx((2e-3, 3e-13, 4e-5))
    assert cost.seconds(10**12, 10) == pytest.approx(2e-3 + 0.3 + 4e-4)


@pytest.mark.parametrize("wanted", [(-2e-3, 3e-13, 4e-5), (2e-3, -1e-15, 4e-5), (2e-3, 3e-13, -4e-6)])
def test_fit_has_no_negative_coefficient_and_no_better_neighbour(wanted: tuple[float, float, float]) -> None:
    measured = samples(*wanted)
    cost = AttentionCost.fit(SHAPE, measured)
    found = (cost.base, cost.per_flop, cost.per_item)
    assert min(found) == 0.0

    def error(base: float, per_flop: float, per_item: float) -> float:
        return sum((base + per_flop * s.flops + per_item * s.items - s.seconds) ** 2 for s in measured)

    for place, step in enumerate((1e-6, 1e-17, 1e-7)):
        for sign in (1, -1):
            other = [value + sign * step * (i == place) for i, value in enumerate(found)]
            if min(other) >= 0:
                assert error(*other) >= error(*found)


@pytest.mark.parametrize(
    "few",
    [
        samples(1, 1, 1)[:2],
        [ProfileSample(flops, 3, 1.0) for flops in (1, 2, 3, 4)],  # items don't vary
        [ProfileSample(10 * items, items, 1.0) for items in (1, 2, 3, 4)],  # both go together
        [ProfileSample(0, items, 1.0) for items in (1, 2, 3)],
    ],
)
def test_fit_refuses_samples_that_do_not_determine_it(few: list[ProfileSample]) -> None:
    with pytest.raises(ValueError, match="samples"):
        AttentionCost.fit(SHAPE, few)


def test_negative_coefficients_are_refused() -> None:
    with pytest.raises(ValueError, match="per_item"):
        AttentionCost(SHAPE, 0.0, 1.0, -1.0)


# Packing.


def test_whole_prompts_are_taken_up_to_exactly_the_quota() -> None:
    queue = [PrefillWork(0, 0, 4), PrefillWork(1, 0, 4), PrefillWork(2, 0, 4)]
    assert packed(queue, 16.0) == [4, 4]  # 8 seconds each
    assert packed(queue, 24.0) == [4, 4, 4]


def test_the_first_that_does_not_fit_gives_its_longest_piece_and_ends_the_batch() -> None:
    queue = [PrefillWork(0, 0, 4), PrefillWork(1, 0, 9), PrefillWork(2, 0, 1)]
    # Of 33 seconds 25 are left: 7^2/2 = 24.5 fit, 8^2/2 = 32 don't; a third one of half a second would.
    assert packed(queue, 33.0) == [4, 7]


def test_cached_tokens_make_a_piece_shorter() -> None:
    assert packed([PrefillWork(0, 0, 9)], 12.5) == [5]
    assert packed([PrefillWork(0, 10, 9)], 12.5) == [1]  # 1 * 10 + 1/2 seconds; 2 * 10 + 2 for two


def test_an_empty_batch_gets_a_least_piece_whatever_it_takes() -> None:
    assert packed([PrefillWork(0, 1000, 9)], 1.0) == [1]
    assert packed([PrefillWork(0, 1000, 9)], 1.0, min_chunk=4) == [4]
    assert packed([PrefillWork(0, 1000, 3)], 1.0, min_chunk=4) == [3]
    assert packed([PrefillWork(0, 1000, 9)], 1.0, min_chunk=4, max_tokens=2) == [2]
    assert packed([], 1.0) == []


def test_no_piece_shorter_than_the_least_follows_others() -> None:
    queue = [PrefillWork(0, 0, 4), PrefillWork(1, 0, 9)]
    assert packed(queue, 12.5, min_chunk=3) == [4, 3]
    assert packed(queue, 12.4, min_chunk=3) == [4]


def test_pieces_end_at_block_boundaries_of_the_prompt() -> None:
    assert packed([PrefillWork(0, 0, 30)], 72.0, align=8) == [8]
    assert packed([PrefillWork(0, 0, 30)], 71.0) == [11]
    assert packed([PrefillWork(0, 3, 30)], 27.4, align=8) == [5]  # 5 * 3 + 12.5
    assert packed([PrefillWork(0, 3, 6)], 1000.0, align=8) == [6]  # all of it: no piece
    assert packed([PrefillWork(0, 3, 30)], 1000.0, align=8, max_tokens=4) == [4]


def test_the_token_limit_cuts_and_ends_a_batch() -> None:
    queue = [PrefillWork(0, 0, 4), PrefillWork(1, 0, 4), PrefillWork(2, 0, 4)]
    assert packed(queue, 1e9, max_tokens=10) == [4, 4, 2]
    assert packed(queue, 1e9, max_tokens=8) == [4, 4]


def test_the_paper_s_300_ms_hold_more_short_prompts_than_long_ones() -> None:
    shape = SparseLatentAttention(layers=61, heads=128, indexer_heads=64, indexer_dim=128, top_k=2048)
    cost = AttentionCost(shape, base=0.0, per_flop=1 / 400e12, per_item=0.0)
    counts = [len(pack([PrefillWork(i, cached, 429) for i in range(64)], 0.3, cost)) for cached in (0, 16384, 65536)]
    assert counts[0] > counts[1] > counts[2] >= 1


@pytest.mark.parametrize("bad", [{"min_chunk": 0}, {"align": 0}, {"max_tokens": 0}])
def test_rules_below_one_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        ChunkRules(**bad)


@pytest.mark.parametrize(("cached", "remaining"), [(-1, 1), (0, 0)])
def test_work_out_of_range_is_refused(cached: int, remaining: int) -> None:
    with pytest.raises(ValueError, match="remaining"):
        PrefillWork(0, cached, remaining)


works = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 20)), max_size=5)


@settings(max_examples=400, derandomize=True, deadline=None)
@given(
    queue=works,
    quota=st.integers(0, 400),
    base=st.integers(0, 8),
    per_item=st.integers(0, 8),
    min_chunk=st.integers(1, 6),
    align=st.integers(1, 8),
    max_tokens=st.none() | st.integers(1, 40),
)
def test_batch_is_what_trying_every_length_gives(
    queue: list[tuple[int, int]],
    quota: int,
    base: int,
    per_item: int,
    min_chunk: int,
    align: int,
    max_tokens: int | None,
) -> None:
    cost = AttentionCost(SHAPE, float(base), 0.25, float(per_item))

    def allowed(chosen: list[int]) -> bool:
        work = sum(bsz * cached + bsz * bsz / 2 for (cached, _), bsz in zip(queue, chosen, strict=False))
        tokens_fit = max_tokens is None or sum(chosen) <= max_tokens
        return tokens_fit and base + per_item * len(chosen) + work <= quota

    expected: list[int] = []
    for cached, remaining in queue:
        if allowed([*expected, remaining]):
            expected.append(remaining)
            continue
        cuts = [n for n in range(1, remaining) if n >= min_chunk and (cached + n) % align == 0]
        fitting = [n for n in cuts if allowed([*expected, n])]
        if fitting:
            expected.append(max(fitting))
        elif not expected:
            in_tokens = [n for n in cuts if max_tokens is None or n <= max_tokens]
            expected.append(min(in_tokens, default=min(remaining, max_tokens or remaining)))
        break
    got = pack(
        [PrefillWork(i, *work) for i, work in enumerate(queue)], quota, cost, ChunkRules(min_chunk, align, max_tokens)
    )
    assert [bsz for _, bsz in got] == expected
    assert [work.request_id for work, _ in got] == list(range(len(got)))


def test_a_prompt_that_is_cut_again_and_again_is_computed_once() -> None:
    works = [PrefillWork(0, 5, 37), PrefillWork(1, 0, 11), PrefillWork(2, 64, 23)]
    done = {work.request_id: 0 for work in works}
    steps = 0
    while works:
        for work, bsz in pack(works, 60.0, QUARTER, ChunkRules(align=4)):
            done[work.request_id] += bsz
            left = (
                PrefillWork(work.request_id, work.cached + bsz, work.remaining - bsz) if bsz < work.remaining else None
            )
            works = ([left] if left else []) + works[1:]
        steps += 1
    assert done == {0: 37, 1: 11, 2: 23}
    assert steps > 3
