"""The form that block-sparse weights are stored in: square blocks, and which inputs each is of.

Every block of outputs has as many: the blocks are one dense array, and a product is a gather of inputs and a dense
product for each block of outputs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32


class Blocks(NamedTuple):
    """Block-sparse weights.

    Attributes:
      blocks: `[N / b, kept, b, b]`; of the last two axes the first is of inputs.
      indices: `[N / b, kept]` int32, ascending: block `indices[n, k]` of the inputs is what `blocks[n, k]` multiplies.
    """

    blocks: Any
    indices: Any


def check_block(size: int, inputs: int, outputs: int) -> None:
    """Raises `ValueError` if weights of this size have no whole blocks of `size` by `size`."""
    if size < 1 or inputs % size or outputs % size:
        raise ValueError(f"blocks of {size}: {inputs} inputs and {outputs} outputs must be multiples of it")


def pack_blocks(weights: Any, size: int, kept: int | None = None) -> Blocks:
    """Packs weights on the host; where a block of outputs has fewer blocks with values, blocks of zeros join them.

    Args:
      weights: `[K, N]` of any floating-point type.
      size: of a block, its inputs and its outputs.
      kept: blocks of each block of outputs; None for as many as the fullest one has values in, at least one.

    Raises:
      ValueError: sizes that have no whole blocks, or a block of outputs with values in more blocks than `kept`.
    """
    dense = np.asarray(weights)
    if dense.ndim != 2:
        raise ValueError(f"weights must be [K, N]: {dense.dtype}{list(dense.shape)}")
    check_block(size, *dense.shape)
    tiled = dense.reshape(dense.shape[0] // size, size, -1, size).transpose(2, 0, 1, 3)
    there = (tiled != 0).any(axis=(2, 3))
    counts = there.sum(axis=1)
    most = max(int(counts.max(initial=0)), 1)
    if kept is None:
        kept = most
    if not most <= kept <= there.shape[1]:
        worst = int(counts.argmax())
        raise ValueError(
            f"outputs {worst * size} to {worst * size + size - 1} have values in {counts[worst]} of {there.shape[1]} "
            f"blocks of {size} inputs; {kept} are to be kept"
        )
    # Those with values, then the first of zeros, in the order of their inputs.
    indices = np.sort(np.argsort(~there, axis=1, kind="stable")[:, :kept], axis=1)
    blocks = np.take_along_axis(tiled, indices[:, :, None, None], axis=1)
    return Blocks(np.ascontiguousarray(blocks), indices.astype(np.int32))


def unpack_blocks(blocks: Float[Array, "P k b b"], indices: Int32[Array, "P k"], inputs: int) -> Float[Array, "K N"]:
    """The weights `[K, N]`, zeros where no block is stored: `pack_blocks` undone.

    Args:
      blocks, indices: as `Blocks` says.
      inputs: `K`.
    """
    parts, _, size, _ = blocks.shape
    dense = jnp.zeros((parts, inputs // size, size, size), blocks.dtype)
    dense = dense.at[jnp.arange(parts)[:, None], indices].set(blocks)
    return jnp.transpose(dense, (1, 2, 0, 3)).reshape(inputs, parts * size)


def block_bytes(outputs: int, size: int, kept: int, dtype: Any) -> int:
    """Bytes of block-sparse weights."""
    return outputs // size * kept * (size * size * jax.dtypes.canonicalize_dtype(dtype).itemsize + 4)
