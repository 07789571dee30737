"""What the choice of a rank is told of a request."""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

import pytest

from jaxdual import SamplingParams
from jaxdual.engine.ranks import Rank, Ranks
from jaxdual.engine.request import Request
from jaxdual.kv.keys import KeyChain, root_key
from jaxdual.kv.manager import GroupPages, KVManager
from jaxdual.scheduling.batch import BatchLimits, BatchScheduler
from jaxdual.scheduling.dispatch import DISPATCH_POLICIES, DispatchRequest, LoadBoard, dispatch_policy

PAGE = 4
PROMPT = list(range(20))
LIMITS = BatchLimits(max_num_seqs=4, max_num_batched_tokens=32, max_chunk=32)


class Watched:
    """Keeps what it is asked, and takes the last rank."""

    uses_prefixes: ClassVar[bool] = True

    def __init__(self) -> None:
        self.branches: Counter[str] = Counter()
        self.asked: list[DispatchRequest] = []

    def select(self, request: DispatchRequest, board: LoadBoard, now: float) -> int:
        self.asked.append(request)
        return board.engines - 1


def rank_of(cached_blocks: int = 0, *, caching: bool = True) -> Rank:
    """A rank that has the first blocks of the prompt cached."""
    kv = KVManager([GroupPages(16)], PAGE, prefix_caching=caching)
    if cached_blocks:
        keys = chain().upto(PROMPT, cached_blocks)
        assert kv.admit(0, [], cached_blocks * PAGE) is not None
        kv.publish(0, keys)
        kv.release(0)
    return Rank(BatchScheduler(LIMITS, kv), kv)


def chain() -> KeyChain:
    return KeyChain(root_key(b"model", b"layout"), PAGE)


def request(user: str | None = None, n: int = 1) -> Request:
    return Request("7", PROMPT, SamplingParams(n=n, max_tokens=1), 0.0, user=user)


def test_a_choice_is_told_length_outputs_user_and_what_each_rank_has_cached() -> None:
    policy = Watched()
    ranks = Ranks([rank_of(), rank_of(2), rank_of(5)], policy)
    assert ranks.choose(request("ann", n=3), chain(), 0.0) == 2
    (asked,) = policy.asked
    assert (asked.request_id, asked.prompt_tokens, asked.outputs, asked.user) == ("7", 20, 3, "ann")
    # The last token is always computed, so the block that it completes is no help.
    assert asked.prefix_shares == [0.0, 8 / 20, 16 / 20]


def test_score_goes_to_the_cached_prefix() -> None:
    ranks = Ranks([rank_of(), rank_of(2), rank_of()], dispatch_policy("score"))
    assert ranks.choose(request(), chain(), 0.0) == 1
    assert ranks.dispatch.branches == {"affinity": 1}


@pytest.mark.parametrize("name", DISPATCH_POLICIES)
@pytest.mark.parametrize("caching", [False, True])
def test_keys_are_computed_for_policies_that_look_at_prefixes_only(name: str, caching: bool) -> None:
    keys = chain()
    Ranks([rank_of(caching=caching), rank_of(caching=caching)], dispatch_policy(name)).choose(request(), keys, 0.0)
    assert len(keys.known) == (4 if name == "score" and caching else 0)


def test_one_rank_asks_no_policy() -> None:
    policy, keys = Watched(), chain()
    assert Ranks([rank_of(2)], policy).choose(request("ann"), keys, 0.0) == 0
    assert (policy.asked, keys.known) == ([], [])


def test_gimbal_sends_users_back_to_their_rank_until_they_have_been_silent_for_too_long() -> None:
    ranks = Ranks([rank_of(), rank_of(), rank_of()], dispatch_policy("gimbal"))
    users = ["ann", "bob", "ann", "ann", None, "bob"]
    assert [ranks.choose(request(user), chain(), 0.0) for user in users] == [0, 1, 0, 0, 1, 1]
    assert ranks.choose(request("bob"), chain(), 600.0) == 1
    assert ranks.choose(request("ann"), chain(), 600.5) == 1, "it is the turn of rank 1, and rank 0 is forgotten"
    assert ranks.dispatch.branches == {"round_robin": 4, "affinity": 4}
