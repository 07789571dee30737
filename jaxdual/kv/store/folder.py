"""A folder of block files: names, temporary files of writers, and what a scan finds.

    ab/abcdef...            a block: the key in hexadecimal, in the folder of its first byte
    ab/abcdef....0123.tmp   a block being written, locked by its writer; 16 random hexadecimal digits

Anything else in the folder is somebody else's and is never touched.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from typing import NamedTuple

from jaxdual.kv.keys import BlockKey

_BLOCK = re.compile(r"[0-9a-f]{64}(?:[0-9a-f]{2})?")
_TEMPORARY = re.compile(rf"{_BLOCK.pattern}\.[0-9a-f]{{16}}\.tmp")
_FAN_OUT = re.compile(r"[0-9a-f]{2}")
_ABANDONED = 3600.0  # s without a write, where the file system knows no locks


class Found(NamedTuple):
    """A block file: time of last use in nanoseconds, bytes, key."""

    used: int
    size: int
    key: BlockKey


class BlockFolder:
    """The files of a file store. Any number of processes may use one folder; none keeps state about the others.

    Args:
      path: made, for this user only, if it does not exist.

    Raises:
      ValueError: it is not a folder, or others may look into it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.path.abspath(path)
        if os.path.exists(self.path):
            mode = os.stat(self.path).st_mode
            if not stat.S_ISDIR(mode):
                raise ValueError(f"{self.path} is not a folder")
            if mode & 0o077:
                # It may be somebody's /tmp, so its mode is not changed.
                raise ValueError(
                    f"{self.path} has mode {mode & 0o777:04o}; blocks hold what users wrote, so a block store takes "
                    f"only a folder of mode 0700, and makes it if it does not exist"
                )
        else:
            os.makedirs(self.path, mode=0o700)

    def block(self, key: BlockKey) -> str:
        """Path of a block's file."""
        name = key.hex()
        return f"{self.path}/{name[:2]}/{name}"

    def has(self, key: BlockKey) -> bool:
        return os.access(self.block(key), os.F_OK)

    def remove(self, key: BlockKey) -> int:
        """Removes a block; returns its bytes, or 0 if it was gone already."""
        path = self.block(key)
        try:
            size = os.lstat(path).st_size
            os.unlink(path)
        except FileNotFoundError:
            return 0
        return size

    def scan(self) -> list[Found]:
        """All blocks, in no order. Removes temporary files whose writers are dead."""
        found = []
        for entry in self._entries():
            if _BLOCK.fullmatch(entry.name):
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode):
                        found.append(Found(status.st_mtime_ns, status.st_size, bytes.fromhex(entry.name)))
            elif _TEMPORARY.fullmatch(entry.name):
                _remove_if_abandoned(entry.path)
        return found

    def _entries(self) -> Iterator[os.DirEntry[str]]:
        """Everything in the fan-out folders whose name begins as the folder's."""
        for folder in self._list(self.path):
            if _FAN_OUT.fullmatch(folder.name) and folder.is_dir(follow_symlinks=False):
                yield from (entry for entry in self._list(folder.path) if entry.name.startswith(folder.name))

    @staticmethod
    def _list(path: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(path) as entries:
                return list(entries)
        except FileNotFoundError:
            return []

    def create_temporary(self, key: BlockKey, flags: int = 0) -> tuple[int, str]:
        """A new file to write the block of `key` to, locked until it is closed.

        Args:
          flags: of `open`, besides those for writing a new file.

        Returns:
          Descriptor and path.
        """
        block = self.block(key)
        while True:
            path = f"{block}.{secrets.token_hex(8)}.tmp"
            descriptor = self._create(path, flags)
            # Waits only for a scan that is just looking whether the file has an owner. File systems without locks
            # leave it at the age of the file.
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:
                return descriptor, path
            os.close(descriptor)  # a scan came between creation and lock

    def _create(self, path: str, flags: int) -> int:
        flags |= os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            return os.open(path, flags, 0o600)
        except FileNotFoundError:
            os.makedirs(self.path, mode=0o700, exist_ok=True)  # it may have been removed
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            return self._create(path, flags)
        except OSError:
            # Where O_DIRECT is refused, the file has been made all the same.
            with contextlib.suppress(OSError):
                os.unlink(path)
            raise


def _remove_if_abandoned(path: str) -> None:
    """Removes a temporary file unless its writer holds the lock. A writer that is killed loses it at once."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
        except BlockingIOError:
            pass
        except OSError:
            if time.time() - os.fstat(descriptor).st_mtime > _ABANDONED:
                os.unlink(path)
        finally:
            os.close(descriptor)
