"""Interleaved Head Attention of chunks in XLA, a page of each sequence at a time: what runs on a CPU.

As in `prefill_attention.xla`, time follows the longest sequence, and what is gathered is a page of each sequence. Its
pseudo keys and values are mixed when it comes, once for all queries of the chunk. Pages before the first key in sight
are passed over.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.paged import Pages
from pallas_kernels.pseudo_heads import PseudoHeads

type _State = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


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
    page_size = keys.page_size
    by_head = q.transpose(0, 2, 3, 1, 4)  # [seqs, q_heads, pseudo, chunk, head_dim]
    offsets = jnp.arange(q.shape[1], dtype=jnp.int32)
    real = offsets[None, :] < counts[:, None]
    queries = starts[:, None] + offsets[None, :]
    slots = jnp.arange(page_size, dtype=jnp.int32)
    firsts, ends = keys_in_sight(starts, counts, pseudo.tokens_in_sight)
    begin, pages = pages_in_sight(firsts, ends, counts > 0, page_size)

    def page(state: _State) -> _State:
        block, top, total, out = state
        positions = block * page_size + slots
        visible = pseudo.sees(queries[:, :, None] - positions) & real[:, :, None, None, None]
        written = (positions >= firsts[:, None]) & (positions < ends[:, None])
        k = pseudo.keys(keys.rows[keys.table[:, block]].astype(q.dtype))
        # Unused slots hold anything, NaN included, and 0 * NaN would reach the sum.
        raw = jnp.where(written[:, :, None, None], values.rows[values.table[:, block]], 0)
        v = pseudo.values(raw.astype(q.dtype))
        scores = jnp.einsum("shpqd,skhed->shpqke", by_head, k, precision=precision, preferred_element_type=wide)
        visible = visible.transpose(0, 3, 1, 2, 4)[:, None]
        scores = jnp.where(visible, scores * jnp.asarray(scale, wide), -jnp.inf)
        higher = jnp.maximum(top, jnp.max(scores, axis=(-2, -1)))
        base = jnp.where(jnp.isfinite(higher), higher, 0)
        weights = jnp.exp(scores - base[..., None, None])
        decay = jnp.exp(top - base)
        part = jnp.einsum(
            "shpqke,skhed->shpqd", weights.astype(q.dtype), v, precision=precision, preferred_element_type=wide
        )
        total = total * decay + jnp.sum(weights, axis=(-2, -1))
        return block + 1, higher, total, out * decay[..., None] + part

    none = jnp.full(by_head.shape[:4], -jnp.inf, wide)
    start = (begin, none, jnp.zeros(none.shape, wide), jnp.zeros(by_head.shape, wide))
    _, _, total, out = jax.lax.while_loop(lambda state: state[0] < pages, page, start)
    out = out / jnp.where(total > 0, total, 1)[..., None]
    return out.transpose(0, 3, 1, 2, 4).astype(q.dtype)


def keys_in_sight(
    starts: Int32[Array, " seqs"], counts: Int32[Array, " seqs"], tokens_in_sight: int | None
) -> tuple[Int32[Array, " seqs"], Int32[Array, " seqs"]]:
    """Position of the first key that some query of a chunk sees, and of the one past the last."""
    firsts = jnp.zeros_like(starts) if tokens_in_sight is None else jnp.maximum(starts - tokens_in_sight + 1, 0)
    return firsts, jnp.where(counts > 0, starts + counts, 0)


def pages_in_sight(
    firsts: Int32[Array, " seqs"], ends: Int32[Array, " seqs"], real: Array, page_size: int
) -> tuple[Int32[Array, ""], Int32[Array, ""]]:
    """Index of the first page with a key in sight of any real sequence, and of the one past the last."""
    pages = -(-jnp.max(ends, initial=0) // page_size)
    begin = jnp.min(jnp.where(real, firsts, jnp.iinfo(jnp.int32).max), initial=jnp.iinfo(jnp.int32).max) // page_size
    return begin, pages
