"""When blocks were last used, and which are evicted for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from operator import itemgetter

from jaxdual.kv.keys import BlockKey

SECOND = 10**9
TRIM_TO = 0.95  # of the capacity: room for some writes, so that not each of them evicts
_STEP = 1000  # ns between neighbours of a chain; file systems keep at least that
_TOGETHER = 60 * SECOND  # a block used within this time after its parent was used with it
_HIT_AGAIN = SECOND


class Recency:
    """Times of last use, in nanoseconds of `clock`.

    Blocks that are used together with their parents count as used a step before them, so that a chain is evicted from
    its end: a block without its parents is of no use. Any thread may call.
    """

    def __init__(self, clock: Callable[[], int]) -> None:
        self._clock = clock
        self._times: dict[BlockKey, int] = {}
        self._lock = threading.Lock()

    def use(self, key: BlockKey, parent: BlockKey | None) -> int:
        """A block was read or written; returns its time."""
        with self._lock:
            time = self._clock()
            above = self._times.get(parent, -_TOGETHER) if parent is not None else -_TOGETHER
            if time - above < _TOGETHER:
                time = max(above - _STEP, self._times.get(key, 0))
            self._times[key] = time
            return time

    def use_chain(self, keys: Sequence[BlockKey]) -> list[tuple[BlockKey, int]]:
        """Neighbouring blocks were hit, parents first; returns the times that changed.

        A chain that was hit within a second is left as it is: schedulers ask again and again for those who wait.
        """
        with self._lock:
            now = self._clock()
            recent = now - _HIT_AGAIN
            if all(self._times.get(key, recent) > recent for key in (keys[0], keys[-1])):
                return []
            times = [(key, now - number * _STEP) for number, key in enumerate(keys)]
            self._times.update(times)
            return times

    def last(self, key: BlockKey) -> int:
        """Time of the last use, 0 if unknown."""
        return self._times.get(key, 0)

    def forget(self, key: BlockKey) -> None:
        with self._lock:
            self._times.pop(key, None)

    def forget_before(self, time: int) -> None:
        with self._lock:
            self._times = {key: used for key, used in self._times.items() if used >= time}

    def __len__(self) -> int:
        return len(self._times)


def victims[Name: Hashable](
    blocks: Iterable[tuple[int, int, Name]], *, held: int, wanted: int, capacity: int
) -> list[tuple[int, Name]]:
    """The least recently used blocks that must go.

    Args:
      blocks: time of last use, bytes and name of each.
      held: bytes of all blocks.
      wanted: bytes more that there must be room for.

    Returns:
      Bytes and name of each, oldest first; none if there is room, else enough to get down to 95 % of the capacity.
    """
    if held + wanted <= capacity:
        return []
    chosen = []
    for _, size, name in sorted(blocks, key=itemgetter(0)):
        if held + wanted <= TRIM_TO * capacity:
            break
        chosen.append((size, name))
        held -= size
    return chosen
