"""The trailer: its places in the page, as documented, and what is no trailer."""

from __future__ import annotations

import pytest
import xxhash

from jaxdual.kv.store.format import PAGE_BYTES, Trailer, padding_bytes, stored_bytes
from tests.kv.store.blocks import key

PAYLOAD = memoryview(b"payload" * 1000)


@pytest.mark.parametrize("parent", [None, key(2), key(2) + b"\7"])
@pytest.mark.parametrize("block", [key(1), key(1) + b"\7"])
def test_the_page_is_laid_out_as_documented(block: bytes, parent: bytes | None) -> None:
    trailer = Trailer.of(block, parent, PAYLOAD)
    page = trailer.pack()
    want = b"JDKVBLCK" + (1).to_bytes(4, "little") + len(block).to_bytes(2, "little")
    want += len(parent or b"").to_bytes(2, "little") + (7000).to_bytes(8, "little")
    want += xxhash.xxh3_128(bytes(PAYLOAD)).digest() + block.ljust(33, b"\0") + (parent or b"").ljust(33, b"\0")
    want = want.ljust(4080, b"\0")
    assert page == want + xxhash.xxh3_128(want).digest()
    assert len(page) == PAGE_BYTES
    assert Trailer.unpack(page) == Trailer.unpack(memoryview(page)) == trailer
    assert trailer.describes(block, PAYLOAD)
    assert not trailer.describes(key(3), PAYLOAD)
    assert not trailer.describes(block, PAYLOAD[:-1])
    assert not trailer.describes(block, memoryview(b"Payload" * 1000))


def test_any_changed_byte_makes_it_no_trailer() -> None:
    page = Trailer.of(key(1), key(2), PAYLOAD).pack()
    for place in range(PAGE_BYTES):
        assert Trailer.unpack(page[:place] + bytes([page[place] ^ 0x10]) + page[place + 1 :]) is None, place


def signed(page: bytes) -> bytes:
    return page[:4080] + xxhash.xxh3_128(page[:4080]).digest()


@pytest.mark.parametrize(("place", "value"), [(0, b"X"), (8, b"\2"), (12, b"\x1f"), (12, b"\x22")])
def test_other_formats_and_versions_are_no_trailers(place: int, value: bytes) -> None:
    page = Trailer.of(key(1), None, PAYLOAD).pack()
    assert Trailer.unpack(signed(page)) is not None
    assert Trailer.unpack(signed(page[:place] + value + page[place + 1 :])) is None
    assert Trailer.unpack(page[:-1]) is None
    assert Trailer.unpack(b"") is None
    assert Trailer.unpack(bytes(PAGE_BYTES)) is None


@pytest.mark.parametrize(
    ("payload", "padding", "stored"), [(1, 4095, 8192), (4096, 0, 8192), (4097, 4095, 12288), (65536, 0, 69632)]
)
def test_payloads_are_padded_to_pages(payload: int, padding: int, stored: int) -> None:
    assert padding_bytes(payload) == padding
    assert stored_bytes(payload) == stored
