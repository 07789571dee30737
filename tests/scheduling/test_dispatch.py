"""Choosing an engine for a request: Algorithm 1 of arXiv 2602.21626, and what it is compared with."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdual.scheduling.dispatch import (
    DISPATCH_POLICIES,
    DispatchRequest,
    EngineLoad,
    GimbalDispatch,
    GimbalThresholds,
    LoadBoard,
    ScoreDispatch,
    dispatch_policy,
)


def load(kv_percent: float = 0, tokens: int = 0, waiting: int = 0, running: int = 0, remaining: int = 0) -> EngineLoad:
    return EngineLoad(round(kv_percent * 10), 1000, waiting, running, tokens, remaining)


def board(kv: list[float], tokens: list[int] | None = None) -> LoadBoard:
    made = LoadBoard(len(kv))
    for engine, percent in enumerate(kv):
        made.report(engine, load(percent, (tokens or [0] * len(kv))[engine]))
    return made


def request(number: int = 0, tokens: int = 100, user: str | None = None) -> DispatchRequest:
    return DispatchRequest(str(number), tokens, user)


# KV usage in percent, loads, the engine that the user is remembered at and whether that is expired; the engine that is
# chosen with the load rule read literally, and relaxed. The turn is at engine 0.
TABLE = [
    ([92, 60], [0, 0], None, False, 1, 1),
    ([90, 80], [0, 0], None, False, 1, 1),
    ([95, 90], [9000, 4000], 0, False, 1, 1),
    ([95, 90], [6000, 4000], None, False, 0, 0),
    ([95, 90], [7000, 4000], None, False, 0, 0),
    ([50, 30], [0, 0], 1, False, 1, 1),
    ([50, 30], [10000, 1000], 0, True, 0, 1),
    ([50, 30], [10000, 1000], None, False, 0, 1),
]


@pytest.mark.parametrize(("kv", "tokens", "home", "expired", "literal", "relaxed"), TABLE)
@pytest.mark.parametrize("scope", ["literal", "relaxed"])
def test_algorithm_1(
    kv: list[float],
    tokens: list[int],
    home: int | None,
    expired: bool,
    literal: int,
    relaxed: int,
    scope: str,
) -> None:
    policy = GimbalDispatch(load_scope=scope)  # type: ignore[arg-type]
    user, now = None, 0.0
    if home is not None:
        user = "ann"
        for _ in range(home + 1):  # without reports, engines in turn: the last one is home
            policy.select(request(user=user), LoadBoard(2), now)
        while policy.select(request(), LoadBoard(2), now) != 1:  # until it is engine 0's turn again
            pass
        now = 601.0 if expired else 600.0
    expected = literal if scope == "literal" else relaxed
    assert policy.select(request(user=user), board(kv, tokens), now) == expected
    if user is not None:  # remembered anew
        assert policy.select(request(user=user), board([0, 0]), now) == expected
        assert policy.branches["affinity"] >= 1


def test_without_reports_engines_come_in_turn() -> None:
    for name in DISPATCH_POLICIES:
        policy, unknown = dispatch_policy(name), LoadBoard(3)
        unknown.report(0, load(99))
        assert [policy.select(request(n), unknown, 0.0) for n in range(5)] == [0, 1, 2, 0, 1]
        assert policy.branches == {"round_robin": 5}


def test_turn_moves_with_every_request_or_only_with_those_that_take_it() -> None:
    on_call, on_use = GimbalDispatch(), GimbalDispatch(advance_on_call=False)
    saturated, calm = board([95, 10, 50]), board([10, 10, 10])
    for policy, then in ((on_call, [1, 2]), (on_use, [0, 1])):
        assert policy.select(request(), saturated, 0.0) == 1
        assert [policy.select(request(), calm, 0.0) for _ in range(2)] == then


@given(
    kv=st.lists(st.integers(0, 100), min_size=1, max_size=8),
    seed=st.integers(0, 9),
)
def test_users_are_never_sent_home_while_any_engine_is_saturated(kv: list[int], seed: int) -> None:
    rng, made = random.Random(seed), board(list(kv))
    policy = GimbalDispatch()
    for number in range(20):
        policy.select(request(number, user=rng.choice(["a", "b", None])), made, float(number))
    assert (policy.branches["affinity"] == 0) or max(kv) < 90
    assert sum(policy.branches.values()) == 20


def test_kv_difference_of_ten_points_counts_for_any_counts_of_pages() -> None:
    made = LoadBoard(2)
    made.report(0, EngineLoad(9, 10, 0, 0, 0, 0))
    made.report(1, EngineLoad(8, 10, 0, 0, 0, 0))  # 0.9 - 0.8 is below 0.1 in floating point
    policy = GimbalDispatch()
    assert [policy.select(request(), made, 0.0) for _ in range(3)] == [1, 1, 1]


def test_the_longest_silent_user_is_forgotten_first() -> None:
    policy, calm = GimbalDispatch(GimbalThresholds(max_users=2)), board([0, 0])
    for user in ("a", "b", "a", "c"):
        policy.select(request(user=user), calm, 0.0)
    before = policy.branches["affinity"]
    policy.select(request(user="a"), calm, 0.0)
    assert policy.branches["affinity"] == before + 1
    policy.select(request(user="b"), calm, 0.0)
    assert policy.branches["affinity"] == before + 1


def test_what_was_sent_counts_until_the_engine_reports() -> None:
    made, policy = board([10, 10], [0, 0]), GimbalDispatch(load_scope="relaxed")
    made.sent(0, request(1, tokens=3001))
    assert policy.select(request(), made, 0.0) == 1
    made.withdrawn(0, "1")
    assert made.tokens("context") == [0, 0]
    made.withdrawn(0, "1")  # a second end of it changes nothing
    made.sent(0, request(2, tokens=5000))
    made.report(0, load(10, 700))
    made.withdrawn(0, "2")
    assert made.tokens("context") == [700, 0]


def test_counts_take_the_fewest_waiting_then_the_fewest_running() -> None:
    made, policy = LoadBoard(3), dispatch_policy("vllm_counts")
    for engine, (waiting, running) in enumerate([(1, 0), (0, 5), (0, 4)]):
        made.report(engine, load(waiting=waiting, running=running))
    chosen = []
    for number in range(4):
        engine = policy.select(request(number), made, 0.0)
        made.sent(engine, request(number))
        chosen.append(engine)
    assert chosen == [2, 1, 0, 2]


def test_score_weighs_prefix_load_and_kv_memory() -> None:
    made, policy = LoadBoard(2), ScoreDispatch()
    made.report(0, load(10, remaining=1000))
    made.report(1, load(10, remaining=0))
    assert policy.select(DispatchRequest("1", 100, prefix_shares=(1.0, 0.0)), made, 0.0) == 0
    assert policy.select(DispatchRequest("2", 100, prefix_shares=(0.5, 0.0)), made, 0.0) == 1
    made.report(1, load(90, remaining=900))
    assert policy.select(DispatchRequest("3", 100), made, 0.0) == 0


def test_settings_out_of_range_are_refused() -> None:
    for name, value in (("theta_kv", 1.1), ("theta_diff", -0.1), ("theta_load", -1), ("user_ttl", -1.0)):
        with pytest.raises(ValueError, match=f"{name}={value} must be"):
            GimbalThresholds(**{name: value})
    with pytest.raises(ValueError, match="must be one of rr"):
        dispatch_policy("best")
    with pytest.raises(ValueError, match="engines=0"):
        LoadBoard(0)
    with pytest.raises(ValueError, match="load_scope='both' must be one of literal, relaxed"):
        GimbalDispatch(load_scope="both")  # type: ignore[arg-type]
