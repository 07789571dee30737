"""Processes that are killed while they write, and processes that share a folder."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

from jaxdual.kv.store import FileStore, Outcome
from tests.kv.store.blocks import get, keys

ROOT = Path(__file__).parents[3]


def writer(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.kv.store.writer", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_a_writer_killed_at_any_moment_leaves_whole_blocks_only(tmp_path: Path) -> None:
    folder, length, draw = tmp_path / "store", 1 << 19, random.Random(0)
    capacity, rounds, left, found = 24 * length, 0, 0, 0
    while rounds < 6 or (left < 2 and rounds < 60):
        rounds += 1
        process = writer(folder, capacity, length, 60, rounds)
        assert process.stdout is not None
        for _ in range(draw.randrange(1, 6)):
            assert process.stdout.readline(), "the writer ended by itself"
        time.sleep(draw.random() / 100)  # not to wait for anything: a moment of its own for each round
        until = time.monotonic() + 1.0
        while rounds % 2 and not any(folder.rglob("*.tmp")) and time.monotonic() < until:
            pass  # every other round in the middle of a write
        process.kill()
        process.wait()
        process.stdout.close()
        left += len(list(folder.rglob("*.tmp")))
        with FileStore(folder, capacity) as store:
            assert list(folder.rglob("*.tmp")) == []
            store.check_integrity()
            outcomes = [get(store, block, length) for block in keys(0, 60)]
            assert set(outcomes) <= {Outcome.OK, Outcome.MISS}
            files = [path for path in folder.rglob("*") if path.is_file()]
            assert outcomes.count(Outcome.OK) == len(files) == store.stats().blocks
            found += len(files)
    assert found > 20
    assert left >= 2, "no round was killed in the middle of a write"


def test_processes_write_and_evict_the_same_keys_at_the_same_time(tmp_path: Path) -> None:
    folder, length, number = tmp_path / "store", 65536, 3
    capacity = 40 * (length + 4096)
    processes = [writer(folder, capacity, length, 60, seed, 30) for seed in range(number)]
    evictions = 0
    for process in processes:
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output[-500:]
        evictions += int(output.partition("evictions=")[2].partition(",")[0])
    assert evictions > 100
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert held <= capacity * (1 + number * 0.05) + number * 4 * (length + 4096)  # blocks under way at the end
    with FileStore(folder, capacity) as store:
        store.check_integrity()
        outcomes = [get(store, block, length) for block in keys(0, 60)]
        assert set(outcomes) <= {Outcome.OK, Outcome.MISS}
        assert outcomes.count(Outcome.OK) == store.stats().blocks
        assert store.stats().blocks > 30
    assert list(folder.rglob("*.tmp")) == []
