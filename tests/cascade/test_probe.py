"""The probe: what it computes, what its file keeps, and whose probe it refuses to be."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxdual.cascade.probe import ConfidenceProbe, Probe, default_tap, load_probe, p_ik, read_probe

HIDDEN = 12


def made(seed: int = 0, **fields: object) -> Probe:
    rng = np.random.default_rng(seed)
    network = ConfidenceProbe(
        jnp.asarray(rng.normal(size=HIDDEN)), jnp.asarray(rng.uniform(0.5, 2, HIDDEN)), rngs=nnx.Rngs(seed)
    )
    probe = Probe(
        parameters=network.parameters(),
        model="tiny",
        fingerprint="ab" * 32,
        num_layers=4,
        tap=3,
        training={"auroc": 0.75},
    )
    return dataclasses.replace(probe, **fields)


def reference(probe: Probe, hidden: np.ndarray) -> np.ndarray:
    """In float64, written out."""
    x = (hidden.astype(np.float64) - np.asarray(probe.parameters.mean)) / np.asarray(probe.parameters.deviation)
    for kernel, bias in zip(probe.parameters.kernels[:-1], probe.parameters.biases[:-1], strict=True):
        x = np.maximum(x @ np.asarray(kernel, np.float64) + np.asarray(bias), 0)
    z = x @ np.asarray(probe.parameters.kernels[-1], np.float64) + np.asarray(probe.parameters.biases[-1])
    return 1 / (1 + np.exp(-z[:, 0]))


def test_p_ik_is_the_networks_sigmoid_in_and_out_of_jit() -> None:
    probe, hidden = made(), np.random.default_rng(1).normal(size=(5, HIDDEN)).astype(np.float32)
    wanted = reference(probe, hidden)
    np.testing.assert_allclose(p_ik(probe.parameters, jnp.asarray(hidden)), wanted, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(p_ik)(probe.parameters, jnp.asarray(hidden)), wanted, rtol=1e-5)
    assert p_ik(probe.parameters, jnp.asarray(hidden, jnp.bfloat16)).dtype == jnp.float32
    assert [kernel.shape for kernel in probe.parameters.kernels] == [(HIDDEN, 256), (256, 128), (128, 64), (64, 1)]


def test_only_layers_are_trained() -> None:
    network = ConfidenceProbe(jnp.zeros(HIDDEN), jnp.ones(HIDDEN), rngs=nnx.Rngs(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(network, nnx.Param))) == sum(
        inputs * outputs + outputs for inputs, outputs in ((HIDDEN, 256), (256, 128), (128, 64), (64, 1))
    )


def test_channel_that_never_changes_counts_with_deviation_1() -> None:
    network = ConfidenceProbe(jnp.zeros(HIDDEN), jnp.zeros(HIDDEN), rngs=nnx.Rngs(0))
    assert np.array_equal(network.parameters().deviation, np.ones(HIDDEN))


def test_file_gives_back_the_probe(tmp_path: Path) -> None:
    probe, file = made(), tmp_path / "probe.safetensors"
    probe.save(file)
    found = load_probe(file, probe.fingerprint, 4, HIDDEN)
    for one, other in zip(jax.tree.leaves(found.parameters), jax.tree.leaves(probe.parameters), strict=True):
        assert np.array_equal(one, other)
    assert (found.model, found.fingerprint, found.num_layers, found.tap) == ("tiny", "ab" * 32, 4, 3)
    assert found.training == {"auroc": 0.75}
    assert [one.name for one in tmp_path.iterdir()] == ["probe.safetensors"]


@pytest.mark.parametrize(
    ("fingerprint", "layers", "hidden", "told"),
    [
        ("cd" * 32, 4, HIDDEN, "fingerprint abababab"),
        ("ab" * 32, 5, HIDDEN, "a model of 4 layers"),
        ("ab" * 32, 4, HIDDEN + 1, "12 channels of hidden state"),
    ],
)
def test_probe_of_another_model_is_refused(
    tmp_path: Path, fingerprint: str, layers: int, hidden: int, told: str
) -> None:
    file = tmp_path / "probe.safetensors"
    made().save(file)
    with pytest.raises(ValueError, match=f"probe.safetensors.*{told}"):
        load_probe(file, fingerprint, layers, hidden)


def test_files_that_are_no_probe_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "probe.safetensors"
    with pytest.raises(ValueError, match="can't be read as a probe"):
        read_probe(file)
    file.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="can't be read as a probe"):
        read_probe(file)
    save_file({"mean": np.zeros(3, np.float32)}, file)
    with pytest.raises(ValueError, match="is not a probe"):
        read_probe(file)


def test_damaged_probe_is_refused(tmp_path: Path) -> None:
    from safetensors import safe_open

    file = tmp_path / "probe.safetensors"
    made().save(file)
    tensors = load_file(file)
    with safe_open(file, framework="np") as opened:
        metadata = opened.metadata()
    save_file(tensors | {"layers.1.bias": np.zeros(3, np.float32)}, file, metadata=metadata)
    with pytest.raises(ValueError, match=r"no usable probe.*shapes"):
        read_probe(file)
    save_file({name: value for name, value in tensors.items() if name != "mean"}, file, metadata=metadata)
    with pytest.raises(ValueError, match=r"no usable probe.*mean"):
        read_probe(file)
    save_file(tensors, file, metadata={key: value.replace('"tap": 3', '"tap": 9') for key, value in metadata.items()})
    with pytest.raises(ValueError, match="tap=9 must be 1 to 4"):
        read_probe(file)
    newer = {key: value.replace('"version": 1', '"version": 2') for key, value in metadata.items()}
    save_file(tensors, file, metadata=newer)
    with pytest.raises(ValueError, match=r"version 2; this is version 1"):
        read_probe(file)


def test_tap_is_the_papers_24_or_at_three_quarters_of_the_layers() -> None:
    assert [default_tap(layers) for layers in (1, 2, 4, 24, 28, 32, 36, 80)] == [1, 2, 3, 18, 24, 24, 24, 60]


def test_probe_among_the_weights_of_a_model_is_refused(tmp_path: Path) -> None:
    """All safetensors files of a model's folder are its weights, and part of its fingerprint."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="another suffix"):
        made().save(tmp_path / "probe.safetensors")
    made().save(tmp_path / "p_ik.probe")
    assert read_probe(tmp_path / "p_ik.probe").tap == made().tap
