"""`python -m bench.pruning`: verdicts from runs, refreshes of scores, and calls that go on."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from bench.pruning import __main__ as command
from bench.pruning.claims import FAILS, HOLDS, NOISE, gain, tables, verdicts
from bench.pruning.pictures import draw
from bench.pruning.quality import INDUCED, PLAIN, Run, plans
from bench.pruning.refresh import refresh
from jaxdual.pruning.induction.settings import Induction
from jaxdual.pruning.moments import Moments
from tests.engine.models import folder

# Perplexities alone and with learned scales, by pruner; seeds are further apart than what the scales change.
LEVELS = {"magnitude": (40.0, 36.0), "wanda": (38.0, 37.0), "sparsegpt": (33.0, 33.0)}


def runs(noise: float = 0.0) -> list[Run]:
    draw = np.random.default_rng(0)
    found = []
    for seed in range(5):
        for pruner in PLAIN:
            alone, induced = LEVELS.get(pruner, (37.0, 0.0))
            of_seed = 1 + 0.1 * seed
            found.append(Run("2:4", pruner, False, seed, alone * of_seed, 1.0))
            if pruner in INDUCED:
                changed = induced * of_seed * (1 + noise * draw.normal())
                found.append(Run("2:4", pruner, True, seed, changed, 9.0, 0.1, 8))
    return found


def test_verdicts_are_paired_by_seed_and_say_what_the_interval_allows() -> None:
    found = {one.claim: one.verdict for one in verdicts(runs(noise=0.002), ["2:4"], refresh=19.9)}
    assert found == {
        "2:4: lower perplexity than magnitude alone": HOLDS,
        "2:4: lower perplexity than wanda alone": HOLDS,
        "2:4: lower perplexity than sparsegpt alone": NOISE,
        "2:4: magnitude gains most": HOLDS,
        "2:4: magnitude with it stays behind Wanda without (all of table 1)": FAILS,
        "a refresh of scores is 22.65 times faster (20 asked for)": FAILS,
    }
    worse = [replace(run, perplexity=run.perplexity * 1.2) if run.induced else run for run in runs(noise=0.002)]
    found = {one.claim: one.verdict for one in verdicts(worse, ["2:4"], refresh=30)}
    assert found["2:4: lower perplexity than wanda alone"] == FAILS
    assert found["a refresh of scores is 22.65 times faster (20 asked for)"] == HOLDS
    assert gain(runs(), "2:4", "magnitude").mean == pytest.approx(-10)
    text = tables(runs(), ["2:4"], 30.0)
    assert "none (dense)" in text
    assert "-10.00" in text


def test_all_ways_to_a_pattern_are_gone() -> None:
    found = [(name, plan.induction is not None) for name, plan in plans("4:8", Induction())]
    assert sorted(found) == sorted([(name, False) for name in PLAIN] + [(name, True) for name in INDUCED])


def test_a_refresh_is_measured_only_if_it_gives_the_scores_of_scaled_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = np.random.default_rng(0).integers(0, 90, (3, 16)).astype(np.int32)
    found = refresh(folder("qwen3"), windows, seconds=0.1)
    assert found["ratio"] > 0
    monkeypatch.setattr(Moments, "divided", lambda moments, scale: moments)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        refresh(folder("qwen3"), windows, seconds=0.1)


def test_a_stopped_call_goes_on_with_the_same_setting_only(tmp_path: Path) -> None:
    file, setting = tmp_path / "runs.json", {"seeds": 5, "patterns": ("2:4",)}
    file.write_text(json.dumps({"setting": setting, "runs": [asdict(run) for run in runs()]}))
    assert command._runs_of(str(file), setting) == runs()
    with pytest.raises(ValueError, match="another setting"):
        command._runs_of(str(file), setting | {"seeds": 4})
    with pytest.raises(ValueError, match="can't be read"):
        command._runs_of(None, setting)


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    draw(runs(), ["2:4"], 30.0, tmp_path / "pruning.png")
    assert (tmp_path / "pruning.png").stat().st_size > 1000


def test_it_takes_induction_to_compare(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--si", "none"]) == 2
    assert "the comparison is with Sparsity Induction" in capsys.readouterr().err
