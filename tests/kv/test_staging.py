"""Leases of staging pages: pages come back when nobody can touch them any more, and not before."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jaxdual.kv.group import GroupPages
from jaxdual.kv.lease import Lease, LeaseState
from jaxdual.kv.slots import IntegrityError
from jaxdual.kv.staging import Staging

MEMORY = [GroupPages(4, host_pages=3, staging_pages=5), GroupPages(4, staging_pages=2, window=8)]
PAGES = {(0, slot) for slot in range(3, 8)} | {(1, slot) for slot in range(2)}


def pages_of(lease: Lease) -> set[tuple[int, int]]:
    return {(group, slot) for group, slots in enumerate(lease.slots) for slot in slots}


class Transfers(RuleBasedStateMachine):
    """Requests that reserve, load, use and end in any order, over carriers that die in between.

    What is true is kept apart: which operations touch which pages.
    """

    def __init__(self) -> None:
        super().__init__()
        self.staging = Staging(MEMORY)
        self.owned: list[Lease] = []
        self.operations: list[tuple[Lease, str]] = []

    @rule(counts=st.tuples(st.integers(0, 5), st.integers(0, 2)))
    def reserve(self, counts: tuple[int, int]) -> None:
        free = self.staging.num_free
        lease = self.staging.reserve(counts)
        assert (lease is None) == any(count > left for count, left in zip(counts, free, strict=True))
        if lease is None:
            assert self.staging.num_free == free
            return
        assert tuple(map(len, lease.slots)) == counts
        taken = pages_of(lease)
        assert taken <= PAGES
        for other in (*self.owned, *(lease for lease, _ in self.operations)):
            assert not taken & pages_of(other)
        self.owned.append(lease)

    @precondition(lambda self: self.owned)
    @rule(data=st.data(), carrier=st.sampled_from("ab"), count=st.integers(1, 3))
    def begin(self, data: st.DataObject, carrier: str, count: int) -> None:
        lease = data.draw(st.sampled_from(self.owned))
        leases = self.staging.leases
        begin = {
            LeaseState.RESERVED: leases.begin_load,
            LeaseState.LOADING: leases.begin_load,
            LeaseState.READY: leases.begin_use,
        }.get(lease.state)
        if begin is None:
            for refused in (leases.begin_load, leases.begin_use):
                with pytest.raises(IntegrityError):
                    refused(lease, carrier, count)
            return
        begin(lease, carrier, count)
        self.operations += [(lease, carrier)] * count

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def fill(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.owned))
        if lease.state is LeaseState.RESERVED:
            self.staging.leases.filled(lease)
            assert lease.state is LeaseState.READY

    @precondition(lambda self: self.operations)
    @rule(data=st.data())
    def one_is_over(self, data: st.DataObject) -> None:
        lease, carrier = data.draw(st.sampled_from(self.operations))
        self.operations.remove((lease, carrier))
        found = self.staging.leases.operation_over(lease.number, carrier)
        assert found is (lease if lease in self.owned else None)
        if lease in self.owned and lease not in [other for other, _ in self.operations]:
            assert lease.state is LeaseState.READY

    @rule(carrier=st.sampled_from("ab"))
    def die(self, carrier: str) -> None:
        self.staging.leases.carrier_dead(carrier)
        self.operations = [one for one in self.operations if one[1] != carrier]

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.owned))
        self.owned.remove(lease)
        self.staging.leases.end(lease)
        with pytest.raises(IntegrityError):
            self.staging.leases.end(lease)

    @invariant()
    def pages_are_taken_while_somebody_may_touch_them(self) -> None:
        self.staging.check_integrity()
        taken: set[tuple[int, int]] = set()
        for lease in {*self.owned, *(lease for lease, _ in self.operations)}:
            taken |= pages_of(lease)
        free = self.staging.num_free
        assert sum(free) == len(PAGES) - len(taken)
        ended = {lease for lease, _ in self.operations} - set(self.owned)
        assert self.staging.leases.num_quarantined == len(ended)


Transfers.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestTransfers = Transfers.TestCase


def test_what_never_began_can_not_be_over() -> None:
    staging = Staging(MEMORY)
    lease = staging.reserve((1, 0))
    assert lease is not None
    with pytest.raises(IntegrityError, match="never began"):
        staging.leases.operation_over(lease.number, "a")
    staging.leases.begin_load(lease, "a", 1)
    with pytest.raises(IntegrityError, match="never began"):
        staging.leases.operation_over(lease.number, "b")
    staging.leases.end(lease)
    assert staging.num_free == (4, 2)
    staging.leases.operation_over(lease.number, "a")
    with pytest.raises(IntegrityError, match="never began"):  # a number is never used again
        staging.leases.operation_over(lease.number, "a")
    assert staging.num_free == (5, 2)


def test_a_page_that_is_lost_or_given_away_twice_is_found() -> None:
    staging = Staging(MEMORY)
    lease = staging.reserve((2, 1))
    assert lease is not None
    staging.check_integrity()
    lease.slots = ((3,), (0,))
    with pytest.raises(IntegrityError):
        staging.check_integrity()
