"""The decode engine in closed form against one that is simulated step by step."""

from __future__ import annotations

import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxdual.sim.decode import DecodeBatch, DecodeCost

COSTS = [
    DecodeCost(0.01, 0.001, 1e-6),
    DecodeCost(0.02, 0.0, 0.0),
    DecodeCost(0.0, 0.0, 1e-5),
    DecodeCost(1e-3, 5e-5, 3e-9),
]


def stepwise(cost: DecodeCost, arrivals: list[tuple[float, int, int]]) -> dict[int, tuple[float, float]]:
    """When each sequence runs and ends: arrivals are times, contexts and tokens, in the order of time."""
    waiting = list(enumerate(arrivals))
    batch: list[list[int]] = []  # sequence, context, tokens left
    found: dict[int, tuple[float, float]] = {}
    runs: dict[int, float] = {}
    now = 0.0
    while waiting or batch:
        if not batch:
            now = max(now, waiting[0][1][0])
        while waiting and waiting[0][1][0] <= now:
            number, (_, context, tokens) = waiting.pop(0)
            batch.append([number, context, tokens])
            runs[number] = now
        now += cost.base + cost.per_sequence * len(batch) + cost.per_token * sum(context for _, context, _ in batch)
        for one in batch:
            one[1] += 1
            one[2] -= 1
        for number, _, left in batch:
            if not left:
                found[number] = (runs[number], now)
        batch = [one for one in batch if one[2]]
    return found


def analytic(cost: DecodeCost, arrivals: list[tuple[float, int, int]]) -> dict[int, tuple[float, float]]:
    engine = DecodeBatch(cost)
    waiting = list(enumerate(arrivals))
    runs: dict[int, float] = {}
    found: dict[int, tuple[float, float]] = {}
    while waiting or len(engine):
        due = engine.next_time
        # Who comes at the very end of a step is in time for the next one.
        if waiting and (due is None or waiting[0][1][0] <= due):
            number, (time, context, tokens) = waiting.pop(0)
            runs[number] = engine.join(time, number, context, tokens)
        else:
            assert due is not None
            for done in engine.advance(due):
                found[done.sequence] = (runs[done.sequence], done.time)
                assert done.context == arrivals[done.sequence][1] + arrivals[done.sequence][2]
            engine.check_integrity()
    return found


@pytest.mark.parametrize("cost", COSTS)
@settings(deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 60), rate=st.floats(0.1, 200.0))
def test_it_is_what_single_steps_are(cost: DecodeCost, seed: int, count: int, rate: float) -> None:
    rng = random.Random(seed)
    now, arrivals = 0.0, []
    for _ in range(count):
        now += rng.choice([0.0, rng.expovariate(rate)])
        arrivals.append((now, rng.randrange(1, 70_000), rng.choice([1, 2, rng.randrange(1, 400)])))
    want, got = stepwise(cost, arrivals), analytic(cost, arrivals)
    assert got.keys() == want.keys()
    for number, times in want.items():
        assert got[number] == pytest.approx(times, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("cost", COSTS)
@example(steps=0, sequences=2, tokens=1)  # without a base, no time for no steps divides by 0
@given(steps=st.integers(0, 10**6), sequences=st.integers(1, 500), tokens=st.integers(0, 10**7))
def test_steps_are_the_reverse_of_seconds(cost: DecodeCost, steps: int, sequences: int, tokens: int) -> None:
    if cost.seconds(1, sequences, tokens) == 0:
        return
    seconds = cost.seconds(steps, sequences, tokens)
    assert cost.steps(seconds, sequences, tokens) == steps
    part = cost.seconds(steps + 1, sequences, tokens) - seconds
    assert cost.steps(seconds + part / 2, sequences, tokens) == steps


def test_contexts_grow_with_each_step() -> None:
    engine = DecodeBatch(DecodeCost(0.01, 0.0, 0.0))
    assert engine.next_time is None
    assert engine.join(1.0, 7, 100, 10) == 1.0
    assert engine.advance(1.0) == []
    assert engine.next_time == pytest.approx(1.1)
    assert engine.tokens(1.0351) == 103
    assert engine.join(1.0351, 8, 50, 3) == pytest.approx(1.04)
    assert engine.tokens(1.0351) == 153
    with pytest.raises(ValueError, match="tokens=0"):
        engine.join(1.04, 9, 1, 0)


@pytest.mark.parametrize("wrong", [(-1.0, 0.0, 1.0), (0.0, 0.0, 0.0)])
def test_costs_are_checked(wrong: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="coefficient"):
        DecodeCost(*wrong)
