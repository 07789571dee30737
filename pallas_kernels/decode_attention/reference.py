"""Decode attention in plain XLA over gathered pages: the specification of the operation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


def decode_attention(
    q: Float[Array, "batch q_heads head_dim"],
    k_pages: Float[Array, "rows page_size kv_heads head_dim"],
    v_pages: Float[Array, "v_rows page_size kv_heads head_dim"],
    k_table: Int32[Array, "batch width"],
    v_table: Int32[Array, "batch width"],
    lengths: Int32[Array, " batch"],
    scale: float,
    window: int | None = None,
) -> Float[Array, "batch q_heads head_dim"]:
    """See `api.decode_attention`."""
    batch, q_heads, head_dim = q.shape
    _, page_size, kv_heads, _ = k_pages.shape
    keys = k_table.shape[1] * page_size
    positions = jnp.arange(keys, dtype=jnp.int32)[None, :]
    visible = positions < lengths[:, None]
    if window is not None:
        visible &= positions >= lengths[:, None] - window

    k = k_pages[k_table].reshape(batch, keys, kv_heads, head_dim)
    # Unused slots hold anything, NaN included, and 0 * NaN would reach the sum.
    v = jnp.where(visible[:, :, None, None], v_pages[v_table].reshape(batch, keys, kv_heads, head_dim), 0)
    grouped = q.reshape(batch, kv_heads, q_heads // kv_heads, head_dim)
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    scores = jnp.einsum(
        "bhgd,bkhd->bhgk", grouped, k, precision=precision, preferred_element_type=jnp.float32
    ) * jnp.float32(scale)
    scores = jnp.where(visible[:, None, None, :], scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = (weights / jnp.where(total > 0, total, 1)).astype(q.dtype)
    out = jnp.einsum("bhgk,bkhd->bhgd", weights, v, precision=precision, preferred_element_type=jnp.float32)
    return out.reshape(q.shape).astype(q.dtype)
