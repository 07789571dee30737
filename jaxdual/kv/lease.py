"""Who may touch the bytes of staging slots: leases, a state machine.

Bytes in staging memory are written and read by others than the one who hands them out: a store's reader, a peer's
write, a copy to a device. A lease is the right of one transfer to its slots. Its owner may end it at any time, since
requests end at any time; the slots come back only when nobody can touch them any more.

| state | may write the bytes | may read them | next |
| --- | --- | --- | --- |
| reserved | nobody | nobody | loading; ready, where the owner fills the slots itself; end |
| loading | the operations under way | a peer that writes too | ready, when the last of them is over; end |
| ready | nobody | the owner, and its agent for it | in use; end |
| in use | nobody | the operations under way, the owner | ready, when the last of them is over; end |
| quarantined | what is still under way | what is still under way | released, when the last of them is over |
| released | nobody | nobody | the slots belong to others, and the lease's number is never used again |

End leads to "released" if no operation is under way, else to "quarantined". No deadline ends an operation: it is over
when its completion was seen, or when whoever carries it out is known to be dead.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from enum import Enum

from jaxdual.kv.slots import IntegrityError


class LeaseState(Enum):
    RESERVED = "reserved"
    LOADING = "loading"
    READY = "ready"
    IN_USE = "in use"
    QUARANTINED = "quarantined"
    RELEASED = "released"


_RUNNING = (LeaseState.LOADING, LeaseState.IN_USE)
_HELD = (LeaseState.RESERVED, LeaseState.LOADING, LeaseState.READY, LeaseState.IN_USE)


@dataclass(slots=True, eq=False)
class Lease:
    """The right of one transfer to some slots.

    Attributes:
      number: unique for ever: what comes late for a lease that is gone finds nothing under its number.
      slots: of each layer group.
      state: see the table of this module.
      under_way: operations that touch the slots, by who carries them out.
    """

    number: int
    slots: tuple[tuple[int, ...], ...]
    state: LeaseState = LeaseState.RESERVED
    under_way: dict[Hashable, int] = field(default_factory=dict)


class LeaseBook:
    """All leases that are not released.

    Args:
      release: called with each lease that nobody can touch any more.
    """

    def __init__(self, release: Callable[[Lease], None]) -> None:
        self._release = release
        self._numbers = itertools.count(1)
        self._leases: dict[int, Lease] = {}

    def __len__(self) -> int:
        return len(self._leases)

    @property
    def leases(self) -> tuple[Lease, ...]:
        return tuple(self._leases.values())

    @property
    def num_quarantined(self) -> int:
        return sum(lease.state is LeaseState.QUARANTINED for lease in self._leases.values())

    def reserve(self, slots: tuple[tuple[int, ...], ...]) -> Lease:
        """A lease of slots that nobody else holds."""
        lease = Lease(next(self._numbers), slots)
        self._leases[lease.number] = lease
        return lease

    def begin_load(self, lease: Lease, carrier: Hashable, operations: int) -> None:
        """Operations of `carrier` write to the slots from now on, beside those of other carriers."""
        self._move(lease, (LeaseState.RESERVED, LeaseState.LOADING), LeaseState.LOADING)
        self._begin(lease, carrier, operations)

    def filled(self, lease: Lease) -> None:
        """The owner has written the slots itself."""
        self._move(lease, (LeaseState.RESERVED,), LeaseState.READY)

    def begin_use(self, lease: Lease, carrier: Hashable, operations: int) -> None:
        """Operations of `carrier` read the slots from now on."""
        self._move(lease, (LeaseState.READY,), LeaseState.IN_USE)
        self._begin(lease, carrier, operations)

    def operation_over(self, number: int, carrier: Hashable) -> Lease | None:
        """An operation's completion was seen.

        Returns:
          Its lease; None if its owner has ended that: nobody waits for the outcome.

        Raises:
          IntegrityError: no such operation is under way.
        """
        lease = self._leases.get(number)
        if lease is None or not lease.under_way.get(carrier):
            raise IntegrityError(f"lease {number}: an operation of {carrier!r} is over that never began")
        lease.under_way[carrier] -= 1
        return self._after(lease)

    def carrier_dead(self, carrier: Hashable) -> None:
        """Nothing of `carrier` is under way any more: its process or connection is gone, with all that it had begun."""
        for lease in self.leases:
            if lease.under_way.pop(carrier, 0):
                self._after(lease)

    def end(self, lease: Lease) -> None:
        """The owner wants the slots no more; it may not touch them from now on."""
        if lease.state not in _HELD:
            raise IntegrityError(f"lease {lease.number} ended while {lease.state.value}")
        lease.state = LeaseState.QUARANTINED
        self._after(lease)

    def check(self) -> None:
        """Raises `IntegrityError` if states and operations contradict each other."""
        for number, lease in self._leases.items():
            running = any(lease.under_way.values())
            if lease.number != number or lease.state is LeaseState.RELEASED:
                raise IntegrityError(f"lease {number} is listed, and {lease.state.value} as {lease.number}")
            if running != (lease.state in (*_RUNNING, LeaseState.QUARANTINED)):
                raise IntegrityError(f"lease {number} is {lease.state.value} with operations {lease.under_way}")

    def _move(self, lease: Lease, before: tuple[LeaseState, ...], after: LeaseState) -> None:
        if self._leases.get(lease.number) is not lease or lease.state not in before:
            raise IntegrityError(f"lease {lease.number} can't go from {lease.state.value} to {after.value}")
        lease.state = after

    def _begin(self, lease: Lease, carrier: Hashable, operations: int) -> None:
        if operations < 1:
            raise IntegrityError(f"lease {lease.number}: {operations=} must be at least 1")
        lease.under_way[carrier] = lease.under_way.get(carrier, 0) + operations

    def _after(self, lease: Lease) -> Lease | None:
        """What follows when operations are over, or the owner has ended the lease."""
        if any(lease.under_way.values()):
            return None if lease.state is LeaseState.QUARANTINED else lease
        lease.under_way.clear()
        if lease.state is not LeaseState.QUARANTINED:
            lease.state = LeaseState.READY
            return lease
        lease.state = LeaseState.RELEASED
        del self._leases[lease.number]
        self._release(lease)
        return None
