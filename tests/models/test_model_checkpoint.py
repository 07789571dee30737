"""Reading and writing checkpoint folders, and what is said about broken ones."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import models
from models import ModelError

HF = Path(__file__).parent.parent / "fixtures" / "hf"
LLAMA = HF / "llama3_rope"
MOE = HF / "qwen3_moe_mixed"
NORM = "model.norm.weight"


def leaves(model: models.Decoder) -> list[jax.Array]:
    return jax.tree.leaves(nnx.state(model))


def assert_same_parameters(found: models.Decoder, wanted: models.Decoder) -> None:
    assert found.config == wanted.config
    for one, other in zip(leaves(found), leaves(wanted), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))


def copy_of(source: Path, folder: Path, tensors: dict[str, np.ndarray] | None = None) -> Path:
    shutil.copyfile(source / "config.json", folder / "config.json")
    if tensors is None:
        shutil.copyfile(source / "model.safetensors", folder / "model.safetensors")
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder


def names_and_types(folder: Path) -> dict[str, str]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "np") as handle:
            found |= {name: handle.get_slice(name).get_dtype() for name in handle.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("case", ["llama_biases", "qwen3_moe_mixed"])
def test_saved_checkpoints_have_the_original_tensors_and_load_the_same(case: str, tmp_path: Path) -> None:
    model = models.load(HF / case, dtype="float32")
    models.save(model, tmp_path, dtype="float32")
    original, written = (load_file(folder / "model.safetensors") for folder in (HF / case, tmp_path))
    assert original.keys() == written.keys()
    for name, value in original.items():
        np.testing.assert_array_equal(written[name], value)
    assert_same_parameters(models.load(tmp_path, dtype="float32"), model)


def test_several_files_with_an_index_are_one_checkpoint(tmp_path: Path) -> None:
    model = models.load(MOE, dtype="float32")
    models.save(model, tmp_path, dtype="float32", max_file_bytes=60_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert {file.name for file in files} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in leaves(model))
    assert_same_parameters(models.load(tmp_path, dtype="float32"), model)


def test_saving_again_leaves_no_file_of_the_checkpoint_before(tmp_path: Path) -> None:
    model = models.load(LLAMA, dtype="float32")
    models.save(model, tmp_path, max_file_bytes=20_000)
    models.save(model, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(("dtype", "stored"), [("bfloat16", "BF16"), ("float16", "F16"), ("float32", "F32")])
def test_stored_types(dtype: str, stored: str, tmp_path: Path) -> None:
    model = models.load(MOE, dtype="float32")
    models.save(model, tmp_path, dtype=dtype)
    assert set(names_and_types(tmp_path).values()) == {stored}
    same = models.load(tmp_path, dtype=dtype)
    for found, wanted in zip(leaves(same), leaves(model), strict=True):
        assert found.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(found, wanted.astype(dtype))
    # Widening a narrow checkpoint is exact.
    wide = models.load(tmp_path, dtype="auto")
    for found, wanted in zip(leaves(wide), leaves(same), strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found, wanted.astype(jnp.float32))


def test_unknown_types_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype is 'int8'; known: auto, float32"):
        models.load(LLAMA, dtype="int8")
    config = models.load_config(LLAMA)
    with pytest.raises(ValueError, match="dtype is 'auto'"):
        models.init(config, dtype="auto")
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        models.save(models.load(LLAMA), tmp_path, dtype="int8")


def test_random_weights_depend_on_the_seed_alone() -> None:
    config = models.load_config(LLAMA)
    one, same, other = models.init(config, seed=1), models.init(config, seed=1), models.init(config, seed=2)
    assert_same_parameters(one, same)
    assert not np.array_equal(one.embedding[...], other.embedding[...])
    assert np.std(one.embedding[...]) == pytest.approx(0.02, rel=0.05)
    assert (np.asarray(one.norm.scale[...]) == 1).all()
    first, second = one.layers[0].attention, one.layers[1].attention
    assert not np.array_equal(first.q.kernel[...], second.q.kernel[...])


def test_tied_and_computed_tensors_may_be_stored_besides(tmp_path: Path) -> None:
    tensors = load_file(HF / "llama_biases" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    found = models.load(copy_of(HF / "llama_biases", tmp_path, tensors), dtype="float32")
    assert_same_parameters(found, models.load(HF / "llama_biases", dtype="float32"))


def without(name: str, tensors: dict) -> dict:
    return {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: without(NORM, t), "tensor 'model.norm.weight' is missing"),
        (lambda t: without("lm_head.weight", t), "tensor 'lm_head.weight' is missing"),
        (lambda t: t | {"model.extra": t[NORM]}, "tensor 'model.extra' has no place in this model"),
        (lambda t: t | {"model.layers.2.mlp.up_proj.weight": t[NORM]}, "tensor 'model.layers.2.mlp.up_proj.weight'"),
        (lambda t: t | {NORM: t[NORM][:-1]}, r"tensor 'model.norm.weight' has shape \[31\]; \[32\] is expected"),
        (lambda t: t | {NORM: t[NORM].astype(np.int8)}, "tensor 'model.norm.weight' has type I8; supported: F32"),
        (
            lambda t: t | {"lm_head.weight": np.ascontiguousarray(t["lm_head.weight"].T)},
            r"tensor 'lm_head.weight' has shape \[32, 96\]; \[96, 32\] is expected",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message: str, tmp_path: Path) -> None:
    copy_of(LLAMA, tmp_path, change(load_file(LLAMA / "model.safetensors")))
    with pytest.raises(ModelError, match=message) as error:
        models.load(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_an_expert_that_is_missing_or_misshapen_is_named(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    tensors = load_file(MOE / "model.safetensors")
    with pytest.raises(ModelError, match=f"tensor '{name}' is missing"):
        models.load(copy_of(MOE, tmp_path, without(name, tensors)))
    with pytest.raises(ModelError, match=f"tensor '{name}' has shape"):
        models.load(copy_of(MOE, tmp_path, tensors | {name: tensors[name][:, :-1].copy()}))


@pytest.mark.parametrize("kept", [0, 4, 100, -1, -5000])
def test_a_truncated_file_is_named(kept: int, tmp_path: Path) -> None:
    file = copy_of(LLAMA, tmp_path) / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:kept])
    with pytest.raises(ModelError, match=r"model\.safetensors: not a complete safetensors file"):
        models.load(tmp_path)


@pytest.mark.parametrize(
    "header", [b"{", b"[]", b'{"a": 1}', b'{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}']
)
def test_a_malformed_header_is_named(header: bytes, tmp_path: Path) -> None:
    copy_of(LLAMA, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        models.load(tmp_path)


def sharded(folder: Path) -> dict:
    models.save(models.load(LLAMA, dtype="float32"), folder, dtype="float32", max_file_bytes=30_000)
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def test_a_file_that_the_index_names_and_is_not_there(tmp_path: Path) -> None:
    lost = sharded(tmp_path)[NORM]
    (tmp_path / lost).unlink()
    with pytest.raises(ModelError, match=rf"index\.json: names {lost}, and there is no such file"):
        models.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: {"weight_map": m | {"model.other": m[NORM]}}, "holds tensor 'model.other', which it does not"),
        (lambda m: {"weight_map": m | {NORM: "../model.safetensors"}}, "weight_map.model.norm.weight"),
        (lambda m: {"weight_map": m | {NORM: 3}}, "weight_map.model.norm.weight"),
        (lambda m: {"weight_map": {}}, "'weight_map' is missing"),
        (lambda m: {"weight_map": [1]}, "'weight_map' is missing"),
        (lambda m: {}, "'weight_map' is missing"),
        (lambda m: [], "an object is expected"),
    ],
)
def test_a_malformed_index_is_named(change, message: str, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    weight_map = sharded(tmp_path)
    index.write_text(json.dumps(change(weight_map)))
    with pytest.raises(ModelError, match=message) as error:
        models.load(tmp_path)
    assert str(index) in str(error.value)


def test_a_tensor_in_two_files_is_named(tmp_path: Path) -> None:
    weight_map = sharded(tmp_path)
    other = next(file for file in weight_map.values() if file != weight_map[NORM])
    tensors = load_file(tmp_path / other) | {NORM: np.zeros(32, np.float32)}
    save_file(tensors, tmp_path / other)
    with pytest.raises(ModelError, match=f"tensor '{NORM}' is also in"):
        models.load(tmp_path)


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    shutil.copyfile(LLAMA / "config.json", tmp_path / "config.json")
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        models.load(tmp_path)


SHARDED_LOAD = """
import sys, math
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from flax import nnx
import models
from models.tensor_files import TensorFiles

mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
read = {}
plain_read = TensorFiles.read

def counted(self, name, index):
    values = plain_read(self, name, index)
    read[name] = read.get(name, 0) + values.size
    return values

def rule(path, shape):
    axis = {"q.kernel": 1, "o.kernel": 0, "experts.up": 0, "experts.down": 1}
    for ending, axis in axis.items():
        if path.endswith(ending):
            return NamedSharding(mesh, P(*[None] * axis, "x"))
    return NamedSharding(mesh, P())

assert len(jax.devices()) == 2
whole = models.load(sys.argv[1], dtype="float32")
TensorFiles.read = counted
parts = models.load(sys.argv[1], dtype="float32", sharding=rule)
kernel = parts.layers[0].attention.q.kernel[...]
assert kernel.sharding.spec == P(None, "x") and kernel.addressable_shards[0].data.shape == (32, 32), kernel.sharding
assert read["model.layers.0.self_attn.q_proj.weight"] == kernel.size, read
assert read["model.layers.1.mlp.experts.3.up_proj.weight"] == 32 * 24, read
for one, other in zip(*(jax.tree.leaves(nnx.state(m)) for m in (whole, parts))):
    np.testing.assert_array_equal(one, other)
config = models.load_config(sys.argv[2])
made, alike = models.init(config, seed=3, sharding=rule), models.init(config, seed=3)
assert made.layers[0].attention.q.kernel[...].sharding.spec == P(None, "x")
for one, other in zip(*(jax.tree.leaves(nnx.state(m)) for m in (made, alike))):
    np.testing.assert_allclose(one, other, atol=1e-6)
print("fine")
"""


def test_each_device_reads_its_own_slice() -> None:
    environment = {"PATH": "", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run(
        [sys.executable, "-c", SHARDED_LOAD, str(MOE), str(LLAMA)],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == "fine\n", done.stderr


def test_saved_files_are_as_readable_as_others(tmp_path: Path) -> None:
    models.save(models.load(HF / "qwen3"), tmp_path, max_file_bytes=300_000)
    modes = {file.stat().st_mode for file in tmp_path.iterdir()}
    other = tmp_path / "other"
    other.touch()
    assert modes == {other.stat().st_mode}
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
