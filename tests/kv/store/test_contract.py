"""What every block store promises, asked of each of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxdual.kv.slots import IntegrityError
from jaxdual.kv.store import BlockStore, Outcome, StoreClosedError, open_store
from tests.kv.store.blocks import KINDS, Kind, aligned, content, get, key, keys, put, result

LENGTH = 16384
CAPACITY = 1 << 20
STORED = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "memory"], indirect=True)


@pytest.fixture
def store(kind: Kind) -> Iterator[BlockStore]:
    with kind.make() as store:
        yield store
        store.check_integrity()


@pytest.mark.parametrize("length", [1, 4095, 4096, 4097, 100_000, 1 << 20])
def test_a_block_is_read_as_it_was_written(store: BlockStore, length: int) -> None:
    assert put(store, key(1), length) is Outcome.OK
    assert put(store, key(2), length, parent=key(1)) is Outcome.OK
    assert get(store, key(1), length) is Outcome.OK
    assert get(store, key(2), length) is Outcome.OK


def test_keys_of_both_lengths_are_kept_apart(store: BlockStore) -> None:
    longer = key(1) + b"\0"
    assert put(store, key(1), LENGTH) is Outcome.OK
    assert get(store, longer, LENGTH) is Outcome.MISS
    assert put(store, longer, LENGTH, parent=key(2) + b"\0") is Outcome.OK
    assert get(store, longer, LENGTH) is Outcome.OK
    assert get(store, key(1), LENGTH) is Outcome.OK


@pytest.mark.parametrize("offset", [1, 64])
def test_buffers_may_lie_anywhere(store: BlockStore, offset: int) -> None:
    want = content(key(1), LENGTH)
    payload = aligned(LENGTH + 4096)[offset : offset + LENGTH]
    payload[:] = want
    assert result(store.write(key(1), None, payload.toreadonly())) is Outcome.OK
    room = aligned(LENGTH + 4096)
    assert result(store.read(key(1), room[offset : offset + LENGTH])) is Outcome.OK
    assert room[offset : offset + LENGTH] == want
    assert not any(room[:offset])
    assert not any(room[offset + LENGTH :])


def test_buffers_may_be_of_any_element_type(store: BlockStore) -> None:
    assert result(store.write(key(1), None, aligned(LENGTH, content(key(1), LENGTH)).cast("f"))) is Outcome.OK
    into = aligned(LENGTH)
    assert result(store.read(key(1), into.cast("d", (LENGTH // 16, 2)))) is Outcome.OK
    assert into == content(key(1), LENGTH)


def test_what_is_not_there_is_a_miss(store: BlockStore) -> None:
    assert get(store, key(1), LENGTH) is Outcome.MISS
    assert store.hits([[key(1)], []]) == [0, 0]
    assert store.hits([]) == []
    assert store.stats().misses == 1


def test_hits_counts_leading_blocks_of_many_chains(store: BlockStore) -> None:
    depths = [0, 1, 2, 3, 7, 8]
    chains = [keys(100 * number, 8) for number in range(len(depths))]
    for chain, depth in zip(chains, depths, strict=True):
        for parent, block in zip([None, *chain], chain[:depth], strict=False):
            assert put(store, block, 4096, parent) is Outcome.OK
    assert store.hits(chains) == depths
    assert store.hits([chain[:2] for chain in chains]) == [min(2, depth) for depth in depths]


def test_the_first_content_of_a_key_stays(store: BlockStore) -> None:
    assert put(store, key(1), LENGTH) is Outcome.OK
    assert result(store.write(key(1), None, aligned(LENGTH))) is Outcome.OK
    assert get(store, key(1), LENGTH) is Outcome.OK
    assert store.stats().writes == 1


def test_many_threads_read_and_write_the_same_keys(store: BlockStore) -> None:
    blocks = keys(0, 6)
    outcomes: list[Outcome] = []

    def work() -> None:
        for block in blocks:
            outcomes.append(put(store, block, LENGTH))
            outcomes.append(get(store, block, LENGTH))
            assert store.hits([[block]]) == [1]

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [Outcome.OK] * 48


def test_many_operations_may_be_under_way(store: BlockStore) -> None:
    blocks = keys(0, 40)
    payloads = [aligned(LENGTH, content(block, LENGTH)) for block in blocks]
    writes = [store.write(block, None, payload) for block, payload in zip(blocks, payloads, strict=True)]
    assert {result(write) for write in writes} == {Outcome.OK}
    buffers = [aligned(LENGTH) for _ in blocks]
    reads = [store.read(block, buffer) for block, buffer in zip(blocks, buffers, strict=True)]
    assert {result(read) for read in reads} == {Outcome.OK}
    assert buffers == payloads


@pytest.mark.parametrize("length", [4096, LENGTH - 4096, LENGTH - 1, LENGTH + 1, LENGTH + 4096])
def test_a_block_of_another_length_is_foreign_and_removed(store: BlockStore, length: int) -> None:
    assert put(store, key(1), LENGTH) is Outcome.OK
    assert get(store, key(1), length) is Outcome.CORRUPT
    assert get(store, key(1), LENGTH) is Outcome.MISS
    assert store.hits([[key(1)]]) == [0]
    assert store.stats().corrupt == 1


def test_counters_tell_what_happened(kind: Kind) -> None:
    with kind.make() as store:
        for block in keys(0, 3):
            put(store, block, 5000)
        put(store, key(0), 5000)
        get(store, key(1), 5000)
        get(store, key(9), 5000)
        get(store, key(2), 4000)
        stats = store.stats()
    assert (stats.writes, stats.written_bytes, stats.reads, stats.read_bytes) == (3, 15000, 1, 5000)
    assert (stats.misses, stats.corrupt, stats.refused, stats.evictions, stats.failures) == (1, 1, 0, 0, 0)
    sizes = {"memory": (2, 10_000), "file": (2, 2 * (8192 + 4096)), "object": (None, None)}
    assert (stats.blocks, stats.bytes) == sizes[kind.name]


def test_after_close_nothing_is_done_and_nothing_raised_but_plainly(kind: Kind) -> None:
    with kind.make() as store:
        blocks = keys(0, 8)
        writes = [store.write(block, None, aligned(LENGTH, content(block, LENGTH))) for block in blocks]
    assert all(write.done() for write in writes)
    assert {result(write) for write in writes} == {Outcome.OK}
    assert get(store, key(0), LENGTH) is Outcome.FAILED
    assert put(store, key(9), LENGTH) is Outcome.FAILED
    assert store.stats().failures == 2
    for call in (lambda: store.hits([[key(0)]]), store.check_integrity):
        with pytest.raises(StoreClosedError, match="closed"):
            call()
    store.close()


def test_wrong_calls_are_refused(store: BlockStore) -> None:
    for wrong in (b"", key(1)[:31], key(1) + b"ab", key(1).hex()):
        with pytest.raises(ValueError, match="32 or 33 bytes"):
            store.read(wrong, aligned(4096))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="32 or 33 bytes"):
            store.write(key(1), wrong, aligned(4096))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="writable"):
        store.read(key(1), memoryview(bytes(4096)))
    with pytest.raises(ValueError, match="contiguous"):
        store.read(key(1), aligned(4096)[::2])
    with pytest.raises(ValueError, match="at least 1 byte"):
        store.write(key(1), None, memoryview(b""))


@STORED
def test_blocks_outlive_the_store_object(kind: Kind) -> None:
    with kind.make() as store:
        put(store, key(1), LENGTH)
    with kind.make() as store:
        assert store.hits([[key(1)]]) == [1]
        assert get(store, key(1), LENGTH) is Outcome.OK


# Blocks that are altered behind the store's back.


def flipped(stored: bytes, place: int) -> bytes:
    return stored[:place] + bytes([stored[place] ^ 1]) + stored[place + 1 :]


END = LENGTH + 4096  # of the stored form: the payload, a trailer
DAMAGE = {
    **{f"payload {place}": lambda stored, place=place: flipped(stored, place) for place in (0, 777, LENGTH - 1)},
    **{
        f"trailer {place}": lambda stored, place=place: flipped(stored, LENGTH + place)
        for place in (0, 8, 12, 14, 16, 24, 40, 73, 200, 4079, 4080, 4095)
    },
    **{f"cut to {size}": lambda stored, size=size: stored[:size] for size in (0, 1, 4096, LENGTH, END - 1)},
    "longer": lambda stored: stored + bytes(4096),
    "zeros": lambda stored: bytes(END),
}


@STORED
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_block_is_a_miss_and_removed(kind: Kind, damage: str) -> None:
    assert kind.load is not None
    assert kind.save is not None
    with kind.make() as store:
        put(store, key(1), LENGTH, parent=key(0))
        put(store, key(2), LENGTH)
        stored = kind.load(key(1))
        assert stored is not None
        assert len(stored) == END
        kind.save(key(1), DAMAGE[damage](stored))
        if "payload" not in damage:
            with pytest.raises(IntegrityError, match=key(1).hex()):
                store.check_integrity()
        assert get(store, key(1), LENGTH) is Outcome.CORRUPT
        assert kind.load(key(1)) is None
        assert get(store, key(1), LENGTH) is Outcome.MISS
        assert get(store, key(2), LENGTH) is Outcome.OK
        store.check_integrity()
        assert put(store, key(1), LENGTH, parent=key(0)) is Outcome.OK
        assert get(store, key(1), LENGTH) is Outcome.OK


@STORED
def test_blocks_under_each_other_s_names_are_foreign(kind: Kind) -> None:
    assert kind.load is not None
    assert kind.save is not None
    with kind.make() as store:
        for number in (1, 2):
            put(store, key(number), LENGTH)
        first, second = kind.load(key(1)), kind.load(key(2))
        assert first is not None
        assert second is not None
        kind.save(key(1), second)
        kind.save(key(2), first)
        with pytest.raises(IntegrityError):
            store.check_integrity()
        assert [get(store, key(number), LENGTH) for number in (1, 2)] == [Outcome.CORRUPT] * 2
        assert [kind.load(key(number)) for number in (1, 2)] == [None, None]
        store.check_integrity()


# Settings.


@pytest.mark.parametrize("uri", ["", "memory:x", "file:", "file://", "gs://bucket/x", "s3://", "s3:bucket", "s3:///x"])
def test_an_unknown_place_is_refused_with_what_is_accepted(uri: str) -> None:
    with pytest.raises(ValueError, match="s3://BUCKET") as raised:
        open_store(uri, CAPACITY)
    assert repr(uri) in str(raised.value)


@pytest.mark.parametrize("uri", ["memory:", "file:store"])
def test_a_capacity_without_room_for_a_block_is_refused(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="capacity_bytes=0 must be at least"):
        open_store(uri, 0)


def test_a_setting_names_each_kind_of_store(
    tmp_path: Path, bucket: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for variable, value in {
        "AWS_ENDPOINT_URL": bucket["endpoint"],
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": bucket["region"],
        "AWS_ACCESS_KEY_ID": bucket["access_key_id"],
        "AWS_SECRET_ACCESS_KEY": bucket["secret_access_key"],
    }.items():
        monkeypatch.setenv(variable, value)
    places = [
        "memory:",
        "a/b",
        "memory",
        f"{tmp_path}/c",
        f"file:{tmp_path}/d",
        f"file://{tmp_path}/e",
        "file:f",
        "s3://blocks/g",
    ]
    for number, place in enumerate(places):
        with open_store(place, CAPACITY) as store:
            assert put(store, key(number), LENGTH) is Outcome.OK, place
            assert get(store, key(number), LENGTH) is Outcome.OK, place
            assert store.stats().capacity_bytes == (None if place.startswith("s3") else CAPACITY)
    for name in ("a/b", "memory", "c", "d", "e", "f"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o700
