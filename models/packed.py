"""Projections with packed weights: called as `models.layers.Linear`, with other parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from models.config import ModelConfig
from models.layers import Linear, random_weights
from models.packed_config import PackedConfig, projections
from models.tensors import TensorSource
from pallas_kernels.block_sparse_matmul import block_sparse_matmul, pack_blocks
from pallas_kernels.sparse_matmul import WORD, pack, sparse_matmul


class PackedLinear(nnx.Module):
    """Projection `x @ weights + bias` with weights N:M, as `pallas_kernels.sparse_matmul` stores them.

    New ones have random values for the first inputs of each group.
    """

    def __init__(
        self, config: PackedConfig, inputs: int, outputs: int, *, bias: bool, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        words, planes = inputs // WORD, WORD * config.keep // config.of
        first = sum((1 << config.keep) - 1 << group for group in range(0, WORD, config.of))
        self.values = random_weights(rngs, (planes, outputs, words), dtype)
        self.mask = nnx.Param(jnp.full((outputs, words), first, jnp.uint16))
        self.bias = nnx.Param(jnp.zeros((outputs,), dtype)) if bias else None
        self.of = config.of

    def __call__(self, x: Float[Array, "T inputs"]) -> Float[Array, "T outputs"]:
        """Project every row."""
        out: jax.Array = sparse_matmul(x, self.values[...], self.mask[...], of=self.of)
        return out if self.bias is None else out + self.bias[...]


class BlockSparseLinear(nnx.Module):
    """Projection `x @ weights + bias` with weights in blocks, as `pallas_kernels.block_sparse_matmul` stores them.

    New ones have random values for the first inputs.
    """

    def __init__(
        self, config: PackedConfig, inputs: int, outputs: int, *, bias: bool, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        kept, parts = config.blocks_kept(inputs), outputs // config.block
        self.blocks = random_weights(rngs, (parts, kept, config.block, config.block), dtype)
        self.indices = nnx.Param(jnp.broadcast_to(jnp.arange(kept, dtype=jnp.int32), (parts, kept)))
        self.bias = nnx.Param(jnp.zeros((outputs,), dtype)) if bias else None

    def __call__(self, x: Float[Array, "T inputs"]) -> Float[Array, "T outputs"]:
        """Project every row."""
        out: jax.Array = block_sparse_matmul(x, self.blocks[...], self.indices[...])
        return out if self.bias is None else out + self.bias[...]


def pack_projections(config: ModelConfig, index: int, layer: Any, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
    """Puts packed projections in the place of the dense ones of a layer, if the configuration says so."""
    packed = config.packed
    if packed is None:
        return
    for path, (inputs, outputs) in projections(config, index).items():
        parent, name = path.split(".")
        dense: Linear = getattr(getattr(layer, parent), name)
        kind: Callable[..., nnx.Module] = PackedLinear if packed.of else BlockSparseLinear
        new = kind(packed, inputs, outputs, bias=dense.bias is not None, dtype=dtype, rngs=rngs)
        setattr(getattr(layer, parent), name, new)


def packed_tensors(config: ModelConfig, index: int, sources: dict[str, TensorSource]) -> dict[str, TensorSource]:
    """Where the parameters of layer `index` lie in a checkpoint, given where dense ones would.

    Tensors have the shapes of the parameters; those of the projection `NAME` are `NAME.packed_values` and
    `NAME.packed_mask`, or `NAME.blocks` and `NAME.block_indices`.
    """
    packed = config.packed
    if packed is None:
        return sources
    sources = dict(sources)
    for path in projections(config, index):
        (stored,) = sources.pop(f"{path}.kernel").names
        name = stored.removesuffix(".weight")
        if packed.of:
            sources[f"{path}.values"] = TensorSource((f"{name}.packed_values",))
            sources[f"{path}.mask"] = TensorSource((f"{name}.packed_mask",), integers="uint16")
        else:
            sources[f"{path}.blocks"] = TensorSource((f"{name}.blocks",))
            sources[f"{path}.indices"] = TensorSource((f"{name}.block_indices",), integers="int32")
    return sources


def packed_parameters(packed: PackedConfig, path: str, kernel: Any) -> dict[str, jax.Array]:
    """Parameters of the projection at `path` from its dense weights `[inputs, outputs]`.

    Raises:
      ValueError: weights that don't follow the pattern; the message says where.
    """
    try:
        if packed.of:
            values, mask = pack(kernel, packed.keep, packed.of)
            return {f"{path}.values": jnp.asarray(values), f"{path}.mask": jnp.asarray(mask)}
        blocks, indices = pack_blocks(kernel, packed.block, packed.blocks_kept(kernel.shape[0]))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return {f"{path}.blocks": jnp.asarray(blocks), f"{path}.indices": jnp.asarray(indices)}
