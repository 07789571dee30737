"""Inputs gathered for each block of outputs, and one dense product of each.

Work and what is read of weights are in proportion to the blocks; what is gathered of x is `M * kept * b` for each block
of outputs, so that many rows are better off with dense weights.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


def block_sparse_matmul(
    x: Float[Array, "M K"], blocks: Float[Array, "P k b b"], indices: Int32[Array, "P k"]
) -> Float[Array, "M N"]:
    """See `api.block_sparse_matmul`."""
    rows, (parts, kept, size, _) = x.shape[0], blocks.shape
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    gathered = x.reshape(rows, -1, size).swapaxes(0, 1)[indices]  # [P, k, M, b]
    gathered = gathered.swapaxes(1, 2).reshape(parts, rows, kept * size)
    weights = blocks.reshape(parts, kept * size, size)
    # Put in order afterwards: a product that writes its rows apart takes more than twice as long on a CPU.
    out = jnp.einsum("pmi,pio->pmo", gathered, weights, precision=precision)
    return out.swapaxes(0, 1).reshape(rows, parts * size)
