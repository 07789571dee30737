"""Decode attention as specified: prefill attention of chunks of one token, in plain XLA over gathered pages."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.key_bias import KeyBias
from pallas_kernels.paged import Pages
from pallas_kernels.prefill_attention import reference


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
    counts = (lengths > 0).astype(jnp.int32)
    out, lse = reference.prefill_attention(
        q[:, None], keys, values, lengths - 1, counts, scale=scale, window=window, key_bias=key_bias
    )
    return out[:, 0], lse[:, 0]
