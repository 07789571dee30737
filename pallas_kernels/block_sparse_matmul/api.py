"""Public function of the block-sparse product: checks and choice of implementation."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import dispatch
from pallas_kernels.block_sparse_matmul import mosaic, reference, xla
from pallas_kernels.block_sparse_matmul.packing import check_block
from pallas_kernels.checks import check_array, show

_IMPLEMENTATIONS = {
    "mosaic": mosaic.block_sparse_matmul,
    "xla": xla.block_sparse_matmul,
    "reference": reference.block_sparse_matmul,
}


def block_sparse_matmul(
    x: Float[Array, "M K"],
    blocks: Float[Array, "P k b b"],
    indices: Int32[Array, "P k"],
    *,
    implementation: str = "auto",
) -> Float[Array, "M N"]:
    """`x @ weights` with weights that `pack_blocks` made: bytes and operations in proportion to the blocks.

    Args:
      x: `[M, K]` rows.
      blocks: `[N / b, kept, b, b]` of the type of `x`.
      indices: `[N / b, kept]` int32, each from 0 to `K / b - 1` and in a row no two equal; what others give is
        undefined. See `packing.Blocks`.
      implementation: "auto": the first of the following that can; "mosaic": a kernel for GPUs of compute capability 9.0
        (bfloat16 or float16, blocks of 64 or 128; no gradient); "xla": a gather of x and a dense product for each block
        of outputs; "reference": unpacks all weights, and multiplies.

    Returns:
      `[M, N]` of the type of `x`.

    Raises:
      ValueError: shapes or types that don't fit, or an unknown implementation.
      NotImplementedError: the chosen implementation can't do these arguments, or there is none of that name.
    """
    check_array("x", x, jnp.floating, ("M", "K"))
    check_array("blocks", blocks, x.dtype, ("P", "k", "b", "b"))
    parts, kept, size, width = blocks.shape
    check_array("indices", indices, jnp.int32, (parts, kept))
    if size != width or kept < 1 or kept > x.shape[1] // max(size, 1):
        raise ValueError(
            f"blocks must be square, from 1 to K / b for each of outputs, with K={x.shape[1]}: {show(blocks)}"
        )
    check_block(size, x.shape[1], parts * size)
    return dispatch.run("block_sparse_matmul", _IMPLEMENTATIONS, implementation, x, blocks, indices)
