"""Weights from safetensors files straight to the devices that hold them, and back."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding
from safetensors.numpy import save_file

from models.config import ModelConfig
from models.decoder import Decoder
from models.families import load_config, parameter_tensors, to_hf
from models.hub import resolve
from models.shapes import DTYPES, ShardingRule, abstract, check_dtype, parameter_path, target_shardings
from models.tensor_files import INDEX_FILE, ORBAX_FOLDER, WEIGHTS_FILE, TensorFiles
from models.tensors import TensorSource


def load(model: str | Path, dtype: str = "auto", sharding: ShardingRule | None = None) -> Decoder:
    """Load a checkpoint of the Hugging Face layout, or one that `models.convert` made for Orbax.

    Each parameter is read slice by slice into its target sharding; beside the file's page cache the host holds one
    slice at a time.

    Args:
      model: a folder, or the name of a model on the hub (see `models.resolve`).
      dtype: "float32", "bfloat16", "float16", or "auto": float32 on CPU, the checkpoint's own elsewhere.
      sharding: target of each parameter; None puts all on the default device.

    Raises:
      ModelError: a configuration or checkpoint that cannot be used; the message names file and key or tensor.
      ValueError: an unknown dtype.
    """
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype is {dtype!r}; known: auto, {', '.join(DTYPES)}")
    folder = resolve(model)
    config = load_config(folder)
    if (folder / ORBAX_FOLDER).is_dir():
        # Imported where it is needed: Orbax is slow to import, and safetensors need none of it.
        from models.orbax_files import load_orbax

        return load_orbax(config, folder, dtype, sharding)
    sources = parameter_tensors(config)
    with TensorFiles(folder) as files:
        files.check_names(
            {name for source in sources.values() for name in source.names},
            harmless={"lm_head.weight"} if config.tie_word_embeddings else set(),
        )
        if dtype == "auto":
            dtype = "float32" if jax.default_backend() == "cpu" else files.dtype(sources["embedding"].names[0])

        def read(path: str, shape: tuple[int, ...], dtype: np.dtype, target: Sharding) -> jax.Array:
            return _read_parameter(files, sources[path], shape, dtype, target)

        return _fill(config, dtype, sharding, read)


def stored_dtype(folder: Path) -> str:
    """Type of the embedding in a checkpoint folder: "float32", "bfloat16" or "float16".

    Raises:
      ModelError: no readable checkpoint.
    """
    embedding = parameter_tensors(load_config(folder))["embedding"]
    with TensorFiles(folder) as files:
        return files.dtype(embedding.names[0])


def init(
    config: ModelConfig, *, seed: int = 0, dtype: str = "float32", sharding: ShardingRule | None = None
) -> Decoder:
    """Make a decoder with random weights: normal with standard deviation 0.02, norms one, biases zero.

    Args:
      config: what to build.
      seed: of the random numbers; equal seeds give equal weights.
      dtype: "float32", "bfloat16" or "float16".
      sharding: as for `load`.

    Raises:
      ValueError: an unknown dtype.
    """
    check_dtype(dtype)
    key = jax.random.key(seed)
    if sharding is None:
        return Decoder(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(params=key))

    def build(key: jax.Array) -> nnx.State:
        return nnx.state(Decoder(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(params=key)))

    graphdef, state = nnx.split(abstract(config, dtype))
    # One program for all parameters: no device ever holds an unsharded one.
    state = jax.jit(build, out_shardings=target_shardings(state, sharding))(key)
    model: Decoder = nnx.merge(graphdef, state)
    return model


def _fill(
    config: ModelConfig,
    dtype: str,
    sharding: ShardingRule | None,
    read: Callable[[str, tuple[int, ...], np.dtype, Sharding], jax.Array],
) -> Decoder:
    graphdef, state = nnx.split(abstract(config, dtype))
    targets = target_shardings(state, sharding)
    state = jax.tree_util.tree_map_with_path(
        lambda path, leaf, target: read(parameter_path(path), leaf.shape, leaf.dtype, target), state, targets
    )
    model: Decoder = nnx.merge(graphdef, state)
    return model


def _read_parameter(
    files: TensorFiles, source: TensorSource, shape: tuple[int, ...], dtype: np.dtype, target: Sharding
) -> jax.Array:
    stored = shape[1:] if source.stacked else shape
    for name in source.names:
        files.check_shape(name, stored[::-1] if source.transpose else stored, source.integers)

    def part(name: str, index: tuple[slice, ...]) -> np.ndarray:
        values = files.read(name, index[::-1] if source.transpose else index)
        return values.T if source.transpose else values

    def read_slice(index: tuple[slice, ...] | None) -> np.ndarray:
        whole = tuple(slice(*(s.indices(size))) for s, size in zip(index or (), shape, strict=True))
        out = np.empty([s.stop - s.start for s in whole], dtype)
        if source.stacked:
            for place, name in enumerate(source.names[whole[0]]):
                out[place] = part(name, whole[1:])
        else:
            out[...] = part(source.names[0], whole)
        return out

    return jax.make_array_from_callback(shape, target, read_slice)


def save(model: Decoder, folder: str | Path, dtype: str = "bfloat16", max_file_bytes: int = 4 << 30) -> None:
    """Write a checkpoint of the Hugging Face layout: safetensors files and `config.json`.

    One file's tensors at a time are copied to the host.

    Args:
      model: what to write.
      folder: made if missing; files of the same names are replaced.
      dtype: stored type, "float32", "bfloat16" or "float16", but for parameters that are always wide.
      max_file_bytes: size of one file; more than one come with an index.

    Raises:
      ValueError: an unknown dtype, or a configuration that the family's format cannot express.
    """
    check_dtype(dtype)
    config_json = to_hf(model.config) | {"torch_dtype": dtype}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[_StoredTensor]] = [[]]
    used = total = 0
    for tensor in _stored_tensors(model, dtype):
        size = tensor.nbytes
        if shards[-1] and used + size > max_file_bytes:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used, total = used + size, total + size
    for stale in (*folder.glob("model*.safetensors"), folder / INDEX_FILE):
        stale.unlink(missing_ok=True)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = WEIGHTS_FILE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({tensor.name: tensor.read() for tensor in shard}, folder / file, metadata={"format": "pt"})
        weight_map |= {tensor.name: file for tensor in shard}
    if len(shards) > 1:
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(folder / "config.json", config_json)
    for file in set(weight_map.values()):
        # safetensors makes files that only their owner can read.
        shutil.copymode(folder / "config.json", folder / file)


def write_json(file: Path, value: object) -> None:
    """Write `value` as indented JSON."""
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class _StoredTensor:
    """One tensor of the file format: a parameter or one of its stack, transposed back when read."""

    def __init__(self, name: str, value: jax.Array, source: TensorSource, place: int, dtype: str) -> None:
        self.name, self._dtype = name, jnp.dtype(source.integers or ("float32" if source.wide else dtype))
        self._value, self._source, self._place = value, source, place
        shape = value.shape[1:] if source.stacked else value.shape
        self.nbytes = math.prod(shape) * self._dtype.itemsize

    def read(self) -> np.ndarray:
        value = np.asarray(self._value[self._place] if self._source.stacked else self._value)
        return np.ascontiguousarray(value.T if self._source.transpose else value, dtype=self._dtype)


def _stored_tensors(model: Decoder, dtype: str) -> Iterator[_StoredTensor]:
    sources = parameter_tensors(model.config)
    for path, value in jax.tree_util.tree_leaves_with_path(nnx.state(model)):
        source = sources[parameter_path(path)]
        for place, name in enumerate(source.names):
            yield _StoredTensor(name, value, source, place, dtype)
