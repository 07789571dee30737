"""Cached keys and values of one model must never be taken for another's."""

import shutil
from pathlib import Path

import models
from jaxdual.model_folder import shipped_model
from models import IHAConfig
from models.convert import main as convert
from models.fingerprint import model_fingerprint
from models.upcycle import upcycle
from tests.engine.models import FIXTURES


def test_fingerprints_differ_with_weights_configuration_and_type(tmp_path: Path) -> None:
    same = tmp_path / "same"
    shutil.copytree(FIXTURES / "qwen3", same)
    original = model_fingerprint(FIXTURES / "qwen3", "float32")
    assert model_fingerprint(same, "float32") == original
    assert model_fingerprint(same, "bfloat16") != original
    assert model_fingerprint(same, "float32", random_weights=True) != original

    weights = same / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100:] = bytes(100)
    weights.write_bytes(bytes(data))
    changed = model_fingerprint(same, "float32")
    assert changed != original

    config = same / "config.json"
    config.write_text(config.read_text().replace("1000000.0", "500000.0"))
    assert model_fingerprint(same, "float32") not in (original, changed)


def test_orbax_folders_of_different_weights_differ(tmp_path: Path) -> None:
    digests = set()
    for seed in (0, 1):
        source, target = tmp_path / f"source{seed}", tmp_path / f"orbax{seed}"
        models.save(models.init(models.load_config(FIXTURES / "qwen3"), seed=seed), source, dtype="float32")
        assert convert(["--to", "orbax", str(source), str(target)]) == 0
        digests.add(model_fingerprint(target, "float32"))
    assert len(digests) == 2


def test_models_that_differ_in_small_tensors_alone_differ(tmp_path: Path) -> None:
    """Samples of a large file may miss them."""
    fingerprints = set()
    for seed in range(3):
        iha = IHAConfig(pseudo_heads=2, layers=tuple(range(8)), rope="scaled", mask="token")
        upcycle(shipped_model("base"), tmp_path / str(seed), iha, noise=0.3, seed=seed)
        fingerprints.add(model_fingerprint(tmp_path / str(seed), "float32"))
    assert len(fingerprints) == 3


def test_a_damaged_file_has_a_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    found = set()
    for header in (b"", b"\xff" * 8 + b"{", (2).to_bytes(8, "little") + b"[]", (9).to_bytes(8, "little") + b'{"a": 1}'):
        (tmp_path / "model.safetensors").write_bytes(header)
        found.add(model_fingerprint(tmp_path, "float32"))
    assert len(found) == 4
