"""Speed of the file block store beside fio: cold reads of Full Blocks by queue depth, and writes.

`python -m bench.store --json FILE`. Blocks are written once a repeat, their pages dropped from the page cache, and read
through O_DIRECT into page-aligned slots, checksums verified. fio then reads the same files, whole, with O_DIRECT,
libaio and the same depth; both take turns, and figures are medians over the repeats. `of_fio` is the store's rate over
fio's, both in bytes of files. CPU seconds are those of the whole process, by GiB of files.

Reads are measured into memory of small and of huge pages: direct I/O of scattered small pages takes many more requests
to the disk, and chance decides how scattered they are. fio takes huge pages only from those set aside
(`echo 128 >/proc/sys/vm/nr_hugepages`). Without fio (Debian: `apt-get install fio`) the store is measured alone.
"""

from __future__ import annotations

import argparse
import functools
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

from bench.report import header, table, write_json
from jaxdual.kv.store import FileStore, Outcome
from jaxdual.kv.store.format import stored_bytes

_NO_FIO = "fio is not installed (Debian: apt-get install fio)"


class Rate(NamedTuple):
    """One measurement: bytes of files and CPU seconds, both a second and a GiB."""

    gb_per_s: float
    cpu_s_per_gib: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the measurements; returns the exit status: 1 if a block was not read as it was written."""
    options = _parse(arguments)
    report = header("bench.store")
    fio = shutil.which("fio")
    if fio is None:
        _say(_NO_FIO)
    count = max(options.depths[-1], options.mib * 2**20 // stored_bytes(options.block_bytes))
    report |= {
        "blocks": count,
        "block_bytes": options.block_bytes,
        "repeats": options.repeats,
        "fio": subprocess.run([fio, "--version"], capture_output=True, text=True).stdout.strip() if fio else _NO_FIO,
    }
    runs: dict[tuple[str, str], list[Rate]] = {}
    with tempfile.TemporaryDirectory(prefix="jaxdual-store-", dir=options.folder) as folder:
        blocks = Blocks(Path(folder), count, options.block_bytes)
        report["folder"] = _file_system(folder)
        for _ in range(options.repeats):
            for name, side, measure in _plan(blocks, fio, options.depths):
                runs.setdefault((name, side), []).append(measure())
        report |= {"why_buffered": blocks.why_buffered, "wrong": blocks.wrong}
    report["by"] = {name: _summary(runs, name) for name in dict.fromkeys(name for name, _ in runs)}
    report["runs"] = [{"name": name, "side": side, "rates": rates} for (name, side), rates in runs.items()]
    _say(f"{count} blocks of {options.block_bytes} bytes in {report['folder']}")
    head = ("", "GB/s", "CPU s/GiB", "fio GB/s", "fio CPU s/GiB", "of fio")
    _say(table(head, [(name, *found.values()) for name, found in report["by"].items()]))
    for trouble in filter(None, (blocks.wrong, blocks.why_buffered and f"not direct: {blocks.why_buffered}")):
        _say(str(trouble))
    write_json(options.json, report)
    return 1 if blocks.wrong else 0


def _plan(blocks: Blocks, fio: str | None, depths: Sequence[int]) -> Iterator[tuple[str, str, Callable[[], Rate]]]:
    """What a repeat measures, in order: name, side, measurement."""
    yield "write", "store", blocks.write
    if fio is not None:
        yield "write", "fio", functools.partial(blocks.write_by_fio, fio)
    for huge in (False, True):
        for depth in depths:
            name = f"read, depth {depth}, {'huge' if huge else 'small'} pages"
            if fio is not None and (not huge or _free_huge_bytes() >= 2 * depth * blocks.file_bytes):
                yield name, "fio", functools.partial(blocks.read_by_fio, fio, depth, huge=huge)
            yield name, "store", functools.partial(blocks.read, depth, huge=huge)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.store", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="where results go")
    parser.add_argument("--folder", help="on the file system to measure; default: that of temporary files")
    parser.add_argument("--block-bytes", type=int, default=4 << 20, help="payload, a multiple of 4096; default 4 MiB")
    parser.add_argument("--mib", type=int, default=512, help="of all blocks; default 512")
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 4, 16], help="default 1 4 16")
    parser.add_argument("--repeats", type=int, default=3, help="default 3")
    options = parser.parse_args(arguments)
    if options.block_bytes < 4096 or options.block_bytes % 4096:
        parser.error(f"--block-bytes {options.block_bytes} must be a multiple of 4096, at least 4096")
    for name in ("mib", "repeats"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)} must be at least 1")
    options.depths = sorted(set(options.depths))
    if options.depths[0] < 1:
        parser.error(f"--depths {options.depths[0]} must be at least 1")
    return options


class Blocks:
    """A store of random blocks in a folder, measured.

    Attributes:
      wrong: reads that did not end OK, by outcome.
      why_buffered: see `FileStore`.
    """

    def __init__(self, folder: Path, count: int, block_bytes: int) -> None:
        self.folder = folder
        self.place = folder / "store"
        self.count, self.block_bytes = count, block_bytes
        self.file_bytes = stored_bytes(block_bytes)
        self.keys = [os.urandom(32) for _ in range(count)]
        self.wrong: dict[str, int] = {}
        self.why_buffered: str | None = None

    def write(self, threads: int = 4) -> Rate:
        """Writes all blocks to an empty folder."""
        shutil.rmtree(self.place, ignore_errors=True)
        payloads = self._slots(2 * threads, huge=True)
        for payload in payloads:
            payload[:] = os.urandom(self.block_bytes)
        with self._open(write_threads=threads) as store:
            return self._timed(lambda key, payload: store.write(key, None, payload), payloads, store)

    def read(self, depth: int, *, huge: bool) -> Rate:
        """Reads all blocks, `depth` at a time."""
        self._drop_caches()
        # Twice as many slots as reads at a time: a thread that is done with one finds the next waiting.
        with self._open(threads=depth) as store:
            return self._timed(store.read, self._slots(2 * depth, huge=huge), store)

    def read_by_fio(self, fio: str, depth: int, *, huge: bool) -> Rate:
        self._drop_caches()
        memory = "--iomem=mmaphuge" if huge else "--iomem=malloc"
        return self._fio(fio, "read", depth, f"--opendir={self.place}", "--openfiles=256", memory)

    def write_by_fio(self, fio: str, depth: int = 4) -> Rate:
        place = self.folder / "fio"
        place.mkdir()
        try:
            made = (f"--nrfiles={self.count}", f"--filesize={self.file_bytes}", "--openfiles=256", "--fallocate=none")
            return self._fio(fio, "write", depth, f"--directory={place}", "--create_on_open=1", *made)
        finally:
            shutil.rmtree(place)

    def _open(self, **options: Any) -> FileStore:
        return FileStore(self.place, 2 * self.count * self.file_bytes, **options)

    def _slots(self, number: int, *, huge: bool) -> list[memoryview]:
        mapped = mmap.mmap(-1, number * self.block_bytes, flags=mmap.MAP_PRIVATE)
        mapped.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
        memory = memoryview(mapped)
        memory[:] = bytes(len(memory))
        return [memory[i * self.block_bytes :][: self.block_bytes] for i in range(number)]

    def _timed(
        self,
        start: Callable[[bytes, memoryview], Future[Outcome]],
        slots: Sequence[memoryview],
        store: FileStore,
    ) -> Rate:
        under_way: deque[Future[Outcome]] = deque()
        outcomes = []
        cpu, began = time.process_time(), time.perf_counter()
        for number, key in enumerate(self.keys):
            if len(under_way) == len(slots):
                outcomes.append(under_way.popleft().result())
            under_way.append(start(key, slots[number % len(slots)]))
        outcomes += [future.result() for future in under_way]
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        for outcome in outcomes:
            if outcome is not Outcome.OK:
                self.wrong[outcome.name] = self.wrong.get(outcome.name, 0) + 1
        self.why_buffered = self.why_buffered or store.why_buffered
        return self._rate(seconds, cpu)

    def _fio(self, fio: str, direction: str, depth: int, *which: str) -> Rate:
        command = [fio, "--name=blocks", f"--rw={direction}", f"--bs={self.file_bytes}", f"--iodepth={depth}", *which]
        command += ["--direct=1", "--ioengine=libaio", "--file_service_type=sequential", "--output-format=json"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.folder)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()}")
        (job,) = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]  # after what it says of the folder
        moved = job[direction]["io_bytes"]
        if moved != self.count * self.file_bytes:
            raise RuntimeError(f"fio moved {moved} bytes of {self.count * self.file_bytes}")
        cpu = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1000
        return self._rate(moved / job[direction]["bw_bytes"], cpu)

    def _rate(self, seconds: float, cpu: float) -> Rate:
        moved = self.count * self.file_bytes
        return Rate(moved / seconds / 1e9, cpu / (moved / 2**30))

    def _files(self) -> Iterator[Path]:
        return (path for path in self.place.rglob("*") if path.is_file())

    def _drop_caches(self) -> None:
        for path in self._files():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _summary(runs: Mapping[tuple[str, str], Sequence[Rate]], name: str) -> dict[str, float | None]:
    def middle(side: str, field: str) -> float | None:
        rates = runs.get((name, side))
        return statistics.median(getattr(rate, field) for rate in rates) if rates else None

    ours, theirs = middle("store", "gb_per_s"), middle("fio", "gb_per_s")
    return {
        "gb_per_s": ours,
        "cpu_s_per_gib": middle("store", "cpu_s_per_gib"),
        "fio_gb_per_s": theirs,
        "fio_cpu_s_per_gib": middle("fio", "cpu_s_per_gib"),
        "of_fio": ours / theirs if ours and theirs else None,
    }


def _free_huge_bytes() -> int:
    """Memory set aside for huge pages and not in use."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
    return int(fields.get("HugePages_Free", "0")) * int(fields.get("Hugepagesize", "0 kB").split()[0]) * 1024


def _file_system(folder: str) -> str:
    """Type and device of the file system that a folder is on."""
    best = ("", "unknown")
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        device, point, kind = line.split()[:3]
        if os.path.commonpath([point, os.path.realpath(folder)]) == point and len(point) >= len(best[0]):
            best = (point, f"{kind} on {device}")
    return best[1]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
