"""The benchmark of cascades, on tiny models of random weights, and what its verdicts go by."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from bench.cascade import __main__ as bench
from bench.cascade.claims import FAILS, HOLDS, MET, MISSED, OPEN, claims, requirements
from tests.cascade.evaluation import quiz_models


@pytest.fixture(scope="module")
def call(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("bench")
    # Of equal sizes, so that both run the same programs.
    models = [quiz_models.write(root / name, seed=seed, num_layers=1) for seed, name in enumerate(("small", "large"))]
    few = ["--no-engines", "--asked", "400", "--short", "100", "--others", "20", "--epochs", "1", "--seeds", "2"]
    return ["--models", *map(str, models), *few, "--signals", str(root / "kept"), "--json", str(root / "found.json")]


@pytest.fixture(scope="module")
def report(call: list[str]) -> dict[str, Any]:
    assert bench.main([*call, "--picture", call[-1].replace(".json", ".png")]) == 0
    found: dict[str, Any] = json.loads(Path(call[-1]).read_text())
    return found


@pytest.mark.slow
def test_all_is_measured(call: list[str], report: dict[str, Any]) -> None:
    assert Path(call[-1].replace(".json", ".png")).stat().st_size > 10_000
    judged = report["multiple_choice"]
    assert judged["questions"] >= 40
    assert {"P(True)", "cascade routing", "margin", "P(IK)"} <= set(judged["curves"])
    assert set(judged["others"]) == {"none right", "unknown towns"}
    assert [one["seed"] for one in report["seeds"]] == [42, 43]
    assert set(report["variants"]) == {
        *("both", "both, Platt", "both, temperature", "P(T) alone", "P(IK) alone", "fusion"),
    }
    assert set(report["assumed_ratios"]) == {"2.7", "8.75"}
    assert set(report["states"]) == {"current", "outdated", "unheard"}
    assert sum(one["questions"] for one in report["states"].values()) == judged["questions"]
    assert report["short_answers"]["questions"] >= 10
    assert [row["tau_t"] for row in report["loose_thresholds"]] == [0.95, 0.9, 0.7, 0.5]
    assert len(report["taps"]) == 1
    assert "python -m bench.cascade" in report["command"]


@pytest.mark.slow
def test_kept_signals_give_the_same_figures(
    call: list[str], report: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("signals were kept")

    monkeypatch.setattr("bench.cascade.asked.collect", refuse)
    assert bench.main([*call, "--no-p-true"]) == 0
    again = json.loads(Path(call[-1]).read_text())
    del report["multiple_choice"]["curves"]["P(True)"]
    assert again["multiple_choice"]["curves"] == report["multiple_choice"]["curves"]
    assert again["seeds"] == report["seeds"]


def changed(report: dict[str, Any], value: float, low: float, high: float, *path: str) -> dict[str, Any]:
    other = copy.deepcopy(report)
    place = other
    for key in path:
        place = place[key]
    place |= {"value": value, "interval": [low, high]}
    return other


@pytest.mark.slow
def test_verdicts_go_by_figures_and_their_intervals(report: dict[str, Any]) -> None:
    chosen = ("multiple_choice", "chains", "chosen")

    def verdict(place: int, value: float, low: float, high: float, *path: str) -> str:
        return requirements(changed(report, value, low, high, *chosen, *path))[place].verdict

    assert verdict(0, -0.004, -0.008, 0.001, "difference") == MET
    assert verdict(0, -0.004, -0.012, 0.001, "difference") == OPEN
    assert verdict(0, -0.011, -0.015, 0.001, "difference") == MISSED
    assert verdict(1, 0.25, 0.21, 0.28, "saved") == MET
    assert verdict(1, 0.19, 0.15, 0.21, "saved") == MISSED
    assert verdict(2, 0.41, 0.39, 0.43, "saved_by_paper") == OPEN
    margin = ("at_equal_cost", "margin", "ahead")
    assert verdict(5, 0.02, 0.01, 0.03, *margin) == MET
    assert verdict(5, 0.0, 0.0, 0.0, *margin) == MISSED


@pytest.mark.slow
def test_claims_go_by_figures(report: dict[str, Any]) -> None:
    other = copy.deepcopy(report)
    loose = other["loose_thresholds"][-1]
    for name, points in (("p_ik 0.5", -1.1), ("p_ik 0.8", -0.5), ("without", -10.8)):
        loose[name]["pd_points"] = points
    assert claims(other)[2].verdict == HOLDS
    loose["without"]["pd_points"] = -1.2
    assert claims(other)[2].verdict == FAILS
