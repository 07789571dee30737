"""Memory that several processes of one user share, gone with the last of them however they end."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from collections.abc import Buffer

import numpy as np

_HUGE = 2 << 20
_POPULATE_WRITE = 23  # of madvise(2), since Linux 5.14; the mmap module has no name for it
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class SharedSlab:
    """A mapped memory file (memfd): page-aligned, of fixed size, without a name, so that nothing is left after a kill.

    Other processes map it by a descriptor that they were given (`attach`), or by `path` while this process lives
    (`open`).

    Args:
      nbytes: rounded up to 2 MiB, so that the kernel may use huge pages.
      populate: take all pages from the kernel now, not when they are first touched.

    Raises:
      ValueError: no bytes.
      OSError: there is not that much memory.
    """

    def __init__(self, nbytes: int, *, populate: bool = False) -> None:
        if nbytes < 1:
            raise ValueError(f"{nbytes=} must be at least 1")
        fd = os.memfd_create("jaxdual-slab", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, -(-nbytes // _HUGE) * _HUGE)
            # A peer that could shrink the file would have every other process end with SIGBUS.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        except OSError:
            os.close(fd)
            raise
        self._map(fd)
        if populate:
            self._memory.madvise(_POPULATE_WRITE)

    @classmethod
    def attach(cls, fd: int) -> SharedSlab:
        """The slab behind a descriptor, which stays the caller's.

        Raises:
          ValueError: not a slab.
        """
        slab = cls.__new__(cls)
        slab._map(os.dup(fd))
        return slab

    @classmethod
    def open(cls, path: str) -> SharedSlab:
        """The slab of another process, by its `path`.

        Raises:
          OSError: that process is gone, or of another user.
          ValueError: not a slab.
        """
        slab = cls.__new__(cls)
        slab._map(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        return slab

    def _map(self, fd: int) -> None:
        try:
            self._memory = map_slab(fd, writable=True)
        except (OSError, ValueError):
            os.close(fd)
            raise
        self.fd = fd
        self.array = np.frombuffer(self._memory, np.uint8)
        self._start = self.array.ctypes.data

    @property
    def nbytes(self) -> int:
        return len(self._memory)

    @property
    def path(self) -> str:
        """By which processes of this user map it while this one lives."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    def view(self) -> memoryview:
        """All of it; slices of it are what is registered."""
        return memoryview(self._memory)

    def offset_of(self, buffer: Buffer) -> int | None:
        """Where in the slab a buffer begins, or None unless all of it lies here."""
        found = np.frombuffer(buffer, np.uint8)
        offset = int(found.ctypes.data) - self._start
        return offset if 0 <= offset <= self.nbytes - found.nbytes else None

    def close(self) -> None:
        """Unmaps it here; what others have mapped stays. May be called again.

        Raises:
          BufferError: a view of it is still in use.
        """
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self.array = np.empty(0, np.uint8)
        self._memory.close()


def map_slab(fd: int, *, writable: bool) -> mmap.mmap:
    """Maps a slab's memory file; the mapping outlives the descriptor.

    Raises:
      ValueError: a file whose size may change, which is no slab.
    """
    try:
        sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS
    except OSError:
        sealed = False
    if not sealed:
        raise ValueError("not a slab: the size of the file is not sealed")
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    memory = mmap.mmap(fd, os.fstat(fd).st_size, mmap.MAP_SHARED, protection)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
