"""Trained models that get Interleaved Head Attention: which starts compute what the source does, and the command."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import models
from models.config import IHAConfig
from models.upcycle import SELECTS, is_exact, main, stay_copies, upcycled

HF = Path(__file__).parent.parent / "fixtures" / "hf"
QWEN3, LLAMA = HF / "qwen3_yarn", HF / "llama3_rope"
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 12))


def iha(rope: str, mask: str, **more: object) -> IHAConfig:
    return IHAConfig(**{"pseudo_heads": 3, "layers": (0, 1), "rope": rope, "mask": mask} | more)  # type: ignore[arg-type]


@pytest.mark.parametrize("mask", ["flat", "token"])
@pytest.mark.parametrize("rope", ["token", "scaled", "virtual"])
def test_exact_starts_compute_what_the_source_does_and_others_do_not(rope: str, mask: str) -> None:
    base = models.load(QWEN3, dtype="float32")
    wanted = base.logits(TOKENS)
    spread = float(np.std(wanted))
    for select, noise in itertools.product(SELECTS, (0.0, 0.1)):
        found = upcycled(base, iha(rope, mask), select=select, noise=noise).logits(TOKENS)
        difference = float(np.abs(found - wanted).max())
        exact = is_exact(iha(rope, mask), select, noise)
        assert difference < 1e-5 * spread if exact else difference > 1e-3 * spread, (select, noise, difference, spread)
    assert is_exact(iha(rope, mask), "last") == (rope == "token")
    assert is_exact(iha(rope, mask), "mean") == ((rope, mask) == ("token", "token"))


def test_windows_some_layers_and_a_collapse_of_each_head_stay_exact() -> None:
    base = models.load(LLAMA, dtype="float32")
    base.config = replace(base.config, layer_windows=(4, None))
    settings = iha("token", "token", layers=(0,), collapse="per_head")
    np.testing.assert_allclose(upcycled(base, settings).logits(TOKENS), base.logits(TOKENS), atol=1e-5)


def test_copies_that_nothing_tells_apart_are_known() -> None:
    assert stay_copies(iha("token", "token"), "mean")
    assert not stay_copies(iha("token", "token"), "mean", 0.02)
    assert not stay_copies(iha("scaled", "token"), "mean")
    assert not stay_copies(iha("token", "token", pseudo_heads=1), "mean")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    models.save(models.load(QWEN3, dtype="float32"), folder, dtype="bfloat16")
    shutil.copyfile(QWEN3 / "generation_config.json", folder / "generation_config.json")
    (folder / "tokenizer.json").write_text('{"x": 1}')
    (folder / "chat_template.jinja").write_text("{{ x }}")
    (folder / "README.md").write_text("the source's card")
    return folder


def test_the_command_writes_a_folder_that_loads(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    settings = ["--pseudo-heads", "2", "--rope", "token", "--mask", "token", "--layers", "1"]
    assert main([str(source), str(out), *settings]) == 0
    said = capsys.readouterr().out
    assert "1 of 2 layers with 2 pseudo heads" in said
    assert "up to rounding" in said
    assert "--noise" in said
    assert {file.name for file in out.iterdir()} == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert (out / "tokenizer.json").read_text() == '{"x": 1}'
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    for name, values in after.items():
        if name in before:
            np.testing.assert_array_equal(values, before[name])
        assert values.dtype.name == ("bfloat16" if name in before else "float32")
    assert before.keys() < after.keys()
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["iha_layers"], config["iha_rope"]) == ("jaxdual_iha", [1], "token")
    loaded = models.load(out, dtype="float32")
    np.testing.assert_allclose(loaded.logits(TOKENS), models.load(source, dtype="float32").logits(TOKENS), atol=1e-4)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("/nowhere/at/all", [], "/nowhere/at/all: no such folder"),
        (str(HF), [], "config.json: no such file"),
        (str(HF / "qwen3_moe_mixed"), [], "'qwen3_moe' cannot be upcycled; supported: llama, mistral, qwen3"),
        (str(HF / "qwen2"), [], "'qwen2' cannot be upcycled"),
        (str(HF / "llama_biases"), [], "mlp_bias is True"),
        (str(QWEN3), ["--layers", "0,2"], "iha_layers is [0, 2]; layers are 0 to 1"),
        (str(QWEN3), ["--layers", "1,0"], "numbers of layers in order"),
        (str(QWEN3), ["--pseudo-heads", "0"], "iha_pseudo_heads is 0"),
        (str(QWEN3), ["--noise", "nan"], "noise is nan"),
        (str(QWEN3), ["--noise", "-1"], "noise is -1.0; a number from 0 on is expected"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    model: str, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([model, str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()


def test_a_folder_with_files_is_not_written_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "precious").write_text("x")
    assert main([str(QWEN3), str(tmp_path)]) == 2
    assert "a new or an empty folder is expected" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["precious"]
