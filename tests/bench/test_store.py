"""The measurement of block stores, on a handful of small blocks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import store
from jaxdual.kv.store import FileStore


def test_every_depth_is_measured_and_reads_are_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store.shutil, "which", lambda _: None)
    target = tmp_path / "store.json"
    sizes = ["--block-bytes", "65536", "--mib", "1", "--depths", "2", "1", "--repeats", "2"]
    assert store.main(["--json", str(target), "--folder", str(tmp_path), *sizes]) == 0
    report = json.loads(target.read_text())
    assert (report["blocks"], report["block_bytes"], report["wrong"]) == (15, 65536, {})
    assert list(report["by"]) == [
        "write",
        *(f"read, depth {depth}, {pages} pages" for pages in ("small", "huge") for depth in (1, 2)),
    ]
    for found in report["by"].values():
        assert found["gb_per_s"] > 0
        assert found["of_fio"] is None
    assert "not installed" in report["fio"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_block_that_is_not_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store.shutil, "which", lambda _: None)
    write = FileStore._write_file

    def forget_one(self: FileStore, key: bytes, *rest: object) -> None:
        write(self, key, *rest)  # type: ignore[arg-type]
        if self.stats().writes == 3:
            self._folder.remove(key)

    monkeypatch.setattr(FileStore, "_write_file", forget_one)
    sizes = ["--block-bytes", "65536", "--mib", "1", "--depths", "1", "--repeats", "1"]
    assert store.main(["--json", str(tmp_path / "store.json"), "--folder", str(tmp_path), *sizes]) == 1
    assert json.loads((tmp_path / "store.json").read_text())["wrong"]["MISS"] >= 2


@pytest.mark.parametrize("wrong", [["--block-bytes", "5000"], ["--mib", "0"], ["--depths", "0"], ["--repeats", "0"]])
def test_wrong_options_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        store.main(wrong)
    assert f"{wrong[0]} {wrong[1]} must be" in capsys.readouterr().err
