"""Rates of network cards, kept by all processes that share one.

A rate is a token bucket in a small file that each process maps, so the cards of a whole cluster can be played on one
machine: its directory belongs to whoever starts the processes. Without a rate it only counts.
"""

from __future__ import annotations

import enum
import fcntl
import math
import mmap
import os
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from jaxdual.transport.base import TrafficClass

CHUNK_BYTES = 256 << 10  # charged at once, so that flows share

_STATE = struct.Struct("<8sddddd2Q")
_MAGIC = b"bucket 1"
_BURST_SECONDS = 0.02  # of a rate: a sleep that ends late by less loses nothing
_GRACE_SECONDS = 0.002  # that KV stays back after a wait of the model's
_LONGEST_SLEEP = 0.1


class Direction(enum.Enum):
    """Of bytes at a card, as seen from its host's memory."""

    READ = "read"  # memory is read: sent
    WRITE = "write"  # memory is written: received


@dataclass(slots=True)
class _State:
    magic: bytes
    rate: float  # bytes per second
    burst: float  # bytes
    tokens: float  # bytes; below 0 is debt
    at: float  # when `tokens` was true, on the monotonic clock, which all processes share
    model_until: float  # KV waits until then
    model_bytes: int
    kv_bytes: int

    def values(self) -> tuple[bytes, float, float, float, float, float, int, int]:
        return (
            self.magic,
            self.rate,
            self.burst,
            self.tokens,
            self.at,
            self.model_until,
            self.model_bytes,
            self.kv_bytes,
        )


class TokenBucket:
    """A rate that several processes keep together; `create` makes one, the constructor opens it.

    Bytes are let through while there are tokens, and may leave a debt that those after them wait for, so that no size
    starves. Waiters of one class take turns by chance. The model's traffic goes first: KV stays back while it waits.
    The state is changed under a lock of the file, which the kernel takes back from a process that is killed; one that
    is stopped within those microseconds holds up the others.

    Args:
      path: of the file.

    Raises:
      OSError: it is not there.
      ValueError: it is no bucket.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        # Locks belong to what `open` gives, so each object has its own, and threads of one take turns before.
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._threads = threading.Lock()
        try:
            if os.fstat(self._fd).st_size != _STATE.size:
                raise ValueError(f"{path} is not a token bucket")
            self._memory = mmap.mmap(self._fd, _STATE.size)
        except (OSError, ValueError):
            os.close(self._fd)
            raise
        if (state := self._load()).magic != _MAGIC:
            self.close()
            raise ValueError(f"{path} is not a token bucket")
        self.rate = state.rate if math.isfinite(state.rate) else None
        self.burst = state.burst

    @classmethod
    def create(cls, path: str | os.PathLike[str], rate: float | None = None, burst: float | None = None) -> TokenBucket:
        """Makes the file, or makes it anew.

        Args:
          path: of the file; on a memory file system it costs no disk.
          rate: bytes per second, or None to count only.
          burst: bytes that may pass at once after a pause; a fiftieth of a second's and at least a chunk if left out.

        Raises:
          ValueError: a rate or burst not above 0.
        """
        if rate is not None and not 0 < rate < math.inf:
            raise ValueError(f"{rate=} must be above 0")
        if burst is not None and not 0 < burst < math.inf:
            raise ValueError(f"{burst=} must be above 0")
        if burst is None:
            burst = max(CHUNK_BYTES, (rate or 0) * _BURST_SECONDS)
        state = _State(_MAGIC, rate or math.inf, burst, burst, time.monotonic(), 0.0, 0, 0)
        partial = Path(f"{os.fspath(path)}.{os.getpid()}.part")
        partial.write_bytes(_STATE.pack(*state.values()))
        partial.chmod(0o600)
        partial.replace(path)
        return cls(path)

    def try_acquire(self, nbytes: int, traffic: TrafficClass) -> bool:
        """Lets `nbytes` through if it need not wait."""
        return self._attempt(nbytes, traffic, waits=False) == 0

    def acquire(self, nbytes: int, traffic: TrafficClass, stop: threading.Event | None = None) -> bool:
        """Waits until `nbytes` may pass; False if `stop` was set first, and nothing was charged.

        Raises:
          ValueError: a negative number of bytes.
        """
        while (wait := self._attempt(nbytes, traffic, waits=True)) > 0:
            wait = min(wait, _LONGEST_SLEEP)
            if stop is None:
                time.sleep(wait)
            elif stop.wait(wait):
                return False
        return True

    def counters(self) -> dict[TrafficClass, int]:
        """Bytes that have passed since the bucket was made, by class."""
        with self._locked():
            state = self._load()
        return {TrafficClass.MODEL: state.model_bytes, TrafficClass.KV: state.kv_bytes}

    def close(self) -> None:
        """Lets go of the file, which stays. May be called again."""
        if self._fd >= 0:
            self._memory.close()
            os.close(self._fd)
            self._fd = -1

    def _attempt(self, nbytes: int, traffic: TrafficClass, *, waits: bool) -> float:
        """Charges the bytes and returns 0, or returns the seconds after which it is worth another try."""
        if nbytes < 0:
            raise ValueError(f"{nbytes=} must be at least 0")
        with self._locked():
            state = self._load()
            now = time.monotonic()
            wait = 0.0
            if math.isfinite(state.rate):
                state.tokens = min(state.burst, state.tokens + max(0.0, now - state.at) * state.rate)
                state.at = now
                if state.tokens <= 0:
                    wait = (1 - state.tokens) / state.rate
                if traffic is TrafficClass.KV:
                    wait = max(wait, state.model_until - now)
                elif wait and waits:
                    # Ends by itself, should this process be killed before it comes back.
                    state.model_until = now + min(wait, _LONGEST_SLEEP) + _GRACE_SECONDS
                state.tokens -= 0 if wait > 0 else nbytes
            if wait <= 0:
                if traffic is TrafficClass.MODEL:
                    state.model_bytes += nbytes
                else:
                    state.kv_bytes += nbytes
            _STATE.pack_into(self._memory, 0, *state.values())
            return max(0.0, wait)

    def _load(self) -> _State:
        return _State(*_STATE.unpack_from(self._memory))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._threads:
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._fd, fcntl.LOCK_UN)


class Nic:
    """A network card: a bucket for each direction. `create` makes one, the constructor opens it.

    Args:
      directory: where its files are.
      name: of the card.

    Raises:
      OSError: it is not there.
    """

    def __init__(self, directory: str | os.PathLike[str], name: str) -> None:
        self.name = name
        self.buckets = {direction: TokenBucket(_path(directory, name, direction)) for direction in Direction}

    @classmethod
    def create(
        cls,
        directory: str | os.PathLike[str],
        name: str,
        *,
        read_rate: float | None = None,
        write_rate: float | None = None,
    ) -> Nic:
        """Makes a card's files; rates in bytes per second, None to count only."""
        for direction, rate in ((Direction.READ, read_rate), (Direction.WRITE, write_rate)):
            TokenBucket.create(_path(directory, name, direction), rate).close()
        return cls(directory, name)

    def charge(
        self, direction: Direction, nbytes: int, traffic: TrafficClass, stop: threading.Event | None = None
    ) -> bool:
        """Waits until bytes may pass, a chunk at a time; False if `stop` was set first.

        For what passes a card without a transport, such as reads from a store.
        """
        bucket = self.buckets[direction]
        step = nbytes if bucket.rate is None else CHUNK_BYTES
        while nbytes > 0:
            part = min(step, nbytes)
            if not bucket.acquire(part, traffic, stop):
                return False
            nbytes -= part
        return True

    def limited(self, direction: Direction) -> bool:
        """Whether that direction has a rate."""
        return self.buckets[direction].rate is not None

    def counters(self) -> dict[Direction, dict[TrafficClass, int]]:
        """Bytes that have passed, by direction and class."""
        return {direction: bucket.counters() for direction, bucket in self.buckets.items()}

    def close(self) -> None:
        """Lets go of the files, which stay."""
        for bucket in self.buckets.values():
            bucket.close()


def _path(directory: str | os.PathLike[str], name: str, direction: Direction) -> Path:
    if not name or "/" in name or "\0" in name:
        raise ValueError(f"{name=} is no file name")
    return Path(directory) / f"{name}.{direction.value}"
