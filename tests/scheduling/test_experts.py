"""Placing experts: packing, copies, pools, stable slots, moves, and what a placement is worth."""

from __future__ import annotations

import heapq
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdual.scheduling.expert_figures import (
    cut,
    device_loads,
    imbalance,
    traffic,
    transitions_of,
)
from jaxdual.scheduling.expert_oracle import best_placement
from jaxdual.scheduling.experts import (
    Placement,
    build_pool,
    by_column,
    by_source,
    edr,
    eplb,
    keep_slots,
    linear_placement,
    migration_cost,
    moves,
    pack,
    replicate,
)


def on_devices(placement: Placement, layer: int = 0) -> list[list[int]]:
    return [sorted(part.tolist()) for part in np.split(placement.experts[layer], placement.devices)]


def random_loads(seed: int, layers: int = 3, experts: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).gamma(1.0, 100.0, (layers, experts)).round()


def longest_first(weights: list[float], packs: int) -> list[set[int]]:
    """Packing by a heap, as it is told: heaviest first, into the lightest pack that has room."""
    room, heap = len(weights) // packs, [(0.0, pack) for pack in range(packs)]
    members: list[set[int]] = [set() for _ in range(packs)]
    for item in sorted(range(len(weights)), key=lambda item: (-weights[item], item)):
        weight, lightest = heapq.heappop(heap)
        members[lightest].add(item)
        if len(members[lightest]) < room:
            heapq.heappush(heap, (weight + weights[item], lightest))
    return members


# Packing and copies.


@given(weights=st.lists(st.integers(0, 50), min_size=1, max_size=6), packs=st.integers(1, 4))
def test_packing_is_heaviest_first_into_the_lightest_pack_with_room(weights: list[int], packs: int) -> None:
    items = [float(weight) for weight in weights for _ in range(packs)]
    chosen = pack(np.array(items), packs)
    assert [set(np.flatnonzero(chosen == one).tolist()) for one in range(packs)] == longest_first(items, packs)


def test_packing_goes_on_from_what_packs_hold() -> None:
    chosen = pack(np.array([5.0, 4.0, 3.0]), 2, capacity=3, loads=np.array([10.0, 0.0]), counts=np.array([1, 0]))
    assert chosen.tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="3 items don't fit into 2 packs of 1"):
        pack(np.ones(3), 2)


def test_copies_go_to_whichever_expert_has_most_for_each_of_its_copies() -> None:
    assert replicate(np.array([10.0, 90.0, 40.0]), 6).tolist() == [0, 1, 2, 1, 1, 2]
    with pytest.raises(ValueError, match="2 slots can't hold 3 experts"):
        replicate(np.ones(3), 2)


def test_eplb_gives_the_example_of_its_authors() -> None:
    loads = np.array(
        [
            [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
            [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
        ],
        float,
    )
    placement = eplb(loads, 8, redundant=4, groups=4, nodes=2)
    theirs = [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1], [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]]
    for layer, row in enumerate(theirs):
        node = [sorted(map(sorted, np.split(part, 4))) for part in np.split(np.array(row), 2)]
        ours = [sorted(map(sorted, np.split(part, 4))) for part in np.split(placement.experts[layer], 2)]
        assert sorted(ours) == sorted(node)


@given(seed=st.integers(0, 99), devices=st.sampled_from([1, 2, 4]), redundant=st.sampled_from([0, 4]))
def test_every_device_has_equal_slots_and_every_expert_one(seed: int, devices: int, redundant: int) -> None:
    loads = random_loads(seed)
    placement = eplb(loads, devices, redundant=redundant)
    assert placement.experts.shape == (3, 8 + redundant)
    assert (placement.copies() >= 1).all()
    assert placement.slots_per_device * devices == 8 + redundant


@given(seed=st.integers(0, 99))
def test_no_pool_makes_edr_the_balanced_packing(seed: int) -> None:
    loads = random_loads(seed)
    none = np.zeros((3, 8), bool)
    assert [on_devices(edr(loads, none, 2), layer) for layer in range(3)] == [
        on_devices(eplb(loads, 2), layer) for layer in range(3)
    ]


# Pools.


def test_pool_is_the_pairs_that_many_tokens_take() -> None:
    transitions = np.zeros((2, 4, 4))
    transitions[0, 1, 2], transitions[0, 0, 3], transitions[1, 2, 0] = 50, 42, 43
    pool = build_pool(transitions, 100, 2)
    assert pool.edges == 2
    assert pool.threshold == 0.43
    assert [np.flatnonzero(row).tolist() for row in pool.experts] == [[1], [2], [0]]


def test_pool_is_the_most_frequent_pairs_where_none_is_that_frequent() -> None:
    transitions = np.zeros((1, 4, 4))
    transitions[0, 1, 2], transitions[0, 0, 3], transitions[0, 3, 3] = 9, 8, 7
    assert build_pool(transitions, 100, 4, top_edges=2).edges == 2
    assert build_pool(transitions, 100, 4).edges == 3
    assert build_pool(np.zeros((1, 4, 4)), 0, 4).edges == 0


@given(seed=st.integers(0, 99), capacity=st.integers(1, 4))
def test_pool_is_tightened_until_it_fits_and_no_further(seed: int, capacity: int) -> None:
    transitions = np.random.default_rng(seed).integers(0, 1000, (2, 6, 6)).astype(float)
    pool = build_pool(transitions, 1000, capacity, share=0.3)
    assert pool.experts.sum(axis=1).max() <= capacity
    order = np.argsort(-transitions.ravel(), kind="stable")
    frequent = int((transitions >= 300).sum())
    assert pool.edges <= frequent
    if pool.edges < frequent:  # the next pairs, all that are as frequent as one another, would not fit
        more, flat = pool.experts.copy(), transitions.ravel()
        for edge in order[pool.edges :]:
            if flat[edge] == flat[order[pool.edges]]:
                gap, rest = divmod(int(edge), 36)
                more[gap, rest // 6] = more[gap + 1, rest % 6] = True
        assert more.sum(axis=1).max() > capacity
        assert pool.edges == 0 or flat[order[pool.edges - 1]] > flat[order[pool.edges]]


def test_pooled_experts_lie_on_the_anchor_and_stay_there() -> None:
    pool = np.zeros((3, 8), bool)
    pool[:, [2, 5]] = True
    for seed in range(20):
        placement = edr(random_loads(seed), pool, 2, anchor=1)
        for layer in range(3):
            assert {2, 5} <= set(on_devices(placement, layer)[1])
    with pytest.raises(ValueError, match="don't fit"):
        edr(random_loads(0), np.ones((3, 8), bool), 2)
    with pytest.raises(ValueError, match="anchor=2"):
        edr(random_loads(0), pool, 2, anchor=2)


def test_one_assignment_for_all_layers_is_the_same_in_each() -> None:
    placement = by_column(random_loads(3), np.zeros((3, 8), bool), 2)
    assert (placement.experts == placement.experts[0]).all()


def test_experts_go_where_their_tokens_come_from_unless_that_unbalances() -> None:
    sources = np.zeros((1, 2, 4))
    sources[0, 0] = [100, 0, 90, 0]
    sources[0, 1] = [0, 100, 0, 90]
    assert on_devices(by_source(sources)) == [[0, 2], [1, 3]]
    sources[0, 0], sources[0, 1] = [100, 100, 1, 1], 0
    assert on_devices(by_source(sources, balance=10.0)) == [[0, 2], [1, 3]]


# Slots and moves.


@given(seed=st.integers(0, 99), redundant=st.sampled_from([0, 2, 4]))
def test_experts_that_stay_on_a_device_keep_their_slots(seed: int, redundant: int) -> None:
    old = eplb(random_loads(seed), 2, redundant=redundant)
    raw = eplb(random_loads(seed + 1000), 2, redundant=redundant)
    new = keep_slots(old, raw)
    for layer in range(3):
        assert on_devices(new, layer) == on_devices(raw, layer)
        before, after = np.split(old.experts[layer], 2), np.split(new.experts[layer], 2)
        for was, now in zip(before, after, strict=True):
            shared = sum(min((was == e).sum(), (now == e).sum()) for e in range(8))
            assert (was == now).sum() == shared
    # The moves, made on the old weights all at once, give the new ones.
    weights = old.experts.copy()
    for move in moves(old, new):
        assert old.experts[move.layer, move.source] == move.expert
        weights[move.layer, move.target] = move.expert
    assert (weights == new.experts).all()


def test_moves_cost_what_passes_between_devices() -> None:
    old = Placement(np.array([[0, 1, 2, 3]], np.int32), 2, 4)
    new = Placement(np.array([[0, 2, 1, 3]], np.int32), 2, 4)
    cost = migration_cost(moves(old, new), old, 1000, 500.0)
    assert (cost.copies, cost.bytes_between, cost.most_received, cost.stall_seconds) == (2, 2000, 1000, 2.0)
    assert migration_cost([], old, 1000, 500.0).stall_seconds == 0
    copied = Placement(np.array([[0, 0, 1, 1]], np.int32), 2, 2)
    swapped = Placement(np.array([[0, 1, 1, 1]], np.int32), 2, 2)
    assert [(move.source, move.target) for move in moves(copied, swapped)] == [(2, 1)]


def test_placements_without_an_expert_or_with_uneven_slots_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layer 0 has no slot for experts \[2\]"):
        Placement(np.array([[0, 1, 1, 3]], np.int32), 2, 4)
    with pytest.raises(ValueError, match="4 slots can't be split over 3 devices"):
        Placement(np.array([[0, 1, 2, 3]], np.int32), 3, 4)


def test_slots_of_experts_are_those_that_hold_them() -> None:
    slots, counts = Placement(np.array([[0, 1, 0, 2, 0, 1]], np.int32), 2, 3).slots_of()
    assert counts.tolist() == [[3, 2, 1]]
    assert slots.tolist() == [[[0, 2, 4, 0], [1, 5, 1, 1], [3, 3, 3, 3]]]


# Figures.


def test_an_experts_load_is_split_over_its_copies() -> None:
    placement = Placement(np.array([[0, 1, 0, 2]], np.int32), 2, 3)
    loads = np.array([[60.0, 10.0, 30.0]])
    assert device_loads(loads, placement).tolist() == [[40.0, 60.0]]
    assert imbalance(loads, placement).tolist() == [1.2]
    assert imbalance(np.zeros((1, 3)), placement).tolist() == [1.0]


def test_transitions_count_all_pairs_of_a_tokens_experts() -> None:
    choices = np.random.default_rng(0).integers(0, 5, (3, 40, 2)).astype(np.int16)
    counted = np.zeros((2, 5, 5))
    for gap, token in itertools.product(range(2), range(40)):
        for before, after in itertools.product(choices[gap, token], choices[gap + 1, token]):
            counted[gap, before, after] += 1
    assert (transitions_of(choices, 5) == counted).all()


def test_cut_and_traffic_count_what_is_elsewhere() -> None:
    placement = Placement(np.array([[0, 1, 2, 3], [0, 2, 1, 3]], np.int32), 2, 4)
    choices = np.array([[[0, 1], [2, 3], [0, 2]], [[0, 2], [0, 1], [1, 3]]])
    # Devices of the experts: layer 0 [0, 0], [1, 1], [0, 1]; layer 1 [0, 0], [0, 1], [1, 1].
    assert cut(transitions_of(choices, 4), placement) == (0 + 2 + 2) / 12
    found = traffic(choices, np.array([0, 0, 1]), placement)
    assert found.remote_copies == ((0 + 1 + 1) + (0 + 1 + 0)) / 6
    assert found.active_experts == (2 + 2) / 2
    copied = Placement(np.array([[0, 1, 0, 2]], np.int32), 2, 3)
    # Three tokens at home on device 0 choose expert 0: its copies on devices 0, 1 and 0 serve them.
    found = traffic(np.zeros((1, 3, 1), int), np.zeros(3, int), copied)
    assert (found.remote_copies, found.active_experts) == (1 / 3, 1)
    assert cut(np.zeros((1, 4, 4)), placement) == 0


# The best placement.


def brute_force(loads: np.ndarray, transitions: np.ndarray, *, by_column: bool) -> float:
    """The least objective of all placements on two devices."""
    layers, experts = loads.shape
    halves = [set(half) for half in itertools.combinations(range(experts), experts // 2)]
    mean, best = loads.sum(axis=1) / 2, np.inf
    for chosen in itertools.product(halves, repeat=1 if by_column else layers):
        of_layer = list(chosen) * layers if by_column else list(chosen)
        first = [loads[layer, sorted(half)].sum() for layer, half in enumerate(of_layer)]
        spread = max(abs(load - one) for load, one in zip(first, mean, strict=True)) / mean.mean()
        apart = sum(
            transitions[gap, i, j]
            for gap in range(layers - 1)
            for i in range(experts)
            for j in range(experts)
            if (i in of_layer[gap]) != (j in of_layer[gap + 1])
        )
        best = min(best, spread + apart / transitions.sum())
    return best


@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_the_oracle_finds_the_best_of_all_placements(seed: int, by_column: bool) -> None:
    rng = np.random.default_rng(seed)
    loads, transitions = random_loads(seed, 2, 4), rng.integers(0, 50, (1, 4, 4)).astype(float)
    found = best_placement(loads, transitions, 2, by_column=by_column)
    expected = brute_force(loads, transitions, by_column=by_column)
    assert found.objective == pytest.approx(expected, abs=1e-6)
    assert found.bound <= expected + 1e-6


def test_no_heuristic_beats_the_oracle() -> None:
    for seed in range(3):
        rng = np.random.default_rng(seed)
        loads, transitions = random_loads(seed, 3, 8), rng.gamma(0.3, 50.0, (2, 8, 8)).round()
        best = best_placement(loads, transitions, 2)
        pool = build_pool(transitions, transitions.sum() / 4, 4, top_edges=4)
        for placement in (eplb(loads, 2), edr(loads, pool.experts, 2), linear_placement(3, 8, 2)):
            by_device = device_loads(loads, placement)
            mean = by_device.mean(axis=1, keepdims=True)
            spread = np.abs(by_device - mean).max() / mean.mean()
            assert best.bound <= spread + cut(transitions, placement) + 1e-6
