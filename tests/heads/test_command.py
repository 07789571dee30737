"""The command end to end: what it writes, and what it says of bad calls."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from jaxdual.decoding.dysco import DyscoModel, DyscoParams
from jaxdual.decoding.profiles import Limits, read_profile
from jaxdual.heads import __main__ as command
from jaxdual.model_folder import shipped_model
from models.fingerprint import model_fingerprint

RECORDED = Path(__file__).parents[1] / "fixtures" / "qrhead" / "llama_two_items"
CALL = ["detect", "--model", str(RECORDED), "--no-progress", "--dtype", "float32"]
ITEMS = [*CALL, "--items", str(RECORDED / "items.json")]
SMALL = ["detect", "--model", str(shipped_model("small")), "--count", "3", "--documents", "2"]


def test_recorded_items_give_the_recorded_heads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile, report = tmp_path / "heads.json", tmp_path / "scores.json"
    assert command.main([*ITEMS, "--top", "5", "--profile", str(profile), "--json", str(report)]) == 0
    with np.load(RECORDED / "expected.npz") as expected:
        ranking, scores = expected["head_ranking"][:5].tolist(), dict(expected)
    found = json.loads(report.read_text())
    np.testing.assert_allclose(found["scores"]["sum"], scores["head_score_sum"], atol=1e-6, rtol=0)
    np.testing.assert_allclose(found["scores"]["ndcg10"], scores["head_score_ndcg10"], atol=1e-6, rtol=0)
    assert [[one["layer"], one["head"]] for one in found["heads"]] == ranking
    fingerprint = model_fingerprint(RECORDED, "float32").hex()
    assert (found["fingerprint"], found["dtype"], found["rank_by"]) == (fingerprint, "float32", "sum")
    assert found["items"]["documents"] == {"min": 3, "max": 4}
    assert found["items"]["tokens"] == {"min": 441, "max": 483}
    out = capsys.readouterr().out
    assert "model  llama_two_items: 3 layers of 8 heads, all scored" in out
    rows = [line.split() for line in out.split("ndcg@10\n")[1].split("\n\n")[0].splitlines()]
    assert [[int(one) for one in row[1:3]] for row in rows] == ranking
    best = read_profile(str(profile))
    assert (best.models, best.num_layers, best.num_heads) == (("llama_two_items",), 3, 8)
    assert [list(head) for head in best.heads] == ranking
    assert (best.template_sequences, best.limits, best.fingerprint) == ((), (Limits(),), fingerprint)
    resolved = DyscoModel("any", 3, 8).resolved(DyscoParams(profile=str(profile)), 100, None)
    assert resolved.heads == best.heads


def test_heads_are_ranked_by_the_chosen_score_up_to_the_chosen_layer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "scores.json"
    call = [*ITEMS, "--rank-by", "ndcg10", "--max-layer", "1", "--top", "16", "--json", str(report)]
    assert command.main(call) == 0
    found = json.loads(report.read_text())
    assert np.shape(found["scores"]["sum"]) == (2, 8)
    assert {one["layer"] for one in found["heads"]} == {0, 1}
    order = [one["ndcg10"] for one in found["heads"]]
    assert order == sorted(order, reverse=True)
    assert found["stability"]["ndcg10"]["overlap"] == 16
    assert "the first 2 scored" in capsys.readouterr().out


def test_synthetic_items_are_of_the_seed_and_the_profile_has_the_template_s_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile, reports = tmp_path / "heads.json", [tmp_path / f"{number}.json" for number in range(3)]
    for report, seed in zip(reports, ("7", "7", "8"), strict=True):
        call = [*SMALL, "--seed", seed, "--top", "4", "--json", str(report), "--profile", str(profile)]
        assert command.main(call) == 0
    first, same, other = (json.loads(report.read_text()) for report in reports)
    assert first == same
    assert first["scores"] != other["scores"]
    assert first["items"].items() >= {"source": "synthetic", "seed": 7, "count": 3}.items()
    assert len(read_profile(str(profile)).template_sequences) == 4
    assert "3/3" in capsys.readouterr().err


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    picture = tmp_path / "heads.png"
    assert command.main([*ITEMS, "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ([*ITEMS, "--top", "25"], "--top 25 must be at most 24, the heads of all layers"),
        ([*ITEMS, "--top", "9", "--max-layer", "0"], "--top 9 must be at most 8"),
        ([*ITEMS, "--max-layer", "3"], "--max-layer 3 must be below 3, the model's layers"),
        ([*CALL, "--items", "none.json"], "none.json: can't be read"),
        ([*CALL, "--query-template", "who?", "--documents", "1"], "query template 'who?' must have {query} once"),
        ([*CALL, "--count", "1", "--documents", "99"], "item 'synthetic-0': its prompt has "),
        ([*CALL[:2], "/no/such/model"], "/no/such/model"),
        ([*ITEMS, "--profile", "/no/such/folder/heads.json"], "cannot be written"),
        ([*ITEMS, "--profile", "heads.txt"], "--profile heads.txt: its name must end with .json"),
        ([*ITEMS, "--json", "a.json", "--profile", "HERE/a.json"], "must be different files"),
        ([*ITEMS, "--json", str(RECORDED / "items.json")], "must be different files"),
    ],
)
def test_calls_that_can_t_work_are_refused_before_the_model_is_loaded(
    call: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "load", None)
    assert command.main([word.replace("HERE", str(tmp_path)) for word in call]) == 2
    assert message in capsys.readouterr().err


def test_pictures_of_no_known_kind_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    assert command.main([*ITEMS, "--plot", str(tmp_path / "heads.none")]) == 2
    assert "heads.none: its ending must be one of" in capsys.readouterr().err


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(RECORDED / name, tmp_path / name)
    assert command.main(["detect", "--model", str(tmp_path), "--count", "1"]) == 2
    assert "tokenizer.json: no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--items", "a.json", "--count", "3"], "--count is of synthetic items"),
        (["--items", "a.json", "--documents", "3"], "--documents is of synthetic items"),
        (["--documents", "3-2"], "'3-2' must be a number of at least 1, or two"),
        (["--documents", "0"], "'0' must be a number of at least 1, or two"),
        (["--count", "0"], "'0' must be a whole number of at least 1"),
        (["--seed", "-1"], "must be a whole number of at least 0"),
        (["--chat-template-kwargs", "[]"], "'[]' must be a JSON object"),
        (["--rank-by", "mass"], "invalid choice"),
    ],
)
def test_flags_that_can_t_be_used_end_the_program(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(["detect", *flags])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
