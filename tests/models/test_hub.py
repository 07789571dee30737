"""Names of models: folders, the local hub cache, and no network."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

import models
from models import ModelError, resolve

LLAMA = Path(__file__).parent.parent / "fixtures" / "hf" / "llama3_rope"
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "models--org--tiny"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(REVISION)
    snapshot = folder / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(LLAMA / name, snapshot / name)
    return snapshot


def test_a_folder_is_used_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(LLAMA) == LLAMA
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/tiny") == Path("org/tiny")


def test_a_hub_name_is_found_in_the_local_cache(cache: Path) -> None:
    assert resolve("org/tiny") == cache
    assert models.load("org/tiny", dtype="float32").config == models.load_config(LLAMA)


def test_a_cached_tokenizer_alone_is_no_model(cache: Path) -> None:
    (cache / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"org/tiny: .* lacks config\.json or \*\.safetensors files"):
        resolve("org/tiny")


def test_an_unknown_name_without_network_is_a_clear_error(cache: Path) -> None:
    with pytest.raises(ModelError, match=r"org/other: no such folder, not in the local hub cache") as error:
        resolve("org/other")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["/no/such/folder", "./folder", "a/b/c", "", "-x", "a b"])
def test_what_cannot_be_a_hub_name_is_a_missing_folder(name: str) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        resolve(name) if name else resolve(Path("nowhere"))


def test_a_file_is_not_a_model() -> None:
    with pytest.raises(ModelError, match=r"config\.json: not a folder"):
        resolve(str(LLAMA / "config.json"))
