"""The measurement of what counting costs compares steps of engines that do count, and only decode."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench import router_counting
from tests.engine.models import FIXTURES

MODEL = str(FIXTURES / "qwen3_moe")


def test_the_command_reports_ratios_of_steps_of_one_turn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.json"
    arguments = ["--model", MODEL, "--sequences", "2", "--steps", "5", "--json", str(path)]
    assert router_counting.main(arguments) == 0
    modes = json.loads(path.read_text())["modes"]
    assert list(modes) == ["off", "activations", "transitions"]
    assert modes["off"]["ratio"] == 1.0
    assert all(of_mode["step_ms"] > 0 for of_mode in modes.values())
    assert json.loads(path.read_text())["second_off_by_first"]["ratio"] > 0
    assert "ratio to off" in capsys.readouterr().out


@pytest.mark.parametrize("mode", router_counting.MODES)
def test_engines_only_decode_and_count_what_their_mode_says(mode: str) -> None:
    llm = router_counting._engine(MODEL, "auto", 2, 5, mode)
    runner, computed = llm._engine.runner, llm.stats().computed_prompt_tokens
    runner.take_router_counts()
    for _ in range(5):
        llm.step()
    assert llm.stats().computed_prompt_tokens == computed
    assert llm.stats().num_running == 2
    counts = runner.take_router_counts()
    assert (counts is None) == (mode == "off")
    if counts is not None:
        assert np.sum(counts.tokens) == 10
        assert (counts.transitions is None) == (mode == "activations")


def test_ratios_are_of_pairs() -> None:
    before = np.array([1.0, 10.0, 100.0])
    figures = router_counting._figures(before, 1.5 * before)
    assert figures["ratio"] == pytest.approx(1.5)
    assert figures["ratio_95"] == pytest.approx([1.5, 1.5])
