"""The commands one after the other, on tiny models of random weights, and what they say of bad calls."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from jaxdual.cascade import __main__ as command
from jaxdual.cascade.config import read_cascade
from jaxdual.cascade.evaluation.commands import chain_of, gates_of
from jaxdual.cascade.evaluation.signals import read_signals
from jaxdual.cascade.probe import read_probe
from models.fingerprint import model_fingerprint
from models.training import quiz
from tests.cascade.evaluation import quiz_models


def write_items(path: Path, questions: list[quiz.Question]) -> Path:
    path.write_text("\n".join(json.dumps(one.record(number)) for number, one in enumerate(questions)))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models, their signals, a probe, and a cascade."""
    root = tmp_path_factory.mktemp("cascade")
    quiz_models.write(root / "small", seed=0, num_layers=2)
    quiz_models.write(root / "large", seed=1, num_layers=2, hidden_size=32)
    items = write_items(root / "items.jsonl", quiz.questions(7, 384))
    none = write_items(root / "none.jsonl", quiz.questions_without_answer(7, 40))
    for name in ("small", "large"):
        call = ["collect", "--model", str(root / name), "--no-progress", "--tap", "1"]
        asked = [*call, "--items", str(items), "--out", str(root / f"{name}.npz"), "--json", str(root / f"{name}.json")]
        assert command.main(asked) == 0
        others = ["--items", str(none), "--out", str(root / f"{name}-none.npz"), "--split", "test"]
        assert command.main([*call, *others]) == 0
    train = ["train", "--signals", str(root / "small.npz"), "--out", str(root / "small.safetensors"), "--no-progress"]
    assert command.main([*train, "--rate", "1e-3", "--epochs", "3", "--json", str(root / "train.json")]) == 0
    tiers = ["--tier", str(root / "small.npz"), str(root / "small.safetensors"), "--tier", str(root / "large.npz")]
    prices = ["--price", "0.1:0.2", "--price", "1:2"]
    out = ["--out", str(root / "cascade.toml"), "--json", str(root / "calibrate.json")]
    assert command.main(["calibrate", *tiers, *out, *prices, "--epsilon", "0.2", "--certainty", "0.5"]) == 0
    return root


def test_collected_signals_are_split_and_told_of(made: Path) -> None:
    report, signals = json.loads((made / "small.json").read_text()), read_signals(made / "small.npz")
    assert report["questions"]["test"] == (signals.splits == "test").sum() >= 40
    assert report["accuracy"] == signals.correct.mean()
    assert report["header"]["fingerprint"] == model_fingerprint(made / "small", "float32").hex()
    assert signals.header.sizes.tap == 1
    assert set(read_signals(made / "small-none.npz").splits) == {"test"}


def test_trained_probe_is_of_the_model(made: Path) -> None:
    probe, report = read_probe(made / "small.safetensors"), json.loads((made / "train.json").read_text())
    assert probe.fingerprint == model_fingerprint(made / "small", "float32").hex()
    assert (probe.tap, probe.num_layers) == (1, 2)
    assert len(report["epochs"]) == 3
    assert report["base_rate"]["train"] == pytest.approx(np.mean(read_signals(made / "small.npz").of("train").correct))
    assert 0 <= report["test"]["quality"]["auroc"] <= 1
    assert (made / "small.safetensors").stat().st_mode == (made / "train.json").stat().st_mode


def test_calibrated_cascade_is_one_that_the_server_reads(made: Path) -> None:
    config, report = read_cascade(made / "cascade.toml"), json.loads((made / "calibrate.json").read_text())
    small, large = config.tiers
    assert (small.name, large.name) == ("small", "large")
    assert Path(small.engine.model).resolve() == made / "small"
    assert Path(small.engine.probe).resolve() == made / "small.safetensors"
    gate = report["gates"][0]
    assert (small.tau_ik, small.tau_t) == (gate["tau_ik"], gate["tau_t"])
    assert (large.prices.input, large.prices.output) == (1, 2)
    assert config.confidence.letters == ("A", "B", "C", "D")


@pytest.mark.parametrize(
    ("rule", "calibration", "mode"),
    [
        ("fusion", "platt", "full"),
        ("p_t", "temperature", "choices"),
        ("p_ik", "none", "full"),
        ("both", "platt", "full"),
    ],
)
def test_the_file_decides_as_what_was_chosen(
    made: Path, tmp_path: Path, rule: str, calibration: str, mode: str
) -> None:
    tiers = ["--tier", str(made / "small.npz"), str(made / "small.safetensors"), "--tier", str(made / "large.npz")]
    file, told = tmp_path / "cascade.toml", tmp_path / "told.json"
    how = ["--rule", rule, "--calibration", calibration, "--mode", mode, "--budget", "0.9"]
    assert command.main(["calibrate", *tiers, "--out", str(file), "--json", str(told), *how]) == 0
    config, report = read_cascade(file), json.loads(told.read_text())
    chain = chain_of(config, [made / "small.npz", made / "large.npz"]).of("validation")
    ledger = chain.ledger(gates_of(config, chain))
    assert chain.answered(ledger.routes).mean() == pytest.approx(report["accuracy"]["value"])
    cost = ledger.flops().sum() / chain.alone(1).flops().sum()
    assert cost == pytest.approx(report["cost"]["value"]) == pytest.approx(min(cost, 0.9))


def test_evaluation_has_all_parts(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    signals = ["--signals", str(made / "small.npz"), str(made / "large.npz")]
    others = ["--other", "none right", str(made / "small-none.npz"), str(made / "large-none.npz")]
    call = ["evaluate", "--cascade", str(made / "cascade.toml"), *signals, *others]
    assert command.main([*call, "--json", str(tmp_path / "evaluate.json")]) == 0
    report = json.loads((tmp_path / "evaluate.json").read_text())
    tested = read_signals(made / "small.npz").of("test")
    assert report["questions"] == len(tested)
    assert report["tiers"][0]["accuracy"] == pytest.approx(tested.correct.mean())
    assert {"chosen", "paper", "chosen without P(IK)", "paper without P(T)"} <= set(report["chains"])
    for chain in report["chains"].values():
        assert {"random model", "random gate", "P(T)", "P(IK)", "margin", "entropy", "cascade routing"} <= set(
            chain["at_equal_cost"]
        )
        assert set(chain["mcnemar"]) >= {"exact_p", "corrected_p"}
    paper = report["chains"]["paper"]["gates"][0]
    assert (paper["tau_ik"], paper["tau_t"], paper["platt_t"]) == (0.5, 0.9, None)
    assert report["others"]["none right"]["chosen"]["accuracy"] == 0
    assert len(report["sweep"]) == 11
    out = capsys.readouterr().out
    assert "oracle" in out
    assert "chosen beside margin" in out
    assert "none right" in out


def test_only_cascades_of_gates_are_evaluated(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = made / "hops.toml"
    file.write_text("max_hops = 0\n" + (made / "cascade.toml").read_text())
    signals = ["--signals", str(made / "small.npz"), str(made / "large.npz")]
    assert command.main(["evaluate", "--cascade", str(file), *signals]) == 2
    assert "max_hops=0 keeps questions from the last tier" in capsys.readouterr().err


def test_signals_of_another_model_or_other_letters_are_refused(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["evaluate", "--cascade", str(made / "cascade.toml"), "--signals"]
    assert command.main([*call, *(2 * [str(made / "small.npz")])]) == 2
    assert "has signals of" in capsys.readouterr().err
    file = made / "letters.toml"
    text = (made / "cascade.toml").read_text()
    file.write_text(text.replace('["A", "B", "C", "D"]', '["A", "B", "C"]'))
    assert file.read_text() != text
    call[2] = str(file)
    assert command.main([*call, str(made / "small.npz"), str(made / "large.npz")]) == 2
    assert "of other letters" in capsys.readouterr().err


@pytest.mark.slow
def test_engines_decide_and_compute_as_the_ledger_says(made: Path, tmp_path: Path) -> None:
    file = tmp_path / "cascade.toml"
    text = (made / "cascade.toml").read_text()
    # Thresholds in the middle of the scores, so that there are questions of every outcome.
    test = read_signals(made / "small.npz").of("test")
    chain = chain_of(read_cascade(made / "cascade.toml"), [made / "small.npz", made / "large.npz"]).of("test")
    for key, scores in (("tau_ik", chain.tiers[0].p_ik), ("tau_t", chain.tiers[0].p_t())):
        low, high = np.sort(scores)[len(test) // 3 : len(test) // 3 + 2]
        text = re.sub(rf"{key} = .*", f"{key} = {(low + high) / 2}", text)
    engine = "engine = { max_model_len = 64, max_num_seqs = 8, max_num_batched_tokens = 128 }\n"
    text = text.replace("[[tier]]\n", f"[[tier]]\n{engine}")
    file.write_text(text.replace('"small', f'"{made}/small').replace('"large', f'"{made}/large'))
    call = ["evaluate", "--cascade", str(file), "--signals", str(made / "small.npz"), str(made / "large.npz")]
    assert command.main([*call, "--engines", "--json", str(tmp_path / "evaluate.json")]) == 0
    engines = json.loads((tmp_path / "evaluate.json").read_text())["engines"]
    assert engines["equal"]
    assert engines["other_tier"] == 0
    small, large = engines["tiers"]
    assert 0 < small["answered"] < small["questions"] == len(test)
    assert 0 < small["engine"]["upper"] < small["engine"]["lower"] == test.prompt_tokens.sum()
    assert large["questions"] == large["answered"] == len(test) - small["answered"]
    assert max(small["off_by"].values()) < 1e-4


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (["train", "--signals", "{made}/none.npz", "--out", "{tmp}/p.safetensors"], "can't be read as signals"),
        (["train", "--signals", "{made}/small-none.npz", "--out", "{tmp}/p.safetensors"], "have no train questions"),
        (["collect", "--model", "{made}/small", "--items", "{made}/no.jsonl", "--out", "{tmp}/s.npz"], "can't be read"),
        (
            [
                "collect",
                "--model",
                "{made}/small",
                "--items",
                "{made}/none.jsonl",
                "--out",
                "{tmp}/s.npz",
                "--tap",
                "9",
            ],
            "tap=9 must be 1 to 2",
        ),
        (["calibrate", "--tier", "{made}/small.npz", "--out", "{tmp}/c.toml"], "1 tiers; a chain has at least 2"),
        (["calibrate", "--tier", "{made}/small.npz", "--out", "{tmp}/c.json"], "must end with .toml"),
        (
            ["calibrate", "--tier", "{made}/large.npz", "--tier", "{made}/small.npz", "--out", "{tmp}/c.toml"],
            "tiers go from the smallest to the largest",
        ),
        (
            [
                *("calibrate", "--tier", "{made}/large.npz", "{made}/small.safetensors"),
                *("--tier", "{made}/small.npz", "--out", "{tmp}/c.toml"),
            ],
            "the probe is of small",
        ),
        (
            [
                *("calibrate", "--tier", "{made}/small.npz", "--tier", "{made}/large.npz", "{made}/small.safetensors"),
                *("--out", "{tmp}/c.toml"),
            ],
            "of the last tier signals alone",
        ),
        (
            [
                *("calibrate", "--tier", "{made}/small.npz", "--tier", "{made}/large.npz", "--out", "{tmp}/c.toml"),
                *("--rule", "fusion"),
            ],
            "needs a probe",
        ),
        (["evaluate", "--cascade", "{made}/cascade.toml", "--signals", "{made}/small.npz"], "1 files of signals for 2"),
    ],
)
def test_bad_calls_are_told(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], call: list[str], told: str
) -> None:
    assert command.main([part.format(made=made, tmp=tmp_path) for part in call]) == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
