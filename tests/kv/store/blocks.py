"""Keys and contents for tests: what belongs under a key follows from the key, by other means than the store's."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from jaxdual.kv.store import BlockStore, Outcome

KINDS = ("memory", "file", "buffered", "object")


def key(number: int) -> bytes:
    return hashlib.sha256(b"block %d" % number).digest()


def keys(start: int, count: int) -> list[bytes]:
    return [key(number) for number in range(start, start + count)]


def content(block: bytes, length: int) -> bytes:
    return hashlib.shake_128(block).digest(length)


def aligned(length: int, fill: bytes | None = None) -> memoryview:
    """Page-aligned memory."""
    view = memoryview(mmap.mmap(-1, length))
    if fill is not None:
        view[:] = fill
    return view


def result(future: Future[Outcome]) -> Outcome:
    return future.result(timeout=60)


def put(store: BlockStore, block: bytes, length: int, parent: bytes | None = None) -> Outcome:
    return result(store.write(block, parent, aligned(length, content(block, length))))


def get(store: BlockStore, block: bytes, length: int) -> Outcome:
    """Reads a block; what is OK is compared with what it must be."""
    into = aligned(length)
    outcome = result(store.read(block, into))
    if outcome is Outcome.OK:
        assert into == content(block, length)
    return outcome


class Clock:
    """Nanoseconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 1_700_000_000 * 10**9

    def __call__(self) -> int:
        return self.now

    def pass_seconds(self, seconds: float) -> None:
        self.now += int(seconds * 10**9)


@dataclass(frozen=True)
class Kind:
    """A kind of store under test.

    Attributes:
      make: opens a store on an empty place, the same one at each call, with the keyword arguments of its class.
      load, save: the stored bytes of a block, behind the store's back; None for a store that keeps none.
    """

    name: str
    make: Callable[..., BlockStore]
    load: Callable[[bytes], bytes | None] | None = None
    save: Callable[[bytes, bytes], Any] | None = None
