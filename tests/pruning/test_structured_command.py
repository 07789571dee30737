"""The command of structured pruning: what it writes, what it refuses, and a run that was stopped."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import models
from jaxdual import LLM, SamplingParams
from jaxdual.model_folder import shipped_model
from jaxdual.pruning import __main__ as command
from jaxdual.pruning.job import sizes_of
from jaxdual.pruning.structured import run as structured
from tests.engine.models import folder

SMALL = shipped_model("small")
TEXT = Path(command.__file__).parent.parent / "engine" / "engine.py"


def call(out: Path, *flags: str, **changed: Any) -> int:
    options = {
        "model": SMALL, "method": "structured", "pattern": "0.5", "calibration": TEXT, "out": out,
        "sequences": 6, "length": 64,
    } | changed  # fmt: skip
    arguments = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return command.main([*arguments, *flags, "--no-progress"])


def test_even_widths_stay_in_the_family_and_the_report_says_what_went(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(tmp_path / "out", report=tmp_path / "report.json") == 0
    before, after = (models.load_config(place) for place in (SMALL, tmp_path / "out"))
    assert (before.family, before.intermediate_size) == ("qwen3", 384)
    assert after == dataclasses.replace(before, intermediate_size=192)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["family"] == "qwen3"
    whole, smaller = (models.load(place, dtype="float32") for place in (SMALL, tmp_path / "out"))
    for key, model in (("dense", whole), ("pruned", smaller)):
        assert report["perplexity"][key] > 1
        assert report[key] == sizes_of(model, "bfloat16")
    assert report["dense"]["parameters"] - report["pruned"]["parameters"] == 4 * 3 * 128 * 192
    for index, layer in enumerate(report["layers"]):
        assert layer.pop("error") > 0
        counts = {"kv_heads": [2, 2], "neurons": [192, 384], "experts": [0, 0]}
        assert layer == {"layer": index, "taken": "plain", "errors": {}} | counts
    weights = tmp_path / "out" / "model.safetensors"
    assert weights.stat().st_size < (SMALL / weights.name).stat().st_size - 2 * 4 * 3 * 128 * 190
    assert "parameters stay" in capsys.readouterr().out
    assert not (tmp_path / "out" / "README.md").exists()


@pytest.mark.usefixtures("shared_programs")
def test_uneven_widths_and_biases_are_served(tmp_path: Path) -> None:
    assert call(tmp_path / "out", "--shift", kv_groups=1, widths="error", pattern="0.4") == 0
    model = models.load(tmp_path / "out", dtype="float32")
    config = model.config
    assert config.family == "jaxdual_pruned"
    assert (config.o_bias, config.mlp_bias, config.qkv_bias, config.num_kv_heads, config.num_heads) == (
        True,
        True,
        False,
        1,
        2,
    )
    assert len(set(config.layer_intermediate_sizes)) > 1
    assert np.abs(model.layers[0].mlp.down.bias[...]).max() > 0
    rng = random.Random(4)
    prompts = [[rng.randrange(4000) for _ in range(length)] for length in (3, 20)]
    llm = LLM(tmp_path / "out", block_size=8, max_model_len=64, max_num_seqs=2, max_num_batched_tokens=16)
    greedy = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    for prompt, output in zip(
        prompts, llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy), strict=True
    ):
        tokens = output.outputs[0].token_ids
        row = np.zeros((1, 64), np.int32)
        row[0, : len(prompt) + len(tokens)] = [*prompt, *tokens]
        logits = np.asarray(model.logits(row))[0, len(prompt) - 1 :]
        for at, token in enumerate(tokens):
            assert logits[at].max() - logits[at, token] <= 1e-3


def test_a_run_that_was_stopped_goes_on_with_its_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags: dict[str, Any] = {"kv_groups": 1, "widths": "error"}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert call(whole, "--shift", **flags) == 0
    seen: list[int] = []
    prune = structured._prune

    def until_third(layer: Any, *rest: Any) -> Any:
        seen.append(0)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return prune(layer, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(structured, "_prune", until_third)
        assert call(stopped, "--shift", **flags) == 130
        assert "goes on with the layer" in capsys.readouterr().err
        assert call(stopped, **flags) == 2
        assert "other settings" in capsys.readouterr().err
        seen[:] = [0] * 100
        assert call(stopped, "--shift", **flags) == 0
        assert len(seen) == 100 + 2, "the first two layers were done"
    assert (whole / "model.safetensors").read_bytes() == (stopped / "model.safetensors").read_bytes()
    assert (whole / "config.json").read_text() == (stopped / "config.json").read_text()
    assert sorted(file.name for file in stopped.iterdir()) == sorted(file.name for file in whole.iterdir())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pattern": "2:4"}, "pattern '2:4' must be a share from 0 to below 1: structured pruning takes whole neurons"),
        ({"pattern": "0"}, "nothing goes"),
        ({"pattern": "0.99"}, "leaves 0 of the 384 neurons"),
        ({"kv_groups": 2}, "2 key-value heads of 2 can't go"),
        ({"sequences": 2}, "128 tokens of calibration text are too few to fit 192 inputs"),
        ({"si": "fold"}, "--si fold: with --method structured scales count in the choice alone"),
        (
            {"si": "score", "si_batch": 6},
            "6 windows of calibration text, of which 1 are held out",
        ),
        ({"si": "score", "pattern": "0", "kv_groups": 1}, "Sparsity Induction is of neurons that go"),
        ({"si": "score", "model": shipped_model("moe")}, "Sparsity Induction is of neurons that go"),
        ({"update": "dsnot"}, "--update dsnot is not of --method structured"),
        ({"model": folder("iha")}, "jaxdual_iha can't be pruned"),
        ({"method": "wanda", "kv_groups": 1}, "--kv-groups and --widths are of --method structured"),
    ],
)
def test_wrong_calls_end_before_the_work_starts(
    tmp_path: Path, changed: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(tmp_path / "out", **changed) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
