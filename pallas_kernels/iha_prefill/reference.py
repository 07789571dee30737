"""Interleaved Head Attention of chunks in plain XLA over gathered pages: the specification of the operation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.paged import Pages
from pallas_kernels.prefill_attention.reference import gathered
from pallas_kernels.pseudo_heads import PseudoHeads


def iha_prefill(
    q: Float[Array, "seqs chunk q_heads pseudo head_dim"],
    keys: Pages,
    values: Pages,
    starts: Int32[Array, " seqs"],
    counts: Int32[Array, " seqs"],
    pseudo: PseudoHeads,
    *,
    scale: float,
) -> Float[Array, "seqs chunk q_heads pseudo head_dim"]:
    """See `api.iha_prefill`."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    precision = jax.lax.Precision.HIGHEST if q.dtype == wide else None
    positions = jnp.arange(keys.keys, dtype=jnp.int32)
    offsets = jnp.arange(q.shape[1], dtype=jnp.int32)
    real = offsets[None, :] < counts[:, None]
    behind = (starts[:, None] + offsets[None, :])[:, :, None] - positions[None, None, :]
    visible = pseudo.sees(behind) & real[:, :, None, None, None]  # [seqs, chunk, keys, pseudo, pseudo of the keys]
    written = positions[None, :] < (starts + counts)[:, None]
    if pseudo.tokens_in_sight is not None:
        written &= positions[None, :] > starts[:, None] - pseudo.tokens_in_sight

    k = pseudo.keys(gathered(keys).astype(q.dtype))
    # Unused slots hold anything, NaN included, and 0 * NaN would reach the sum.
    v = pseudo.values(jnp.where(written[:, :, None, None], gathered(values), 0).astype(q.dtype))
    scores = jnp.einsum("sqhpd,skhed->sqhpke", q, k, precision=precision, preferred_element_type=wide)
    visible = visible.transpose(0, 1, 3, 2, 4)[:, :, None]
    scores = jnp.where(visible, scores * jnp.asarray(scale, wide), -jnp.inf)
    top = jnp.max(scores, axis=(-2, -1), keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0))
    total = jnp.sum(weights, axis=(-2, -1), keepdims=True)
    weights = (weights / jnp.where(total > 0, total, 1)).astype(q.dtype)
    out = jnp.einsum("sqhpke,skhed->sqhpd", weights, v, precision=precision, preferred_element_type=wide)
    return out.astype(q.dtype)
