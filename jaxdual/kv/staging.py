"""Staging pages: host memory that blocks come through on their way from or to elsewhere, lent out by leases."""

from __future__ import annotations

from collections.abc import Sequence

from jaxdual.kv.group import GroupPages
from jaxdual.kv.lease import Lease, LeaseBook
from jaxdual.kv.slots import SlotPool


class Staging:
    """Hands out the staging pages of all layer groups.

    A transfer gets all its pages or none, when it starts and not while it queues: who waits holds nothing.

    Args:
      memory: of each layer group; its staging pages have the numbers behind those of its host tier.

    Attributes:
      leases: of the pages that are handed out.
    """

    def __init__(self, memory: Sequence[GroupPages]) -> None:
        self._pools = [SlotPool(pages.staging_pages, first=pages.host_pages) for pages in memory]
        self.leases = LeaseBook(self._take_back)

    @property
    def num_free(self) -> tuple[int, ...]:
        """Free pages of each group."""
        return tuple(pool.num_free for pool in self._pools)

    @property
    def capacity(self) -> tuple[int, ...]:
        return tuple(pool.capacity for pool in self._pools)

    def reserve(self, counts: Sequence[int]) -> Lease | None:
        """A lease of so many pages of each group; None, and nothing has changed, if there are too few now."""
        if any(count > free for count, free in zip(counts, self.num_free, strict=True)):
            return None
        taken = tuple(
            tuple(slot for slot in (pool.take() for _ in range(count)) if slot is not None)
            for pool, count in zip(self._pools, counts, strict=True)
        )
        return self.leases.reserve(taken)

    def check_integrity(self) -> None:
        """Raises `IntegrityError` unless every page is free or in one lease, and leases don't contradict themselves."""
        self.leases.check()
        for group, pool in enumerate(self._pools):
            pool.check(slot for lease in self.leases.leases for slot in lease.slots[group])

    def _take_back(self, lease: Lease) -> None:
        for pool, slots in zip(self._pools, lease.slots, strict=True):
            pool.free(slots)
