"""Placing experts by how many are at work."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdual.scheduling.expert_activity import DECODE_TOKENS, activity, metro
from jaxdual.scheduling.expert_figures import imbalance
from jaxdual.scheduling.expert_policies import RouterWindow, expert_policy
from jaxdual.scheduling.experts import Placement, eplb, replicate
from tests.scheduling.test_experts import longest_first, random_loads


def test_activity_is_the_chance_that_some_token_of_a_step_chooses_an_expert() -> None:
    loads = np.array([[1.0, 2.0, 4.0, 0.0]])
    steps = list(itertools.product(range(4), repeat=3))  # three tokens, each with one of four chances
    chance = [np.mean([min(step) < load for step in steps]) for load in loads[0]]
    assert activity(loads, 4, 3)[0] == pytest.approx(chance)
    assert activity(loads, 0, 3).tolist() == [[0.0] * 4]


def at_work(placement: Placement, loads: np.ndarray, tokens: float, step_tokens: float) -> np.ndarray:
    """Experts `[layers, devices]` that a device is expected to have at work, each copy serving its part of tokens."""
    each = activity(loads / placement.copies(), tokens, step_tokens)
    return np.take_along_axis(each, placement.experts, axis=1).reshape(len(loads), placement.devices, -1).sum(axis=2)


@given(seed=st.integers(0, 99), step_tokens=st.sampled_from([1, 8, 64]))
def test_metro_is_near_the_best_of_all_halves(seed: int, step_tokens: int) -> None:
    loads = random_loads(seed, 1, 8)
    tokens = loads.sum() / 2
    each = activity(loads, tokens, step_tokens)[0]
    best = min(
        max(each[list(half)].sum(), each.sum() - each[list(half)].sum()) for half in itertools.combinations(range(8), 4)
    )
    placement = metro(loads, tokens, 2, step_tokens=step_tokens)
    found = at_work(placement, loads, tokens, step_tokens).max()
    assert best - 1e-9 <= found <= best * 7 / 6 + 1e-9  # what packing the heaviest first can miss on two devices


@given(seed=st.integers(0, 99), redundant=st.sampled_from([0, 4]))
def test_metro_packs_copies_by_activity(seed: int, redundant: int) -> None:
    loads = random_loads(seed)
    tokens = float(loads.sum() / 6)
    placement = metro(loads, tokens, 2, step_tokens=16, redundant=redundant)
    for layer in range(3):
        held = replicate(loads[layer], 8 + redundant)
        assert sorted(placement.experts[layer]) == sorted(held)
        each = activity(loads[layer, held] / np.bincount(held)[held], tokens, 16)
        packs = longest_first(each.tolist(), 2)
        expected = sorted(each[sorted(members)].sum() for members in packs)
        assert sorted(at_work(placement, loads, tokens, 16)[layer]) == pytest.approx(expected)


def test_metro_evens_out_experts_at_work_where_eplb_evens_out_tokens() -> None:
    loads = np.array([[60.0, 20, 20, 20, 2, 2, 2, 2]])
    by_tokens, by_activity = eplb(loads, 2), metro(loads, 64, 2, step_tokens=16)
    spread = [np.ptp(at_work(placement, loads, 64, 16)) for placement in (by_tokens, by_activity)]
    assert spread[1] < spread[0]
    assert imbalance(loads, by_activity) > imbalance(loads, by_tokens)
    with pytest.raises(ValueError, match="9 slots can't be divided by 2 devices"):
        metro(loads, 64, 2, redundant=1)


def test_policies_by_name_take_what_they_have_a_use_for() -> None:
    sources = np.stack([random_loads(0), random_loads(1)], axis=1)
    short, long = RouterWindow(400, sources, steps=100), RouterWindow(400, sources)
    assert (short.step_tokens, long.step_tokens) == (4, DECODE_TOKENS)
    policy = expert_policy("metro", 2, redundant=2)
    assert policy is not None
    for window in (short, long):
        wanted = metro(window.activations, 400, 2, step_tokens=window.step_tokens, redundant=2)
        assert (policy(window).experts == wanted.experts).all()
    with pytest.raises(ValueError, match="'source' has no use for 2 redundant slots: eplb and metro have"):
        expert_policy("source", 2, redundant=2)
