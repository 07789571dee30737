"""Decode attention in plain XLA over gathered pages: the specification of the operation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.key_bias import KeyBias
from pallas_kernels.paged import Pages
from pallas_kernels.prefill_attention.reference import gathered


def decode_attention(
    q: Float[Array, "batch q_heads head_dim"],
    keys: Pages,
    values: Pages,
    lengths: Int32[Array, " batch"],
    *,
    scale: float,
    window: int | None = None,
    key_bias: KeyBias | None = None,
) -> tuple[Float[Array, "batch q_heads head_dim"], Float32[Array, "batch q_heads"]]:
    """See `api.decode_attention`."""
    batch, q_heads, head_dim = q.shape
    positions = jnp.arange(keys.keys, dtype=jnp.int32)
    visible = positions[None, :] < lengths[:, None]
    if window is not None:
        visible &= positions[None, :] >= lengths[:, None] - window

    k = gathered(keys).astype(q.dtype)
    # Unused slots hold anything, NaN included, and 0 * NaN would reach the sum.
    v = jnp.where(visible[:, :, None, None], gathered(values), 0).astype(q.dtype)
    grouped = q.reshape(batch, keys.kv_heads, q_heads // keys.kv_heads, head_dim)
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    scores = jnp.einsum(
        "bhgd,bkhd->bhgk", grouped, k, precision=precision, preferred_element_type=jnp.float32
    ) * jnp.float32(scale)
    if key_bias is not None:
        scores += key_bias.at(positions)[:, None, None, :]
    scores = jnp.where(visible[:, None, None, :], scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    lse = (top + jnp.log(total)).reshape(batch, q_heads)
    weights = (weights / jnp.where(total > 0, total, 1)).astype(q.dtype)
    out = jnp.einsum("bhgk,bkhd->bhgd", weights, v, precision=precision, preferred_element_type=jnp.float32)
    return out.reshape(q.shape).astype(q.dtype), lse
