"""Prefill attention in plain XLA over gathered pages: the specification of the operation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


def prefill_attention(
    q: Float[Array, "seqs chunk q_heads head_dim"],
    k_pages: Float[Array, "rows page_size kv_heads head_dim"],
    v_pages: Float[Array, "v_rows page_size kv_heads head_dim"],
    k_table: Int32[Array, "seqs width"],
    v_table: Int32[Array, "seqs width"],
    starts: Int32[Array, " seqs"],
    counts: Int32[Array, " seqs"],
    scale: float,
    window: int | None = None,
) -> Float[Array, "seqs chunk q_heads head_dim"]:
    """See `api.prefill_attention`."""
    seqs, chunk, q_heads, head_dim = q.shape
    _, page_size, kv_heads, _ = k_pages.shape
    keys = k_table.shape[1] * page_size
    key_positions = jnp.arange(keys, dtype=jnp.int32)
    offsets = jnp.arange(chunk, dtype=jnp.int32)
    real = offsets[None, :] < counts[:, None]
    query_positions = (starts[:, None] + offsets[None, :])[:, :, None]
    visible = (key_positions[None, None, :] <= query_positions) & real[:, :, None]
    written = key_positions[None, :] < (starts + counts)[:, None]
    if window is not None:
        visible &= key_positions[None, None, :] > query_positions - window
        written &= key_positions[None, :] > starts[:, None] - window

    k = k_pages[k_table].reshape(seqs, keys, kv_heads, head_dim)
    # Unused slots hold anything, NaN included, and 0 * NaN would reach the sum.
    v = jnp.where(written[:, :, None, None], v_pages[v_table].reshape(seqs, keys, kv_heads, head_dim), 0)
    grouped = q.reshape(seqs, chunk, kv_heads, q_heads // kv_heads, head_dim)
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    scores = jnp.einsum(
        "sqhgd,skhd->shgqk", grouped, k, precision=precision, preferred_element_type=jnp.float32
    ) * jnp.float32(scale)
    scores = jnp.where(visible[:, None, None, :, :], scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = (weights / jnp.where(total > 0, total, 1)).astype(q.dtype)
    out = jnp.einsum("shgqk,skhd->sqhgd", weights, v, precision=precision, preferred_element_type=jnp.float32)
    return out.reshape(q.shape).astype(q.dtype)
