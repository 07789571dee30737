"""Block store in a folder, on any POSIX file system, shared by any number of processes."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import mmap
import os
import threading
import time
from collections.abc import Callable, Sequence

from jaxdual.kv.keys import BlockKey
from jaxdual.kv.slots import IntegrityError
from jaxdual.kv.store.base import BlockStore, Outcome, StoreStats
from jaxdual.kv.store.direct_io import O_DIRECT, is_aligned, read_whole, write_whole
from jaxdual.kv.store.folder import BlockFolder
from jaxdual.kv.store.format import PAGE_BYTES, Trailer, padding_bytes, stored_bytes
from jaxdual.kv.store.recency import SECOND, Recency, victims

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_DIRECT = {errno.EINVAL, errno.EOPNOTSUPP}
_RESCAN_AFTER = 0.05  # of the capacity, written since the last scan
_RECORD_AFTER = 60 * SECOND  # a block's time is written to its file at most this often
_FORGET_ABOVE = 1 << 16  # times of use that are kept in memory before old ones are dropped


class FileStore(BlockStore):
    """One file a block. The folder is the truth, and there is no index: a block is there if its file is.

    A block is written to a temporary name and renamed, so that it is seen whole or not at all, also after the writer
    was killed. Nothing is flushed: after a loss of power a file may be torn, its checksum tells, and all that is lost
    is a cached block; waiting for the disk would cost every write for that.

    Files are read and written with O_DIRECT where possible: blocks are used rarely and by one reader, so that the page
    cache would be a copy for nothing. It takes a buffer that starts at a multiple of 4096 and is a multiple of 4096
    bytes long.

    Blocks are evicted when a write would pass the capacity, down to 95 % of it, oldest modification time first: the
    time of last use, to a minute for the uses of other processes. How much there is comes from a scan of the folder and
    this process's own writes; a new scan follows at the latest when 5 % of the capacity were written, so that several
    processes together pass the capacity by at most 5 % each. Scans and evictions run in the writer's thread. A full
    disk evicts nothing: the capacity is to be what the disk has room for.

    Attributes:
      why_buffered: why O_DIRECT is not used; None if it is, for buffers that allow it. The file system is asked with
        the first of them.

    Args:
      folder: made with mode 0700 if it does not exist; scanned before this returns.
      capacity_bytes: of all files, trailers included.
      direct: False never uses O_DIRECT.
      threads: reads under way at a time.
      write_threads: writes under way at a time.
      clock: nanoseconds since 1970; of all processes that share the folder.

    Raises:
      ValueError: the capacity holds no block, or the folder may be seen by others.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        capacity_bytes: int,
        *,
        direct: bool = True,
        threads: int = 8,
        write_threads: int = 4,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        if capacity_bytes < stored_bytes(1):
            raise ValueError(f"{capacity_bytes=} must be at least {stored_bytes(1)}, the smallest block's file")
        self._folder = BlockFolder(folder)
        super().__init__(read_threads=threads, write_threads=write_threads, capacity_bytes=capacity_bytes)
        self._capacity = capacity_bytes
        self._clock = clock
        self._recency = Recency(clock)
        self._recorded: dict[BlockKey, int] = {}  # times that this process wrote to files
        self._forget_above = _FORGET_ABOVE
        self._scratch = threading.local()
        self._scanning = threading.Lock()  # held by whoever scans and evicts
        self._held = self._blocks = 0  # by the last scan and own writes since
        self._reserved = 0  # bytes being written
        self._unscanned = self._unscanned_blocks = 0  # written since the last scan began
        self.why_buffered: str | None = None
        if not direct:
            self.why_buffered = "it was turned off"
        elif not O_DIRECT:
            self.why_buffered = "this operating system has none"
        with self._scanning:
            self._make_room(0)

    # Presence and times of use.

    def _present(self, keys: Sequence[BlockKey]) -> list[bool]:
        return [self._folder.has(key) for key in keys]

    def _use_chain(self, keys: Sequence[BlockKey]) -> None:
        due = [
            (key, used)
            for key, used in self._recency.use_chain(keys)
            if used - self._recorded.get(key, 0) >= _RECORD_AFTER
        ]
        if due:
            with contextlib.suppress(RuntimeError):  # closed meanwhile
                self._writers.submit(self._record_all, due)

    def _record_all(self, times: Sequence[tuple[BlockKey, int]]) -> None:
        for key, used in times:
            with contextlib.suppress(OSError):
                self._record(key, used, self._folder.block(key))

    def _use(self, key: BlockKey, parent: BlockKey | None, file: int | str) -> None:
        used = self._recency.use(key, parent)
        if used - self._recorded.get(key, 0) >= _RECORD_AFTER:
            with contextlib.suppress(OSError):  # removed meanwhile
                self._record(key, used, file)

    def _record(self, key: BlockKey, used: int, file: int | str) -> None:
        os.utime(file, ns=(used, used))
        with self._lock:
            self._recorded[key] = used
            if len(self._recency) <= self._forget_above:
                return
            # The files have all times but for the last minute's.
            old = self._clock() - _RECORD_AFTER
            self._recency.forget_before(old)
            self._recorded = {key: used for key, used in self._recorded.items() if used >= old}
            self._forget_above = max(_FORGET_ABOVE, 2 * len(self._recency))

    # Reading.

    def _read(self, key: BlockKey, into: memoryview) -> Outcome:
        try:
            trailer = self._direct_or_buffered(into, lambda flags: self._read_file(key, into, flags))
        except FileNotFoundError:
            return Outcome.MISS
        if trailer is not None and trailer.describes(key, into):
            return Outcome.OK
        size = self._folder.remove(key)
        if size:
            self._forget(key, size)
        return Outcome.CORRUPT

    def _read_file(self, key: BlockKey, into: memoryview, flags: int) -> Trailer | None:
        """Reads payload and trailer in one go; None if the file is not of that length or its trailer is broken."""
        descriptor = os.open(self._folder.block(key), os.O_RDONLY | os.O_CLOEXEC | flags)
        try:
            if os.fstat(descriptor).st_size != stored_bytes(len(into)):
                return None
            tail = self._tail(len(into))
            if not read_whole(descriptor, into, tail):
                return None  # truncated meanwhile
            trailer = Trailer.unpack(tail[-PAGE_BYTES:])
            if trailer is not None and trailer.key == key:
                self._use(key, trailer.parent, descriptor)
            return trailer
        finally:
            os.close(descriptor)

    # Writing.

    def _write(self, key: BlockKey, parent: BlockKey | None, payload: memoryview) -> Outcome:
        if self._folder.has(key):
            self._use(key, parent, self._folder.block(key))
            return Outcome.OK
        size = stored_bytes(len(payload))
        if not self._reserve(size):
            return Outcome.FULL
        stored = False
        try:
            self._direct_or_buffered(payload, lambda flags: self._write_file(key, parent, payload, flags))
            stored = True
        except OSError as error:
            if error.errno in _NO_ROOM:
                return Outcome.FULL
            raise
        finally:
            with self._lock:
                self._reserved -= size
                if stored:
                    self._held += size
                    self._blocks += 1
                    self._unscanned += size
                    self._unscanned_blocks += 1
                    self._stats.writes += 1
                    self._stats.written_bytes += len(payload)
        if self._unscanned >= _RESCAN_AFTER * self._capacity and self._scanning.acquire(blocking=False):
            try:
                self._make_room(0)
            finally:
                self._scanning.release()
        return Outcome.OK

    def _write_file(self, key: BlockKey, parent: BlockKey | None, payload: memoryview, flags: int) -> None:
        tail = self._tail(len(payload))
        tail[:-PAGE_BYTES] = bytes(len(tail) - PAGE_BYTES)
        tail[-PAGE_BYTES:] = Trailer.of(key, parent, payload).pack()
        descriptor, path = self._folder.create_temporary(key, flags)
        try:
            write_whole(descriptor, payload, tail)
            used = self._recency.use(key, parent)
            self._record(key, used, descriptor)
            os.rename(path, self._folder.block(key))
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(path)
            raise
        finally:
            os.close(descriptor)

    # Direct I/O.

    def _direct_or_buffered[Result](self, buffer: memoryview, run: Callable[[int], Result]) -> Result:
        """Calls `run` with the flags for `open`; once more without O_DIRECT if the file system refuses it after all."""
        if self.why_buffered is None and is_aligned(buffer):
            try:
                return run(O_DIRECT)
            except OSError as error:
                if error.errno not in _NOT_DIRECT:
                    raise
                self.why_buffered = f"the file system of {self._folder.path} refused it: {error.strerror}"
        return run(0)

    def _tail(self, payload_bytes: int) -> memoryview:
        """This thread's page-aligned memory for padding and trailer, which end at the end of a page."""
        if not hasattr(self._scratch, "pages"):
            self._scratch.pages = memoryview(mmap.mmap(-1, 2 * PAGE_BYTES))
        padding = padding_bytes(payload_bytes)
        # Without padding the trailer starts a page, which direct I/O needs.
        pages: memoryview = self._scratch.pages
        return pages[: padding + PAGE_BYTES]

    # Capacity.

    def _reserve(self, size: int) -> bool:
        """Makes room for a file of `size` bytes; False if there is none."""
        if size > self._capacity:
            return False
        with self._lock:
            if self._held + self._reserved + size <= self._capacity:
                self._reserved += size
                return True
        with self._scanning:
            self._make_room(size)
            with self._lock:
                if self._held + self._reserved + size > self._capacity:
                    return False  # taken by blocks that are being written
                self._reserved += size
                return True

    def _make_room(self, wanted: int) -> None:
        """Scans, and evicts what is too much for `wanted` bytes more. Runs with `_scanning` held."""
        with self._lock:
            self._unscanned = self._unscanned_blocks = 0
        found = self._folder.scan()
        with self._lock:
            # Files renamed during the scan may be in both: counted twice is better than not at all.
            self._held = sum(block.size for block in found) + self._unscanned
            self._blocks = len(found) + self._unscanned_blocks
            held, wanted = self._held, wanted + self._reserved
        blocks = ((max(block.used, self._recency.last(block.key)), block.size, block.key) for block in found)
        for size, key in victims(blocks, held=held, wanted=wanted, capacity=self._capacity):
            with contextlib.suppress(OSError):
                evicted = self._folder.remove(key) > 0  # or another process was faster
                self._forget(key, size)
                with self._lock:
                    self._stats.evictions += evicted

    def _forget(self, key: BlockKey, size: int) -> None:
        with self._lock:
            self._held = max(0, self._held - size)
            self._blocks = max(0, self._blocks - 1)
            self._recorded.pop(key, None)
        self._recency.forget(key)

    # What is there.

    def stats(self) -> StoreStats:
        with self._lock:
            return dataclasses.replace(self._stats, blocks=self._blocks, bytes=self._held)

    def _check(self) -> None:
        with self._scanning:
            self._make_room(0)
        for block in self._folder.scan():
            with contextlib.suppress(FileNotFoundError):
                trailer = self._trailer(block.key)
                if trailer is None or trailer.key != block.key or stored_bytes(trailer.payload_bytes) != block.size:
                    raise IntegrityError(f"{self._folder.block(block.key)} is not a whole block of its name")
        with self._lock:
            if self._reserved:
                raise IntegrityError(f"{self._reserved} bytes are reserved for writes, of which there are none")
            if self._held > self._capacity:
                raise IntegrityError(f"{self._held} bytes of blocks after an eviction, capacity {self._capacity}")

    def _trailer(self, key: BlockKey) -> Trailer | None:
        with open(self._folder.block(key), "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - PAGE_BYTES))
            return Trailer.unpack(file.read())
