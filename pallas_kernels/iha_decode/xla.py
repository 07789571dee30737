"""Interleaved Head Attention of one token in XLA, a page of each sequence at a time: what runs on a CPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.iha_decode.absorbed import absorbed_is_cheaper, turned_back
from pallas_kernels.iha_prefill.xla import iha_prefill, keys_in_sight, pages_in_sight
from pallas_kernels.paged import Pages
from pallas_kernels.pseudo_heads import PseudoHeads

type _State = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


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
    if absorbed_is_cheaper(keys.kv_heads, pseudo.count):
        return absorbed(q, keys, values, lengths, pseudo, scale=scale)
    return mixed(q, keys, values, lengths, pseudo, scale=scale)


def mixed(
    q: Float[Array, "batch q_heads pseudo head_dim"],
    keys: Pages,
    values: Pages,
    lengths: Int32[Array, " batch"],
    pseudo: PseudoHeads,
    *,
    scale: float,
) -> Float[Array, "batch q_heads pseudo head_dim"]:
    """`iha_decode` with the pseudo keys and values of each page."""
    counts = (lengths > 0).astype(jnp.int32)
    return iha_prefill(q[:, None], keys, values, lengths - 1, counts, pseudo, scale=scale)[:, 0]


def absorbed(
    q: Float[Array, "batch q_heads pseudo head_dim"],
    keys: Pages,
    values: Pages,
    lengths: Int32[Array, " batch"],
    pseudo: PseudoHeads,
    *,
    scale: float,
) -> Float[Array, "batch q_heads pseudo head_dim"]:
    """`iha_decode` with the raw keys and values of each page, in float32 or wider."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    precision = jax.lax.Precision.HIGHEST
    page_size = keys.page_size
    alpha_k, alpha_v = pseudo.alpha_k.astype(wide), pseudo.alpha_v.astype(wide)
    # One query of all source heads for each pair of pseudo heads: the sum over source heads is part of the product.
    queries = jnp.einsum("bhped,mhe->bhpemd", turned_back(q, pseudo) * jnp.asarray(scale, wide), alpha_k)
    slots = jnp.arange(page_size, dtype=jnp.int32)
    real = lengths > 0
    firsts, ends = keys_in_sight(lengths - 1, real.astype(jnp.int32), pseudo.tokens_in_sight)
    begin, pages = pages_in_sight(firsts, ends, real, page_size)

    def page(state: _State) -> _State:
        block, top, total, out = state
        positions = block * page_size + slots
        visible = pseudo.sees((lengths - 1)[:, None] - positions)  # [batch, page_size, pseudo, pseudo of the keys]
        written = (positions >= firsts[:, None]) & (positions < ends[:, None])
        k = keys.rows[keys.table[:, block]].astype(wide)
        # Unused slots hold anything, NaN included, and 0 * NaN would reach the sum.
        v = jnp.where(written[:, :, None, None], values.rows[values.table[:, block]], 0).astype(wide)
        scores = jnp.einsum("bhpemd,bkmd->bhpke", queries, k, precision=precision)
        scores = jnp.where(visible.transpose(0, 2, 1, 3)[:, None], scores, -jnp.inf)
        higher = jnp.maximum(top, jnp.max(scores, axis=(-2, -1)))
        base = jnp.where(jnp.isfinite(higher), higher, 0)
        weights = jnp.exp(scores - base[..., None, None])
        decay = jnp.exp(top - base)
        by_source = jnp.einsum("bhpke,mhe->bhpkm", weights, alpha_v, precision=precision)
        part = jnp.einsum("bhpkm,bkmd->bhpd", by_source, v, precision=precision)
        total = total * decay + jnp.sum(weights, axis=(-2, -1))
        return block + 1, higher, total, out * decay[..., None] + part

    none = jnp.full(q.shape[:3], -jnp.inf, wide)
    start = (begin, none, jnp.zeros(none.shape, wide), jnp.zeros(q.shape, wide))
    _, _, total, out = jax.lax.while_loop(lambda state: state[0] < pages, page, start)
    return (out / jnp.where(total > 0, total, 1)[..., None]).astype(q.dtype)
