"""The measurement of dispatch, with a handful of engines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import dispatch
from jaxdual.scheduling.dispatch import DISPATCH_POLICIES

_SMALL = ["--engines", "4", "--decisions", "300", "--repeats", "2", "--prompt-tokens", "200"]


def test_every_policy_is_measured_in_every_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "dispatch.json"
    assert dispatch.main(["--json", str(target), *_SMALL]) == 0
    report = json.loads(target.read_text())
    assert tuple(report["by"]) == DISPATCH_POLICIES
    for states in report["by"].values():
        assert list(states) == ["calm", "uneven", "full"]
        for figures in states.values():
            assert 0 < figures["p50_us"] <= figures["p99_us"]
            assert figures["p99_over_goal"] == figures["p99_us"] / report["goal_us"] == figures["p99_us"] / 50
            assert sum(figures["rules"].values()) == 2 * 300
    # Each rule of Algorithm 1 is measured somewhere.
    rules = {state: set(figures["rules"]) for state, figures in report["by"]["gimbal"].items()}
    assert rules["calm"] == {"affinity", "round_robin"}
    assert "kv" in rules["uneven"]
    assert rules["full"] <= {"load", "round_robin"}
    assert "load" in rules["full"]
    assert list(report["prompt"]["by"]) == ["keys", "shares"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 3 * len(DISPATCH_POLICIES) + 1 + 3


@pytest.mark.parametrize("option", ["--engines", "--decisions", "--repeats", "--prompt-tokens"])
def test_wrong_options_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        dispatch.main([option, "0"])
    assert f"{option} 0 must be at least 1" in capsys.readouterr().err
