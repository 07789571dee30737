"""What a block store is: Full Blocks under their keys, read and written in the background."""

from __future__ import annotations

import copy
import enum
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

from jaxdual.complaints import Complaints
from jaxdual.kv.keys import BlockKey

_complaints = Complaints(logging.getLogger(__name__))

KEY_BYTES = (32, 33)  # the digest of a hash chain, alone or with a byte that tells layer groups apart


class StoreClosedError(RuntimeError):
    """The store was asked something after `close()`."""


class Outcome(enum.Enum):
    """How a read or a write ended.

    OK: the block is in the caller's buffer, or in the store.
    MISS: there is no such block.
    CORRUPT: there was a block, but torn, altered, of another length or of another key; it was removed.
    FULL: there is no room for the block, now or ever.
    FAILED: the store could not be asked: an I/O error, or the store is closed.
    """

    OK = "ok"
    MISS = "miss"
    CORRUPT = "corrupt"
    FULL = "full"
    FAILED = "failed"


@dataclass(slots=True)
class StoreStats:
    """What a store holds and what this object has done with it.

    Attributes:
      blocks, bytes: held now, as far as this process knows; None where counting them would cost requests. Bytes are
        those that count against the capacity.
      capacity_bytes: None where nothing is evicted.
      reads, read_bytes: blocks that were read whole, and their payload.
      misses: reads of blocks that were not there.
      corrupt: reads of blocks that were removed for it.
      writes, written_bytes: blocks that were stored, and their payload; not those that were there already.
      refused: writes that ended FULL.
      evictions: blocks that this process removed to make room.
      failures: operations that ended FAILED.
    """

    blocks: int | None = 0
    bytes: int | None = 0
    capacity_bytes: int | None = None
    reads: int = 0
    read_bytes: int = 0
    misses: int = 0
    corrupt: int = 0
    writes: int = 0
    written_bytes: int = 0
    refused: int = 0
    evictions: int = 0
    failures: int = 0


class BlockStore(ABC):
    """Keeps Full Blocks under the keys of their hash chain.

    Who owns what:
      - The store is a cache. A block may vanish at any time (evicted here or by another process, removed by hand), so
        presence is a hint and only the outcome of a read tells. A stale, missing, corrupt or foreign block is a miss to
        the caller, never an exception.
      - Blocks are immutable: a key names one content for ever, so that writers of one key cannot disagree, and the
        store keeps whichever came first.
      - Buffers stay the caller's. From the call until the future is done, the store alone writes the buffer of a read,
        and nobody writes the payload of a write. Views are kept no longer.
      - A future is done from one of the store's threads, which also runs its callbacks; they must be short.

    A block that is hit, read or written counts as used. Stores with a capacity evict the least recently used block
    first, and of blocks used together in one chain the last ones first, since a block is of no use without its parents.

    Methods may be called from any thread. A store is also a context manager that closes itself.

    A subclass gives `_present`, `_read`, `_write` and `_check`, which raise `OSError` for what is to end as FAILED. Of
    the counters it keeps writes, written_bytes and evictions, and `stats` adds blocks and bytes; this class keeps the
    others.

    Args:
      read_threads, write_threads: how many reads and writes are under way at a time; they never wait for each other.
      capacity_bytes: reported in the statistics.
    """

    def __init__(self, *, read_threads: int, write_threads: int, capacity_bytes: int | None) -> None:
        if read_threads < 1 or write_threads < 1:
            raise ValueError(f"{read_threads=} and {write_threads=} must be at least 1")
        self._stats = StoreStats(capacity_bytes=capacity_bytes)
        self._lock = threading.Lock()  # of the counters, and of what a subclass keeps with them
        self._closed = False
        self._readers = ThreadPoolExecutor(read_threads, "block-read")
        self._writers = ThreadPoolExecutor(write_threads, "block-write")

    def hits(self, chains: Sequence[Sequence[BlockKey]]) -> list[int]:
        """How many leading blocks of each chain are there.

        One blocking call for many requests. It takes a chain's presence to be that of its last blocks and looks at
        about `2 log2(n)` of `n` keys: where an inner block is gone and later ones are still there, the count may reach
        beyond it, and that block shows up as a miss when it is read. The last block counted was seen.

        Counts as a use of the blocks. Changes nothing else, and may be called as often as one likes.

        Args:
          chains: keys of neighbouring blocks, parents first.

        Raises:
          StoreClosedError: after `close()`.
        """
        self._refuse_if_closed()
        counts = self._count_leading(chains)
        for chain, count in zip(chains, counts, strict=True):
            if count:
                self._use_chain(chain[:count])
        return counts

    def read(self, key: BlockKey, into: memoryview) -> Future[Outcome]:
        """Fills `into` with the payload of a block.

        OK only if the block is whole, belongs to `key`, is as long as `into` and matches its checksum. After any other
        outcome the contents of `into` are undefined. A block that is there but is none of that is removed.

        Args:
          into: writable and contiguous. A buffer that starts at a page of memory and is a multiple of 4096 bytes
            long is filled without a copy where the store can, and several times faster if it lies in huge pages:
            scattered small ones take a disk many more requests.

        Raises:
          ValueError: the key's or the buffer's form is wrong.
        """
        _check_key(key)
        buffer = _as_bytes(into)
        if buffer.readonly:
            raise ValueError("the buffer of a read must be writable")
        return self._submit(self._readers, self._run_read, key, buffer)

    def write(self, key: BlockKey, parent: BlockKey | None, payload: memoryview) -> Future[Outcome]:
        """Stores a block; OK at once if its key is there already, whatever is under it.

        FULL if there is no room for it; the store goes on as before. No other block is ever damaged by a write, and a
        block is seen by readers whole or not at all.

        Args:
          parent: key of the block before it; None for the first one of a chain.
          payload: contiguous; must not change until the future is done.

        Raises:
          ValueError: a key's or the payload's form is wrong.
        """
        _check_key(key)
        if parent is not None:
            _check_key(parent)
        return self._submit(self._writers, self._run_write, key, parent, _as_bytes(payload))

    def stats(self) -> StoreStats:
        """A copy of the counters; also after `close()`."""
        with self._lock:
            return copy.copy(self._stats)

    def check_integrity(self) -> None:
        """Looks at every block's record (not at its payload) and compares the accounting. Call it when nothing runs.

        Raises:
          IntegrityError: they contradict each other.
          StoreClosedError: after `close()`.
        """
        self._refuse_if_closed()
        self._check()

    def close(self) -> None:
        """Waits for all reads and writes asked for, then ends the threads. Later ones give FAILED."""
        self._closed = True
        self._readers.shutdown()
        self._writers.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What a store is made of.

    @abstractmethod
    def _present(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Whether each block is there; runs in the caller's thread."""

    @abstractmethod
    def _read(self, key: BlockKey, into: memoryview) -> Outcome:
        """Reads and verifies a block, removing it if CORRUPT."""

    @abstractmethod
    def _write(self, key: BlockKey, parent: BlockKey | None, payload: memoryview) -> Outcome:
        """Stores a block unless it is there."""

    @abstractmethod
    def _check(self) -> None:
        """See `check_integrity`."""

    def _use_chain(self, keys: Sequence[BlockKey]) -> None:  # noqa: B027 - not every store evicts
        """A chain was hit; must not wait for I/O."""

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise StoreClosedError("the block store is closed")

    def _submit[**P](
        self, pool: ThreadPoolExecutor, run: Callable[P, Outcome], *args: P.args, **options: P.kwargs
    ) -> Future[Outcome]:
        try:
            return pool.submit(run, *args, **options)
        except RuntimeError:  # the pool is shut down
            with self._lock:
                self._stats.failures += 1
            failed: Future[Outcome] = Future()
            failed.set_result(Outcome.FAILED)
            return failed

    def _run_read(self, key: BlockKey, into: memoryview) -> Outcome:
        try:
            outcome = self._read(key, into)
        except OSError as error:
            outcome = Outcome.FAILED
            _complaints.tell(f"the block store can't be read: {_reason(error)}")
        if outcome is Outcome.CORRUPT:
            _complaints.tell("a stored block was torn or altered, and is gone")
        with self._lock:
            stats = self._stats
            stats.reads += outcome is Outcome.OK
            stats.read_bytes += len(into) if outcome is Outcome.OK else 0
            stats.misses += outcome is Outcome.MISS
            stats.corrupt += outcome is Outcome.CORRUPT
            stats.failures += outcome is Outcome.FAILED
        return outcome

    def _run_write(self, key: BlockKey, parent: BlockKey | None, payload: memoryview) -> Outcome:
        try:
            outcome = self._write(key, parent, payload)
        except OSError as error:
            outcome = Outcome.FAILED
            _complaints.tell(f"a block can't be stored: {_reason(error)}")
        if outcome is Outcome.FULL:
            _complaints.tell("a block can't be stored: there is no room")
        with self._lock:
            self._stats.refused += outcome is Outcome.FULL
            self._stats.failures += outcome is Outcome.FAILED
        return outcome

    def _count_leading(self, chains: Sequence[Sequence[BlockKey]]) -> list[int]:
        """Gallops, then bisects, in all chains at once: one call of `_present` a round, no key asked for twice."""
        seen: dict[BlockKey, bool] = {}
        there = [0] * len(chains)  # the block before this number is there, or it is 0
        gone = [len(chain) + 1 for chain in chains]  # the block before this number is not there
        open_chains = [number for number, chain in enumerate(chains) if chain]
        while open_chains:
            probes = [min(2 * there[i] + 1, (there[i] + gone[i]) // 2) for i in open_chains]
            keys = {chains[i][probe - 1] for i, probe in zip(open_chains, probes, strict=True)}
            unknown = [key for key in keys if key not in seen]
            seen.update(zip(unknown, self._present(unknown), strict=True))
            for i, probe in zip(open_chains, probes, strict=True):
                (there if seen[chains[i][probe - 1]] else gone)[i] = probe
            open_chains = [i for i in open_chains if gone[i] - there[i] > 1]
        return there


def _check_key(key: BlockKey) -> None:
    if not isinstance(key, bytes) or len(key) not in KEY_BYTES:
        raise ValueError(f"{key=} must be {KEY_BYTES[0]} or {KEY_BYTES[1]} bytes")


def _as_bytes(view: memoryview) -> memoryview:
    if not view.c_contiguous:
        raise ValueError("the buffer of a block must be contiguous")
    if not view.nbytes:
        raise ValueError("the buffer of a block must hold at least 1 byte")
    return view.cast("B")


def _reason(error: OSError) -> str:
    """Without the name of the file or object, which is another one each time."""
    return error.strerror or type(error.__cause__ or error).__name__
