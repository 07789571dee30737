"""Orbax checkpoints: there and back, and the command line."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import models
from models import ModelError
from models.convert import main

HF = Path(__file__).parent.parent / "fixtures" / "hf"
MOE = HF / "qwen3_moe_mixed"


@pytest.fixture(scope="module")
def orbax(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("hf")
    models.save(models.load(MOE, dtype="float32"), source, dtype="bfloat16")
    shutil.copyfile(MOE / "generation_config.json", source / "generation_config.json")
    (source / "tokenizer.json").write_text('{"x": 1}')
    (source / "chat_template.jinja").write_text("{{ x }}")
    out = tmp_path_factory.mktemp("orbax") / "new"
    assert main(["--to", "orbax", str(source), str(out)]) == 0
    return out


def test_other_files_come_along(orbax: Path) -> None:
    names = {file.name for file in orbax.iterdir()}
    assert names == {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "orbax"}
    assert (orbax / "tokenizer.json").read_text() == '{"x": 1}'


def test_there_and_back_keeps_every_bit_and_type(orbax: Path, tmp_path: Path) -> None:
    assert main(["--to", "safetensors", str(orbax), str(tmp_path)]) == 0
    back, original = load_file(tmp_path / "model.safetensors"), load_file(MOE / "model.safetensors")
    assert back.keys() == original.keys()
    for name, value in back.items():
        assert value.dtype.name == "bfloat16"
        np.testing.assert_array_equal(value, original[name].astype(value.dtype))
    assert models.load_config(tmp_path) == models.load_config(MOE)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_an_orbax_folder_loads_like_the_original(orbax: Path, dtype: str) -> None:
    found = models.load(orbax, dtype=dtype)
    wanted = models.load(MOE, dtype="bfloat16")
    for one, other in zip(*(jax.tree.leaves(nnx.state(model)) for model in (found, wanted)), strict=True):
        assert one.dtype == ("float32" if dtype == "auto" else "bfloat16")
        np.testing.assert_array_equal(one.astype("float32"), other.astype("float32"))


def change_config(orbax: Path, folder: Path, **change: object) -> Path:
    shutil.copytree(orbax, folder / "copy")
    config = json.loads((orbax / "config.json").read_text()) | change
    (folder / "copy" / "config.json").write_text(json.dumps(config))
    return folder / "copy"


def test_orbax_parameters_that_do_not_fit_are_named(orbax: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"parameter 'embedding' has shape \[96, 32\]; \[97, 32\] is expected"):
        models.load(change_config(orbax, tmp_path / "a", vocab_size=97))
    with pytest.raises(ModelError, match=r"parameter 'layers\.4\.\S+' is missing"):
        models.load(change_config(orbax, tmp_path / "b", num_hidden_layers=5))
    with pytest.raises(ModelError, match=r"parameter 'layers\.3\.\S+' has no place"):
        models.load(change_config(orbax, tmp_path / "c", num_hidden_layers=3, mlp_only_layers=[]))


# Orbax leaves an asynchronous read of its own behind.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_orbax_checkpoint_is_named(orbax: Path, tmp_path: Path) -> None:
    copy = change_config(orbax, tmp_path)
    for file in sorted((copy / "orbax").rglob("*")):
        if file.is_file() and "metadata" not in file.name.lower():
            file.write_bytes(b"")
    with pytest.raises(ModelError, match="orbax: not a complete Orbax checkpoint"):
        models.load(copy)
    shutil.rmtree(copy / "orbax")
    (copy / "orbax").mkdir()
    with pytest.raises(ModelError, match="orbax: not a complete Orbax checkpoint"):
        models.load(copy)


@pytest.mark.parametrize(
    ("to", "source", "message"),
    [
        ("orbax", "/nowhere/at/all", "/nowhere/at/all: no such folder"),
        ("safetensors", str(MOE), "has no folder 'orbax'"),
        ("orbax", str(HF), "config.json: no such file"),
    ],
)
def test_a_wrong_source_is_one_line_and_exit_code_2(to, source, message, tmp_path, capsys) -> None:
    assert main(["--to", to, source, str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()


def test_a_folder_with_files_is_not_written_to(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "precious").write_text("x")
    assert main(["--to", "orbax", str(MOE), str(tmp_path)]) == 2
    assert "a new or an empty folder is expected" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["precious"]


def test_usage_errors_exit_with_2() -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--to", "gguf", "a", "b"])
    assert stop.value.code == 2
