"""Decode attention in XLA: prefill attention of chunks of one token. What runs on a CPU."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.prefill_attention import xla


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
    counts = (lengths > 0).astype(jnp.int32)
    out = xla.prefill_attention(q[:, None], k_pages, v_pages, k_table, v_table, lengths - 1, counts, scale, window)
    return out[:, 0]
