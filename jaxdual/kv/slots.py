"""Free lists of equal slots: device pages and host blocks."""

from __future__ import annotations

from collections.abc import Iterable


class IntegrityError(RuntimeError):
    """KV accounting contradicts itself: a defect of this program, never of its input."""


class SlotPool:
    """Hands out the numbers `first .. first + capacity - 1`, each to one owner at a time.

    It knows nothing of contents. Freed slots are handed out again most recent first.
    """

    def __init__(self, capacity: int, first: int = 0) -> None:
        if capacity < 0:
            raise ValueError(f"{capacity=} must be at least 0")
        self.capacity = capacity
        self._first = first
        self._free = list(range(first + capacity - 1, first - 1, -1))
        self._taken = bytearray(capacity)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self) -> int | None:
        """A free slot, or None if there is none."""
        if not self._free:
            return None
        slot = self._free.pop()
        self._taken[slot - self._first] = 1
        return slot

    def free(self, slots: Iterable[int]) -> None:
        """Gives slots back.

        Raises:
          IntegrityError: one of them is free already; the slots before it are freed.
        """
        for slot in slots:
            if not self._taken[slot - self._first]:
                raise IntegrityError(f"slot {slot} was freed twice")
            self._taken[slot - self._first] = 0
            self._free.append(slot)

    def check(self, owned: Iterable[int]) -> None:
        """Raises `IntegrityError` unless exactly the slots in `owned` are taken, each listed once."""
        seen = bytearray(self.capacity)
        for slot in owned:
            if seen[slot - self._first]:
                raise IntegrityError(f"slot {slot} has two owners")
            seen[slot - self._first] = 1
        if seen != self._taken:
            wrong = [self._first + i for i in range(self.capacity) if seen[i] != self._taken[i]]
            raise IntegrityError(f"slots {wrong} are owned by nobody, or owned and free")
        if sorted(self._free) != [self._first + i for i in range(self.capacity) if not self._taken[i]]:
            raise IntegrityError("the free list is not the set of free slots")
