"""Cached keys and values of one model must never be taken for another's."""

import shutil
from pathlib import Path

import models
from models.convert import main as convert
from models.fingerprint import model_fingerprint
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
