"""The measurement of both landings, once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import landing


@pytest.mark.slow
def test_both_ways_are_measured_at_every_count(tmp_path: Path) -> None:
    target = tmp_path / "landing.json"
    assert landing.main(["--json", str(target), "--repeats", "1"]) == 0
    report = json.loads(target.read_text())
    assert [*report["by_count"]] == ["1", "8", "64"]
    for found in report["by_count"].values():
        assert set(found["seconds"]) == {"memcpy", "scatter", "direct"}
        assert min(found["seconds"].values()) > 0
