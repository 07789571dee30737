"""The plain specification: unpack, then multiply."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.block_sparse_matmul.packing import unpack_blocks


def block_sparse_matmul(
    x: Float[Array, "M K"], blocks: Float[Array, "P k b b"], indices: Int32[Array, "P k"]
) -> Float[Array, "M N"]:
    """See `api.block_sparse_matmul`."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.dot(x, unpack_blocks(blocks, indices, x.shape[1]), precision=precision)
