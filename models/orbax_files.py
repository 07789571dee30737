"""Weights as an Orbax checkpoint: written and restored in parallel, straight into any sharding."""

from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx

from models.config import ModelConfig
from models.decoder import Decoder
from models.errors import ModelError
from models.shapes import ShardingRule, abstract, parameter_path, target_shardings
from models.tensor_files import ORBAX_FOLDER


def save_orbax(model: Decoder, folder: Path) -> None:
    """Write the parameters to `folder`/orbax, which must not exist; other files of a checkpoint are the caller's."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / ORBAX_FOLDER).absolute(), _by_path(nnx.state(model)))


def load_orbax(config: ModelConfig, folder: Path, dtype: str, sharding: ShardingRule | None = None) -> Decoder:
    """Restore a decoder from `folder`/orbax.

    Args:
      config: what the parameters belong to.
      folder: written by `save_orbax`.
      dtype: type of the parameters; "auto" is float32 on CPU, the stored type elsewhere.
      sharding: target of each parameter; None puts all on the default device.

    Raises:
      ModelError: no such checkpoint, damaged data, or parameters of other names or shapes.
    """
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else orbax_dtype(folder)
    graphdef, state = nnx.split(abstract(config, dtype))
    wanted = jax.tree.map(
        lambda leaf, target: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=target),
        state,
        target_shardings(state, sharding),
    )
    stored = _metadata(folder)
    by_path = _by_path(wanted)
    for path in sorted(by_path.keys() ^ stored.keys()):
        problem = "is missing" if path in by_path else "has no place in this model"
        raise ModelError(f"{folder / ORBAX_FOLDER}: parameter '{path}' {problem}")
    for path, leaf in by_path.items():
        if tuple(stored[path].shape) != leaf.shape:
            raise ModelError(
                f"{folder / ORBAX_FOLDER}: parameter '{path}' has shape {list(stored[path].shape)}; "
                f"{list(leaf.shape)} is expected"
            )
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            values = checkpointer.restore((folder / ORBAX_FOLDER).absolute(), by_path)
    except Exception as error:  # Orbax and tensorstore raise errors of many kinds for damaged files
        raise _unreadable(folder, error) from error
    state = jax.tree_util.tree_map_with_path(lambda path, _: values[parameter_path(path)], state)
    model: Decoder = nnx.merge(graphdef, state)
    return model


def orbax_dtype(folder: Path) -> str:
    """Stored type of the embedding.

    Raises:
      ModelError: no readable checkpoint.
    """
    stored = _metadata(folder)
    if "embedding" not in stored:
        raise ModelError(f"{folder / ORBAX_FOLDER}: parameter 'embedding' is missing")
    return str(jnp.dtype(stored["embedding"].dtype))


def _metadata(folder: Path) -> dict[str, jax.ShapeDtypeStruct]:
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            found = checkpointer.metadata((folder / ORBAX_FOLDER).absolute()).item_metadata
            return {str(path): leaf for path, leaf in found.items()}
    except Exception as error:
        raise _unreadable(folder, error) from error


def _unreadable(folder: Path, error: Exception) -> ModelError:
    reason = (str(error).strip().splitlines() or [""])[0]
    return ModelError(f"{folder / ORBAX_FOLDER}: not a complete Orbax checkpoint ({type(error).__name__}: {reason})")


def _by_path(state: nnx.State) -> dict[str, jax.Array]:
    return {parameter_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
