"""Block files: direct I/O, a disk that is full or broken, what others do to the folder, and what is left alone."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxdual.kv.store import FileStore, Outcome
from jaxdual.kv.store.direct_io import O_DIRECT
from jaxdual.kv.store.folder import BlockFolder
from tests.kv.store.blocks import Clock, aligned, content, get, key, keys, put, result

LENGTH = 65536
CAPACITY = 64 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(folder: Path) -> Iterator[FileStore]:
    with FileStore(folder, CAPACITY) as store:
        yield store
        store.check_integrity()
        assert temporaries(folder) == []


def temporaries(folder: Path) -> list[Path]:
    return list(folder.rglob("*.tmp"))


def opened(monkeypatch: pytest.MonkeyPatch, refuse: int = 0) -> list[int]:
    """Flags of all block files opened from now on; those with a flag of `refuse` fail, as on tmpfs of older kernels."""
    flags_seen: list[int] = []
    system_open = os.open

    def spy(path: Any, flags: int, *args: Any, **options: Any) -> int:
        descriptor = system_open(path, flags & ~refuse, *args, **options)
        if len(Path(path).name) >= 64:
            flags_seen.append(flags)
        if flags & refuse:
            os.close(descriptor)  # the file is made nevertheless, if it is to be made
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
        return descriptor

    monkeypatch.setattr(os, "open", spy)
    return flags_seen


def needs_direct(folder: Path) -> None:
    probe = folder / "probe"
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_WRONLY | O_DIRECT, 0o600))
    except OSError as error:
        pytest.skip(f"no O_DIRECT on the file system of {folder}: {error}")
    finally:
        probe.unlink()


# Direct I/O.


def test_aligned_buffers_are_read_and_written_past_the_page_cache(
    store: FileStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_direct(folder)
    flags = opened(monkeypatch)
    assert put(store, key(1), LENGTH) is Outcome.OK
    assert get(store, key(1), LENGTH) is Outcome.OK
    assert len(flags) == 2
    assert all(flag & O_DIRECT for flag in flags)
    assert store.why_buffered is None


@pytest.mark.parametrize(("offset", "length"), [(512, LENGTH), (0, LENGTH - 512), (8, 1000)])
def test_other_buffers_go_through_the_page_cache_and_the_next_ones_not(
    store: FileStore, folder: Path, monkeypatch: pytest.MonkeyPatch, offset: int, length: int
) -> None:
    flags = opened(monkeypatch)
    payload = aligned(2 * LENGTH)[offset : offset + length]
    payload[:] = content(key(1), length)
    assert result(store.write(key(1), None, payload)) is Outcome.OK
    payload[:] = bytes(length)
    assert result(store.read(key(1), payload)) is Outcome.OK
    assert payload == content(key(1), length)
    assert [flag & O_DIRECT for flag in flags] == [0, 0]
    assert store.why_buffered is None
    assert put(store, key(2), LENGTH) is Outcome.OK
    assert flags[-1] & O_DIRECT


def test_a_file_system_without_direct_io_is_asked_once(
    store: FileStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = opened(monkeypatch, refuse=O_DIRECT)
    assert put(store, key(1), LENGTH) is Outcome.OK
    assert temporaries(folder) == []
    assert get(store, key(1), LENGTH) is Outcome.OK
    assert [bool(flag & O_DIRECT) for flag in flags] == [True, False, False]
    assert "refused it: Invalid argument" in str(store.why_buffered)


def test_direct_io_that_fails_only_when_used_is_given_up(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def strict(call: Callable[..., int]) -> Callable[..., int]:
        def run(descriptor: int, buffers: Any, offset: int) -> int:
            if fcntl.fcntl(descriptor, fcntl.F_GETFL) & O_DIRECT:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return call(descriptor, buffers, offset)

        return run

    monkeypatch.setattr(os, "preadv", strict(os.preadv))
    monkeypatch.setattr(os, "pwritev", strict(os.pwritev))
    assert put(store, key(1), LENGTH) is Outcome.OK
    assert get(store, key(1), LENGTH) is Outcome.OK
    assert "Invalid argument" in str(store.why_buffered)


def test_direct_io_can_be_turned_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = opened(monkeypatch)
    with FileStore(folder, CAPACITY, direct=False) as store:
        assert store.why_buffered == "it was turned off"
        put(store, key(1), LENGTH)
        assert get(store, key(1), LENGTH) is Outcome.OK
    assert not any(flag & O_DIRECT for flag in flags)


@pytest.mark.parametrize("step", [4096, 1000])
def test_interrupted_transfers_go_on_where_they_stopped(
    store: FileStore, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    def interrupted(call: Callable[..., int]) -> Callable[..., int]:
        def run(descriptor: int, buffers: list[memoryview], offset: int) -> int:
            first = buffers[0][: step if offset else 8192]
            return call(descriptor, [first], offset)

        return run

    monkeypatch.setattr(os, "preadv", interrupted(os.preadv))
    monkeypatch.setattr(os, "pwritev", interrupted(os.pwritev))
    assert put(store, key(1), LENGTH) is Outcome.OK
    assert get(store, key(1), LENGTH) is Outcome.OK
    assert store.why_buffered is None


# Full and broken disks.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m,mode=0700", "tmpfs", str(place)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no small file system can be mounted: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)  # also where a failed test left files open


def test_a_full_disk_refuses_blocks_and_the_store_goes_on(small_disk: Path) -> None:
    with FileStore(small_disk / "store", CAPACITY) as store:
        outcomes = [put(store, block, 256 << 10) for block in keys(0, 12)]
        assert outcomes.count(Outcome.OK) == 7
        assert outcomes.count(Outcome.FULL) == 5
        assert temporaries(small_disk) == []
        for block, outcome in zip(keys(0, 12), outcomes, strict=True):
            assert get(store, block, 256 << 10) is (Outcome.OK if outcome is Outcome.OK else Outcome.MISS)
        Path(store._folder.block(key(0))).unlink()
        assert put(store, key(20), 256 << 10) is Outcome.OK
        assert get(store, key(20), 256 << 10) is Outcome.OK
        assert (store.stats().refused, store.stats().failures, store.stats().evictions) == (5, 0, 0)
        store.check_integrity()


@pytest.mark.parametrize(
    ("number", "outcome"),
    [
        (errno.ENOSPC, Outcome.FULL),
        (errno.EDQUOT, Outcome.FULL),
        (errno.EFBIG, Outcome.FULL),
        (errno.EIO, Outcome.FAILED),
    ],
)
def test_a_write_that_breaks_off_leaves_nothing(
    store: FileStore, folder: Path, monkeypatch: pytest.MonkeyPatch, number: int, outcome: Outcome
) -> None:
    def breaking(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if offset:
            raise OSError(number, os.strerror(number))
        return os.write(descriptor, buffers[0][:4096])

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", breaking)
        assert put(store, key(1), LENGTH) is outcome
    assert [path for path in folder.rglob("*") if path.is_file()] == []
    assert get(store, key(1), LENGTH) is Outcome.MISS
    assert put(store, key(1), LENGTH) is Outcome.OK
    assert store.stats().bytes == LENGTH + 4096


def test_a_disk_that_cannot_be_read_fails_and_keeps_the_block(
    store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, key(1), LENGTH)

    def broken(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", broken)
        assert get(store, key(1), LENGTH) is Outcome.FAILED
    assert get(store, key(1), LENGTH) is Outcome.OK
    assert store.stats().failures == 1


def test_no_descriptor_is_left_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    with FileStore(folder, 4 * (LENGTH + 4096)) as store:
        for block in keys(0, 12):
            put(store, block, LENGTH)
            get(store, block, LENGTH)
            get(store, block, 4096)
            get(store, block, 4096)
        with monkeypatch.context() as patch:
            opened(patch, refuse=O_DIRECT)
            put(store, key(20), LENGTH)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", lambda *_: 0)
            assert put(store, key(21), LENGTH) is Outcome.FAILED
        (folder / key(20).hex()[:2] / f"{key(20).hex()}.{'0' * 16}.tmp").touch()
        store.check_integrity()
    assert sorted(os.listdir("/proc/self/fd")) == before


# What others do to the folder.


def test_files_may_vanish_at_any_time(store: FileStore, folder: Path) -> None:
    for block in keys(0, 4):
        put(store, block, LENGTH)
    Path(store._folder.block(key(0))).unlink()
    assert get(store, key(0), LENGTH) is Outcome.MISS
    subprocess.run(["rm", "-r", str(folder)], check=True)
    assert get(store, key(1), LENGTH) is Outcome.MISS
    assert store.hits([keys(0, 4)]) == [0]
    store.check_integrity()
    assert put(store, key(1), LENGTH) is Outcome.OK
    assert get(store, key(1), LENGTH) is Outcome.OK
    assert folder.stat().st_mode & 0o777 == 0o700


def test_only_files_named_like_blocks_are_counted_and_removed(folder: Path) -> None:
    clock = Clock()
    capacity = 10 * (LENGTH + 4096)
    name = key(1).hex()
    with FileStore(folder, capacity, clock=clock) as store:
        put(store, key(1), LENGTH)
    home = folder / name[:2]
    others = [
        folder / "README",
        folder / name,
        home / f"{name}.bak",
        home / name[:-1],
        home / f"{name}0",
        home / name.upper(),
        home / f"{name}.tmp",
        home / f"{name}.0123.tmp",
        folder / "zz" / name,
        folder / ("00" if name[:2] != "00" else "01") / name,
    ]
    for path in others:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(LENGTH))
        os.utime(path, (0, 0))
    link = home / (name[:-1] + ("0" if name[-1] != "0" else "1"))
    link.symlink_to(others[0])
    directory = home / (name[:-1] + ("2" if name[-1] != "2" else "3"))
    directory.mkdir()
    with FileStore(folder, capacity, clock=clock) as store:
        assert (store.stats().blocks, store.stats().bytes) == (1, LENGTH + 4096)
        for block in keys(2, 30):
            clock.pass_seconds(1)
            assert put(store, block, LENGTH) is Outcome.OK
        assert store.stats().evictions > 20
        assert get(store, key(1), LENGTH) is Outcome.MISS
        store.check_integrity()
    for path in others:
        assert path.stat().st_size == LENGTH
    assert link.is_symlink()
    assert directory.is_dir()


def test_the_folder_is_made_for_this_user_only(tmp_path: Path) -> None:
    with FileStore(tmp_path / "a" / "b", CAPACITY) as store:
        put(store, key(1), LENGTH)
    for path in (tmp_path / "a" / "b").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path
    (tmp_path / "open").mkdir()
    os.chmod(tmp_path / "open", 0o750)
    with pytest.raises(ValueError, match="mode 0750"):
        FileStore(tmp_path / "open", CAPACITY)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="not a folder"):
        FileStore(tmp_path / "file", CAPACITY)
    with pytest.raises(ValueError, match="capacity_bytes=8191 must be at least 8192"):
        FileStore(tmp_path / "c", 8191)
    assert not (tmp_path / "c").exists()


# Temporary files.


def test_temporary_files_stay_as_long_as_their_writer_holds_them(folder: Path) -> None:
    writing = BlockFolder(folder)
    descriptor, path = writing.create_temporary(key(1))
    assert writing.scan() == []
    assert os.path.exists(path)
    os.close(descriptor)
    with FileStore(folder, CAPACITY) as store:
        assert not os.path.exists(path)
        assert store.hits([[key(1)]]) == [0]


def test_a_writer_whose_new_file_is_taken_for_a_dead_one_s_makes_another(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scan comes exactly between creation and lock."""
    scanned: list[str] = []
    lock = fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        if not scanned and operation == fcntl.LOCK_EX:
            scanned.append("now")
            BlockFolder(folder).scan()
            assert temporaries(folder) == []
        lock(descriptor, operation)

    with FileStore(folder, CAPACITY) as store:
        monkeypatch.setattr(fcntl, "flock", late)
        assert put(store, key(1), LENGTH) is Outcome.OK
        assert get(store, key(1), LENGTH) is Outcome.OK
    assert scanned


def test_without_locks_temporary_files_go_when_they_are_old(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with FileStore(folder, CAPACITY) as store:
        assert put(store, key(1), LENGTH) is Outcome.OK
    for number, age in ((2, 0), (3, 7200)):
        descriptor, path = store._folder.create_temporary(key(number))
        os.utime(path, (time.time() - age,) * 2)
        os.close(descriptor)
    with FileStore(folder, CAPACITY):
        assert [path.name[:64] for path in temporaries(folder)] == [key(2).hex()]
