"""`python -m bench.transport`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import transport


def test_every_way_is_measured_and_set_against_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_BYTES", 8 << 20)
    file = tmp_path / "transport.json"
    # Speed is no matter of tests: whether the goals are met is left to the measurement.
    assert transport.main(["--size", "1048576", "--size", "65536", "--repeats", "2", "--json", str(file)]) in (0, 1)
    report = json.loads(file.read_text())
    assert set(report["sizes"]) == {"1048576", "65536"}
    for by in report["sizes"].values():
        assert {"memcpy", "raw_socket", "shm", "tcp", "shm_4", "tcp_4"} <= set(by)
        assert all(one["gb_per_second"] > 0 and one["cpu_seconds_per_gib"] > 0 for one in by.values())
        ratio = by["memcpy"]["gb_per_second"] and by["shm"]["gb_per_second"] / by["memcpy"]["gb_per_second"]
        assert by["shm"]["of_memcpy"] == pytest.approx(ratio)
        assert "of_raw_socket" in by["tcp_4"]
    assert {goal["name"] for goal in report["goals"]} == {
        f"{way} at 1 MiB of {base}"
        for way, base in (("shm", "memcpy"), ("shm_4", "memcpy"), ("tcp", "raw_socket"), ("tcp_4", "raw_socket"))
    }
