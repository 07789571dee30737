"""The plain specification: unpack, then multiply."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt16

from pallas_kernels.sparse_matmul.packing import unpack


def sparse_matmul(
    x: Float[Array, "M K"], values: Float[Array, "V N G"], mask: UInt16[Array, "N G"], *, of: int
) -> Float[Array, "M N"]:
    """See `api.sparse_matmul`."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.dot(x, unpack(values, mask, of), precision=precision)
