"""The stored form of a block, the same in a file and in an object.

The payload comes first, so that it is aligned for direct I/O, then zeros up to a multiple of 4096 bytes, then one page:

    offset  bytes
         0      8  magic "JDKVBLCK"
         8      4  version
        12      2  length of the key: 32 or 33
        14      2  length of the parent's key: 0 for the first block of a chain
        16      8  length of the payload
        24     16  xxh3-128 of the payload
        40     33  key
        73     33  key of the parent
       106   3974  zeros
      4080     16  xxh3-128 of the page so far

Integers are little-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Self

from xxhash import xxh3_128_digest

from jaxdual.kv.keys import BlockKey
from jaxdual.kv.store.base import KEY_BYTES

PAGE_BYTES = 4096
_MAGIC = b"JDKVBLCK"
_VERSION = 1
_FIELDS = struct.Struct("<8sIHHQ16s33s33s")
_SUM_BYTES = 16


def padding_bytes(payload_bytes: int) -> int:
    """Zeros between a payload and its trailer."""
    return -payload_bytes % PAGE_BYTES


def stored_bytes(payload_bytes: int) -> int:
    """Length of the stored form of a block."""
    return payload_bytes + padding_bytes(payload_bytes) + PAGE_BYTES


@dataclass(frozen=True, slots=True)
class Trailer:
    """What a stored block says of itself.

    Attributes:
      key, parent: of the block and of the one before it, or None.
      payload_bytes: its length.
      checksum: xxh3-128 of the payload.
    """

    key: BlockKey
    parent: BlockKey | None
    payload_bytes: int
    checksum: bytes

    @classmethod
    def of(cls, key: BlockKey, parent: BlockKey | None, payload: memoryview) -> Self:
        return cls(key, parent, len(payload), xxh3_128_digest(payload))

    def pack(self) -> bytes:
        """The trailer as a page."""
        parent = self.parent or b""
        fields = _FIELDS.pack(
            _MAGIC, _VERSION, len(self.key), len(parent), self.payload_bytes, self.checksum, self.key, parent
        )
        page = fields.ljust(PAGE_BYTES - _SUM_BYTES, b"\0")
        return page + xxh3_128_digest(page)

    @classmethod
    def unpack(cls, page: memoryview | bytes) -> Self | None:
        """The trailer that a page holds, or None if it is none, or not a whole one."""
        if len(page) != PAGE_BYTES or xxh3_128_digest(page[:-_SUM_BYTES]) != page[-_SUM_BYTES:]:
            return None
        magic, version, key_bytes, parent_bytes, payload_bytes, checksum, key, parent = _FIELDS.unpack_from(page)
        if magic != _MAGIC or version != _VERSION or key_bytes not in KEY_BYTES:
            return None
        return cls(key[:key_bytes], parent[:parent_bytes] or None, payload_bytes, checksum)

    def describes(self, key: BlockKey, payload: memoryview) -> bool:
        """Whether `payload` is whole and the block of `key`. Hashes the payload without holding the GIL."""
        return self.key == key and self.payload_bytes == len(payload) and self.checksum == xxh3_128_digest(payload)
