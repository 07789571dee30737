"""Whole models: what matrices are multiplied with, what a run leaves, and a run that was stopped."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import models
from jaxdual.model_folder import shipped_model
from jaxdual.pruning import __main__ as command
from jaxdual.pruning.layer import Plan
from jaxdual.pruning.linears import inputs_of, linears_of
from jaxdual.pruning.methods import METHODS, prune_matrix
from jaxdual.pruning.pattern import Pattern
from jaxdual.pruning.run import PrunedLayer, prune_model
from models.attention import dense_attend
from models.moe import MoE
from tests.engine.models import folder, load

TEXT = Path(command.__file__).parent.parent / "engine" / "engine.py"
LENGTH = 24


@pytest.mark.parametrize("name", ["qwen3", "llama", "qwen2", "mixtral", "qwen3_moe", "mistral_mixed"])
def test_matrices_and_their_inputs_make_up_the_layer(name: str) -> None:
    model = load(name)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 90, LENGTH))
    x, rope = model.embed(tokens), model.rope(jnp.arange(LENGTH))
    for index, layer in enumerate(model.layers):
        attend = partial(dense_attend(1, LENGTH, model.config.layer_windows), index)
        inputs = {group: (values, counts) for group, values, counts in inputs_of(layer, x, rope, attend)}
        linears = {one.name: one for one in linears_of(model.config, index)}
        assert {one.group for one in linears.values()} == set(inputs)

        def product(name: str, *, layer: Any = layer, inputs: Any = inputs, linears: Any = linears) -> np.ndarray:
            one = linears[name]
            return np.asarray(inputs[one.group][0] @ one.read(layer).T)

        bias = {part: getattr(layer.attention, part).bias for part in ("q", "o")}
        q = product("attention.q") + (0 if bias["q"] is None else bias["q"][...])
        np.testing.assert_allclose(q, layer.attention.q(layer.attention_norm(x)), atol=1e-4)
        between = np.asarray(x) + product("attention.o") + (0 if bias["o"] is None else bias["o"][...])
        after, _ = layer(x, rope, attend, None)
        if isinstance(layer.mlp, MoE):
            chosen, weights = (np.asarray(one) for one in layer.mlp.route(layer.mlp_norm(jnp.asarray(between))))
            out = between.copy()
            for expert in range(model.config.moe.num_experts):
                weight = np.where(chosen == expert, weights, 0).sum(1)
                counts = inputs[f"down.{expert}"][1]
                np.testing.assert_array_equal(np.asarray(counts) > 0, weight > 0)
                out += weight[:, None] * product(f"mlp.experts.down.{expert}")
        else:
            out = between + product("mlp.down")
        np.testing.assert_allclose(out, after, atol=1e-3)
        x = after


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "text"), [("qwen3", "2:4"), ("qwen3_moe", "0.5")])
def test_a_pruned_model_has_as_many_zeros_as_it_should_and_the_rest_of_its_weights(
    method: str, name: str, text: str
) -> None:
    model, before = models.load(folder(name), dtype="float32"), load(name)
    windows = np.random.default_rng(1).integers(0, 90, (3, LENGTH)).astype(np.int32)
    told: list[PrunedLayer] = []
    prune_model(model, windows, Plan(METHODS[method], Pattern.parse(text)), done=told.append)
    for index in range(model.config.num_layers):
        for one in linears_of(model.config, index):
            found, was = (np.asarray(one.read(kind.layers[index])) for kind in (model, before))
            zeros = int((found == 0).sum())
            assert zeros == Pattern.parse(text).removed(*found.shape, METHODS[method].scope)  # type: ignore[arg-type]
            if method != "sparsegpt":
                assert ((found == was) | (found == 0)).all()
            (report,) = [entry for entry in told[index].matrices if entry.name == one.name]
            assert (report.removed, report.weights) == (zeros, found.size)
            assert 0 < report.error < 1.5
    np.testing.assert_array_equal(model.embedding[...], before.embedding[...])
    np.testing.assert_array_equal(model.layers[0].mlp_norm.scale[...], before.layers[0].mlp_norm.scale[...])


def test_later_layers_are_looked_at_behind_pruned_ones() -> None:
    windows = np.random.default_rng(1).integers(0, 90, (2, LENGTH)).astype(np.int32)
    model = models.load(folder("qwen3"), dtype="float32")
    plan = Plan(METHODS["sparsegpt"], Pattern.parse("2:4"))
    prune_model(model, windows, plan)
    # What the second layer becomes behind a first one that was left as it is.
    other = models.load(folder("qwen3"), dtype="float32")
    prune_model(other, windows, plan, first=1)
    second = linears_of(model.config, 1)[0]
    assert not np.array_equal(second.read(model.layers[1]), second.read(other.layers[1]))


def call(out: Path, **changed: Any) -> int:
    options = {
        "model": shipped_model("small"), "method": "wanda", "pattern": "2:4", "calibration": TEXT, "out": out,
        "sequences": 3, "length": 64, "si": "none",
    } | changed  # fmt: skip
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return command.main([*arguments, "--no-progress"])


def test_the_command_writes_a_model_and_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert call(whole, report=tmp_path / "report.json") == 0
    layers: list[int] = []

    def until_third(matrix: Any, moments: Any, method: Any, pattern: Any, **rest: Any) -> Any:
        layers.append(0)
        if len(layers) == 16:  # in the third layer of seven matrices
            raise KeyboardInterrupt
        return prune_matrix(matrix, moments, method, pattern, **rest)

    with monkeypatch.context() as patched:
        patched.setattr("jaxdual.pruning.layer.prune_matrix", until_third)
        assert call(stopped) == 130
        assert "goes on with the layer" in capsys.readouterr().err
        for other in ({"pattern": "4:8"}, {"si": "score"}, {"update": "admm"}, {"method": "ria"}, {"sequences": 4}):
            assert call(stopped, **other) == 2
            assert "other settings" in capsys.readouterr().err
        layers[:] = [0] * 100
        assert call(stopped) == 0
        assert len(layers) == 100 + 2 * 7, "the first two layers were done"
    assert (whole / "model.safetensors").read_bytes() == (stopped / "model.safetensors").read_bytes()
    assert sorted(file.name for file in stopped.iterdir()) == sorted(file.name for file in whole.iterdir())
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["sparsity"] == 0.5
    assert report["perplexity"]["pruned"] > report["perplexity"]["dense"] > 1
    assert [len(layer["matrices"]) for layer in report["layers"]] == [7] * 4
    assert models.load(whole).config == models.load(shipped_model("small")).config


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pattern": "5:3"}, "pattern '5:3' must be"),
        ({"pattern": "0.5@64", "si": "score"}, "blocks are chosen by scores alone, without Sparsity Induction"),
        ({"pattern": "0.5@64", "method": "sparsegpt"}, "another method than sparsegpt"),
        ({"pattern": "0.5@64", "update": "dsnot"}, "another update than dsnot"),
        ({"pattern": "0.5@48"}, "no multiple of 48"),
        ({"si": "score", "si-rate": 0}, "rate is 0.0; it must be a positive number"),
        ({"si": "score", "si-batch": 3}, "3 windows of calibration text, of which 1 are held out"),
        ({"pattern": "2:48"}, "no multiple of 48"),
        ({"pattern": "0.001"}, "nothing of attention.q of layer 0 would go, which is 128 by 128"),
        ({"pattern": "0.3@64"}, "nothing of attention.q of layer 0 would go"),
        ({"si-rate": "nan"}, "rate is nan"),
        ({"sequences": 10_000}, "windows of 64 tokens; --sequences 10000 and 8 held out need 10008"),
        ({"length": 4096}, "--length 4096 must be at most 1024"),
        ({"calibration": "/nowhere"}, "cannot be read as UTF-8 text"),
        ({"model": "/nowhere"}, "/nowhere"),
    ],
)
def test_wrong_calls_end_before_the_work_starts(
    tmp_path: Path, changed: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(tmp_path / "out", **changed) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "other").write_text("")
    assert call(tmp_path) == 2
    assert "exists; a new or an empty folder" in capsys.readouterr().err


def test_a_run_stopped_while_the_model_is_written_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("jaxdual.pruning.job.copy_other_files", stop)
        assert call(tmp_path / "out") == 130
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert call(tmp_path / "out", report=tmp_path / "report.json") == 0
    assert len(json.loads((tmp_path / "report.json").read_text())["layers"]) == 4
    assert not (tmp_path / "out" / "unfinished").exists()
    assert models.load(tmp_path / "out").config.num_layers == 4


def test_a_model_with_weights_that_are_no_numbers_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(shipped_model("small"), tmp_path / "broken")
    model = models.load(tmp_path / "broken", dtype="float32")
    model.layers[1].mlp.up.kernel[...] = model.layers[1].mlp.up.kernel[...].at[0, 0].set(np.nan)
    models.save(model, tmp_path / "broken")
    assert call(tmp_path / "out", model=tmp_path / "broken") == 2
    assert "perplexity before pruning is nan" in capsys.readouterr().err


def test_models_whose_heads_are_mixed_are_refused() -> None:
    with pytest.raises(ValueError, match="jaxdual_iha can't be pruned"):
        linears_of(load("iha").config, 0)
