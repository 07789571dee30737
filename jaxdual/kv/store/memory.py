"""Block store in host memory."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from jaxdual.kv.keys import BlockKey
from jaxdual.kv.slots import IntegrityError
from jaxdual.kv.store.base import BlockStore, Outcome, StoreStats
from jaxdual.kv.store.format import Trailer
from jaxdual.kv.store.recency import Recency, victims


@dataclass(frozen=True, slots=True)
class _Block:
    trailer: Trailer
    payload: np.ndarray


class MemoryStore(BlockStore):
    """Blocks in the memory of this process; gone with it.

    Checksums are verified here too: host memory of long-lived caches does flip bits, and programs overwrite it.

    Args:
      capacity_bytes: of payload. It is never exceeded; blocks being copied count.
      threads: how many blocks are copied at a time in each direction.
      clock: nanoseconds.

    Raises:
      ValueError: the capacity is not positive.
    """

    def __init__(self, capacity_bytes: int, *, threads: int = 2, clock: Callable[[], int] = time.time_ns) -> None:
        if capacity_bytes < 1:
            raise ValueError(f"{capacity_bytes=} must be at least 1")
        super().__init__(read_threads=threads, write_threads=threads, capacity_bytes=capacity_bytes)
        self._capacity = capacity_bytes
        self._blocks: dict[BlockKey, _Block] = {}
        self._held = 0  # bytes of blocks, and of those being copied
        self._recency = Recency(clock)

    def _present(self, keys: Sequence[BlockKey]) -> list[bool]:
        return [key in self._blocks for key in keys]

    def _use_chain(self, keys: Sequence[BlockKey]) -> None:
        with self._lock:  # times of blocks that are gone would be kept for ever
            there = [key for key in keys if key in self._blocks]
            if there:
                self._recency.use_chain(there)

    def _read(self, key: BlockKey, into: memoryview) -> Outcome:
        block = self._blocks.get(key)
        if block is None:
            return Outcome.MISS
        if len(block.payload) == len(into):
            np.copyto(np.frombuffer(into, np.uint8), block.payload)  # without the GIL, unlike slice assignment
            outcome = Outcome.OK if block.trailer.describes(key, into) else Outcome.CORRUPT
        else:
            outcome = Outcome.CORRUPT
        with self._lock:
            if self._blocks.get(key) is block:
                if outcome is Outcome.OK:
                    self._recency.use(key, block.trailer.parent)
                else:
                    self._remove(key)
        return outcome

    def _write(self, key: BlockKey, parent: BlockKey | None, payload: memoryview) -> Outcome:
        size = len(payload)
        if size > self._capacity:
            return Outcome.FULL
        with self._lock:
            if key in self._blocks:
                self._recency.use(key, parent)
                return Outcome.OK
            for _, victim in self._victims(size):
                self._remove(victim)
                self._stats.evictions += 1
            if self._held + size > self._capacity:  # the rest is being copied
                return Outcome.FULL
            self._held += size
        try:
            block = _Block(Trailer.of(key, parent, payload), np.array(np.frombuffer(payload, np.uint8)))
        except MemoryError:  # the machine has less than the capacity
            with self._lock:
                self._held -= size
            return Outcome.FULL
        with self._lock:
            if key in self._blocks:
                self._held -= size
            else:
                self._blocks[key] = block
                self._stats.writes += 1
                self._stats.written_bytes += size
            self._recency.use(key, parent)
        return Outcome.OK

    def _victims(self, wanted: int) -> list[tuple[int, BlockKey]]:
        blocks = ((self._recency.last(key), len(block.payload), key) for key, block in self._blocks.items())
        return victims(blocks, held=self._held, wanted=wanted, capacity=self._capacity)

    def _remove(self, key: BlockKey) -> None:
        self._held -= len(self._blocks.pop(key).payload)
        self._recency.forget(key)

    def stats(self) -> StoreStats:
        with self._lock:
            return dataclasses.replace(self._stats, blocks=len(self._blocks), bytes=self._held)

    def _check(self) -> None:
        with self._lock:
            for key, block in self._blocks.items():
                if block.trailer.key != key or block.trailer.payload_bytes != len(block.payload):
                    raise IntegrityError(f"block {key.hex()} has the record of another one")
            held = sum(len(block.payload) for block in self._blocks.values())
            if held != self._held or held > self._capacity:
                raise IntegrityError(f"{held} bytes of blocks, {self._held} accounted, capacity {self._capacity}")
            if len(self._recency) > len(self._blocks):
                raise IntegrityError(f"times of use of {len(self._recency)} blocks, {len(self._blocks)} there")
