"""Retrieval scores as specified: in plain XLA over gathered pages."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.paged import Pages
from pallas_kernels.prefill_attention.reference import gathered


def retrieval_scores(
    q: Float[Array, "batch q_heads head_dim"],
    keys: Pages,
    lengths: Int32[Array, " batch"],
    lse: Float32[Array, "batch q_heads"],
    weights: Float32[Array, "batch q_heads"],
    *,
    scale: float,
) -> Float32[Array, "batch keys"]:
    """See `api.retrieval_scores`."""
    batch, q_heads, head_dim = q.shape
    grouped = q.reshape(batch, keys.kv_heads, q_heads // keys.kv_heads, head_dim)
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    scores = jnp.einsum(
        "bhgd,bkhd->bhgk",
        grouped,
        gathered(keys).astype(q.dtype),
        precision=precision,
        preferred_element_type=jnp.float32,
    ) * jnp.float32(scale)
    by_group = (batch, keys.kv_heads, q_heads // keys.kv_heads, 1)
    seen = jnp.arange(keys.keys) < lengths[:, None]
    shifted = jnp.where(seen[:, None, None, :], scores - lse.reshape(by_group), -jnp.inf)
    # A head without a weight adds nothing, whatever it sees.
    part = jnp.where(weights.reshape(by_group) != 0, weights.reshape(by_group) * jnp.exp(shifted), 0.0)
    return part.sum(axis=(1, 2))
