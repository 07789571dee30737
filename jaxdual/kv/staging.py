"""Staging pages: host memory that blocks come through on their way from or to elsewhere, lent out by leases."""

from __future__ import annotations

from collections.abc import Sequence

from jaxdual.kv.group import GroupPages, HostBlocks
from jaxdual.kv.lease import Lease, LeaseBook
from jaxdual.kv.manager import KVManager
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
    def num_used(self) -> int:
        """Pages of all groups that are lent out, those in quarantine included."""
        return sum(self.capacity) - sum(self.num_free)

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


class StagedSequences:
    """Sequences that find blocks in staging pages when they are admitted, and the leases of these.

    Args:
      kv: accounting that admits them.
      staging: whose leases they are.
    """

    def __init__(self, kv: KVManager, staging: Staging) -> None:
        self._kv, self._staging = kv, staging
        self._leases: dict[int, Lease] = {}

    @property
    def leases(self) -> list[Lease]:
        return list(self._leases.values())

    def put(
        self,
        seq_id: int,
        lease: Lease,
        firsts: Sequence[int],
        blocks: int,
        computed: int,
        *,
        stored: int,
        handed_over: bool = False,
    ) -> None:
        """Takes a lease that is ready over for a sequence that holds nothing; see `KVManager.stage`.

        Args:
          firsts: in each group, number of the block in the lease's first page.
          blocks: of the sequence, of which those from `firsts` on are in the lease.
        """
        parts = [
            HostBlocks(first, slots[: blocks - first], staged=True)
            for first, slots in zip(firsts, lease.slots, strict=True)
        ]
        self._kv.stage(seq_id, parts, computed, stored=stored, handed_over=handed_over)
        self._leases[seq_id] = lease

    def slots_of(self, seq_id: int) -> tuple[tuple[int, ...], ...]:
        """Staging pages of a sequence, of each layer group."""
        return self._leases[seq_id].slots

    def release(self, seq_ids: Sequence[int]) -> None:
        """The copies to the device of what these sequences had here are under way, or they have ended."""
        for seq_id in seq_ids:
            self._staging.leases.end(self._leases.pop(seq_id))
