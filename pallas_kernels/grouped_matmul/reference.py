"""The plain specification: every row with every matrix, masked."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


def grouped_matmul(
    lhs: Float[Array, "M K"], rhs: Float[Array, "E K N"], group_sizes: Int32[Array, " E"]
) -> Float[Array, "M N"]:
    """`out[m] = lhs[m] @ rhs[group of m]`, zero beyond the last group; see `api.grouped_matmul`."""
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(lhs.shape[0])
    member = (row < ends[:, None]) & (row >= (ends - group_sizes)[:, None])
    spread = jnp.where(member[:, :, None], lhs[None], 0)
    precision = jax.lax.Precision.HIGHEST if lhs.dtype == jnp.float32 else None
    return jnp.einsum("emk,ekn->mn", spread, rhs, precision=precision)
