"""Interleaved Head Attention of one token as specified: chunks of one token, in plain XLA over gathered pages."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.iha_prefill import reference
from pallas_kernels.paged import Pages
from pallas_kernels.pseudo_heads import PseudoHeads


def iha_decode(
    q: Float[Array, "batch q_heads pseudo head_dim"],
    keys: Pages,
    values: Pages,
    lengths: Int32[Array, " batch"],
    pseudo: PseudoHeads,
    *,
    scale: float,
) -> Float[Array, "batch q_heads pseudo head_dim"]:
    """See `api.iha_decode`."""
    counts = (lengths > 0).astype(jnp.int32)
    return reference.iha_prefill(q[:, None], keys, values, lengths - 1, counts, pseudo, scale=scale)[:, 0]
