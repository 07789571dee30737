"""Orders in which sequences wait."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdual.scheduling.queues import (
    AGE_LIMIT,
    QUEUE_POLICIES,
    RollingAgeLimit,
    ShortestFirst,
    WaitingQueue,
    waiting_queue,
)


@dataclass(frozen=True, slots=True, eq=False)
class Waiter:
    seq_id: int
    arrival: float
    prompt_length: int
    priority: int = 0


def lengths(queue: WaitingQueue[Waiter], now: float) -> list[int]:
    return [one.prompt_length for one in queue.in_order(now)]


def test_shortest_first_orders_the_aged_by_arrival_and_the_rest_by_length() -> None:
    queue: ShortestFirst[Waiter] = ShortestFirst(5.0)
    for number, (arrival, prompt) in enumerate([(9.5, 10), (0, 4000), (9, 50), (5.0, 100), (4.9, 3000)]):
        queue.add(Waiter(number, arrival, prompt))
    assert lengths(queue, 10.0) == [4000, 3000, 100, 10, 50]
    assert queue.aged == 3


def test_smaller_priorities_go_first_even_before_the_aged() -> None:
    queue: ShortestFirst[Waiter] = ShortestFirst(5.0)
    queue.add(Waiter(0, 0.0, 7, priority=1))
    queue.add(Waiter(1, 8.0, 9000))
    queue.add(Waiter(2, 1.0, 5, priority=1))
    assert lengths(queue, 9.0) == [9000, 7, 5]


def test_linear_ageing_weighs_a_second_against_tokens() -> None:
    queue = waiting_queue("sjf_linear")
    queue.add(Waiter(0, 0.0, 3000))
    queue.add(Waiter(1, 4.0, 700))  # four seconds are worth 2400 tokens: 100 too few
    queue.add(Waiter(2, 4.0, 500))
    assert [one.seq_id for one in queue.in_order(4.0)] == [2, 0, 1]


def test_rolling_limit_follows_the_tail_of_what_was_seen() -> None:
    limit = RollingAgeLimit()
    assert limit() == AGE_LIMIT
    for seconds in range(1, 101):
        limit.observe(float(seconds))
    assert limit() == pytest.approx(0.9 * 100)
    for _ in range(1000):
        limit.observe(2.0)
    assert limit() == pytest.approx(1.8)


@pytest.mark.parametrize("policy", QUEUE_POLICIES)
@given(
    events=st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 9), st.integers(0, 1), st.integers(0, 99)), min_size=1, max_size=40
    )
)
def test_all_that_wait_are_in_order_once(policy: str, events: list[tuple[int, int, int, int]]) -> None:
    queue, waiting, now = waiting_queue(policy), [], 0.0
    for number, (gap, prompt, priority, pick) in enumerate(events):
        now += gap
        if waiting and pick % 3 == 0:
            queue.remove(waiting.pop(pick % len(waiting)))
        waiting.append(Waiter(number, now, prompt, priority))
        queue.add(waiting[-1])
        ordered = list(queue.in_order(now))
        assert len(queue) == len(ordered) == len(waiting)
        assert {one.seq_id for one in ordered} == {one.seq_id for one in waiting}
        assert [one.priority for one in ordered] == sorted(one.priority for one in ordered)
        if policy == "sjf":
            keys = [
                (one.priority, 0, one.arrival, one.seq_id)
                if now - one.arrival >= AGE_LIMIT
                else (one.priority, 1, one.prompt_length, one.arrival, one.seq_id)
                for one in ordered
            ]
            assert keys == sorted(keys)
    for one in waiting:
        queue.remove(one)
    assert not queue.in_order(now)
    with pytest.raises(KeyError):
        queue.remove(waiting[0])


def test_policies_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="'lifo' must be one of fcfs"):
        waiting_queue("lifo")
    for limit in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="above 0 seconds"):
            waiting_queue("sjf", limit)
