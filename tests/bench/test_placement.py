"""The measurement of the path scheduler, with a handful of engines."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from bench import placement
from jaxdual.kv.slots import IntegrityError
from jaxdual.scheduling.paths import PathScheduler

_SMALL = ["--engines", "24", "--live", "4", "--seconds", "0.1", "--repeats", "2"]


def test_all_requests_are_placed_told_and_finished(tmp_path: Path) -> None:
    target, cores = tmp_path / "placement.json", os.sched_getaffinity(0)
    assert placement.main(["--json", str(target), *_SMALL]) == 0
    assert os.sched_getaffinity(0) == cores
    report = json.loads(target.read_text())
    assert report["engines"] == {"prefill": 8, "decode": 16}
    assert (report["groups"], report["live_requests"], report["wrong"]) == (3, 64, [])
    assert list(report["by"]) == list(report["runs"]) == ["messages", "at_goal", "in_process"]
    for figures in report["by"].values():
        assert figures["placements_per_s"] > 0
        assert figures["cpu_us_per_placement"] > 0
        assert 0 < figures["fetch_ms_p50"] <= figures["fetch_ms_p99"]
    for name, requests in report["requests"].items():
        assert requests["submitted"] > 64, name
        assert requests["placed"] == requests["told"] == requests["finished"] == requests["submitted"]
        assert (requests["live_at_check"], requests["left"], requests["trouble"]) == (64, 0, None)
    assert report["goal"]["ratio"] == report["by"]["messages"]["placements_per_s"] / 1600


def test_wrong_counts_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: PathScheduler) -> None:
        raise IntegrityError("a count is wrong")

    monkeypatch.setattr(PathScheduler, "check_integrity", broken)  # in this process, not in the other one
    assert placement.main(["--json", str(tmp_path / "placement.json"), *_SMALL]) == 1
    assert json.loads((tmp_path / "placement.json").read_text())["wrong"] == ["in_process: a count is wrong"]


@pytest.mark.parametrize("wrong", [["--engines", "8"], ["--engines", "100"], ["--window", "0"], ["--per-fetch", "0"]])
def test_wrong_options_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        placement.main(wrong)
    assert f"{wrong[0]} {wrong[1]} must be" in capsys.readouterr().err
