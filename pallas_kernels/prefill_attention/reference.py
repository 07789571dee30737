"""Prefill attention in plain XLA over gathered pages: the specification of the operation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.key_bias import KeyBias
from pallas_kernels.paged import Pages


def prefill_attention(
    q: Float[Array, "seqs chunk q_heads head_dim"],
    keys: Pages,
    values: Pages,
    starts: Int32[Array, " seqs"],
    counts: Int32[Array, " seqs"],
    *,
    scale: float,
    window: int | None = None,
    key_bias: KeyBias | None = None,
) -> tuple[Float[Array, "seqs chunk q_heads head_dim"], Float32[Array, "seqs chunk q_heads"]]:
    """See `api.prefill_attention`."""
    seqs, chunk, q_heads, head_dim = q.shape
    positions = jnp.arange(keys.keys, dtype=jnp.int32)
    offsets = jnp.arange(chunk, dtype=jnp.int32)
    real = offsets[None, :] < counts[:, None]
    query_positions = (starts[:, None] + offsets[None, :])[:, :, None]
    visible = (positions[None, None, :] <= query_positions) & real[:, :, None]
    written = positions[None, :] < (starts + counts)[:, None]
    if window is not None:
        visible &= positions[None, None, :] > query_positions - window
        written &= positions[None, :] > starts[:, None] - window

    k = gathered(keys).astype(q.dtype)
    # Unused slots hold anything, NaN included, and 0 * NaN would reach the sum.
    v = jnp.where(written[:, :, None, None], gathered(values), 0).astype(q.dtype)
    grouped = q.reshape(seqs, chunk, keys.kv_heads, q_heads // keys.kv_heads, head_dim)
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    scores = jnp.einsum(
        "sqhgd,skhd->shgqk", grouped, k, precision=precision, preferred_element_type=jnp.float32
    ) * jnp.float32(scale)
    if key_bias is not None:
        scores += key_bias.at(positions)[:, None, None, None, :]
    scores = jnp.where(visible[:, None, None, :, :], scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    lse = (top + jnp.log(total))[..., 0].transpose(0, 3, 1, 2).reshape(q.shape[:3])
    weights = (weights / jnp.where(total > 0, total, 1)).astype(q.dtype)
    out = jnp.einsum("shgqk,skhd->sqhgd", weights, v, precision=precision, preferred_element_type=jnp.float32)
    return out.reshape(q.shape).astype(q.dtype), lse


def gathered(pages: Pages) -> Float[Array, "seqs keys kv_heads head_dim"]:
    """Keys or values in token order, multiplied by their scales."""
    rows = pages.rows[pages.table]
    if pages.scales is not None:
        rows = rows.astype(jnp.float32) * pages.scales[pages.table].swapaxes(2, 3)[..., None]
    return rows.reshape(rows.shape[0], pages.keys, *rows.shape[3:])
