"""`python -m bench.dysco`: figures are of pairs, and a run reports all kinds of steps and modes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench import dysco, dysco_agreement, dysco_steps
from bench.dysco_agreement import divergence, jaccard, same_until
from bench.dysco_cost import Sizes

SIZES = Sizes(
    layers=4, heads=2, kv_heads=1, head_dim=8, layer_weights=400, head_weights=100, weight_bytes=4, kv_bytes=4
)


@pytest.fixture
def few_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each mode is another program to compile."""
    modes = {mode: dysco_agreement.MODES[mode] for mode in ("exact", "tail_chunk", "static", "vanilla")}
    for module in (dysco, dysco_agreement):
        monkeypatch.setattr(module, "MODES", modes)
    monkeypatch.setattr(dysco_steps, "MODES", ("exact", "static"))
    monkeypatch.setattr(dysco, "_FIRST_TOKENS", {"vanilla": None, "exact": {}})


@pytest.mark.usefixtures("few_modes", "shared_programs")
def test_a_run_reports_steps_first_tokens_and_agreement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, page = tmp_path / "report.json", tmp_path / "tables.md"
    sizes = ["--context", "112", "--sequences", "2", "--turns", "2", "--first-tokens", "1"]
    amount = ["--prompts", "2", "--tokens", "6", "--top-k", "8", "--heads", "[[1, 0], [2, 3]]"]
    model = ["--model", "models/shipped/small"]
    assert dysco.main([*model, *sizes, *amount, "--json", str(file), "--markdown", str(page)]) == 0
    report = json.loads(file.read_text())
    (of_batch,) = report["steps"]
    assert of_batch["sequences"] == 2
    assert list(of_batch["arms"]) == [arm.name for arm in dysco_steps.arms_of(2)]
    assert all(arm["ms"] > 0 for arm in of_batch["arms"].values())
    assert of_batch["arms"]["exact"]["byte_ratio"] > 1
    assert list(of_batch["without_first_pass"]) == ["exact", "exact, 1 of 2"]
    assert report["first_token"]["vanilla"]["more_ms"][0] == 0
    assert list(report["agreement"]) == [mode for mode in dysco.MODES if mode != "exact"]
    vanilla = report["agreement"]["vanilla"]
    assert vanilla["divergence_by_vanilla"] == [1.0, 1.0, 1.0]
    assert vanilla["divergence"][0] > report["agreement"]["tail_chunk"]["divergence"][0] >= 0
    assert 0 <= report["agreement"]["static"]["jaccard"][0] < report["agreement"]["tail_chunk"]["jaccard"][0] <= 1
    assert "| exact, 1 of 2 |" in page.read_text()
    told = capsys.readouterr().out
    assert dysco.main(["--from-json", str(file)]) == 0
    assert capsys.readouterr().out == told


def test_ratios_are_of_pairs() -> None:
    vanilla = np.array([1.0, 10.0, 100.0])
    seconds = {arm.name: (0.5 if arm.peek_only else 2.0) * vanilla for arm in dysco_steps.arms_of(4)} | {
        "vanilla": vanilla
    }
    figures = dysco.step_figures(seconds, SIZES, 4, 20, last_layer=1, heads=2)
    assert figures["arms"]["exact"]["ratio"] == [2.0, 2.0, 2.0]
    assert figures["arms"]["exact"]["by_bytes"] == pytest.approx(2 / figures["arms"]["exact"]["byte_ratio"])
    assert figures["arms"]["lag"]["flop_ratio"] == 1
    assert figures["without_first_pass"]["exact, 2 of 4"] == [1.5, 1.5, 1.5]


def test_agreement_by_hand() -> None:
    assert same_until([1, 2, 3], [1, 2, 4]) == 2
    assert same_until([1, 2], [1, 2]) == 2
    assert jaccard([1, 2, 3], [2, 3, 4]) == 0.5
    assert jaccard([], []) == 1
    of, by = np.log([[0.5, 0.5], [0.25, 0.75]]), np.log([[0.25, 0.75], [0.25, 0.75]])
    np.testing.assert_allclose(divergence(of, by), [0.5 * np.log(2) + 0.5 * np.log(2 / 3), 0.0])
