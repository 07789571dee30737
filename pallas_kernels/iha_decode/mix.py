"""Interleaved Head Attention of one token by decode attention to pseudo keys and values, made when they are needed.

Pseudo heads of a query head share its pseudo keys as the query heads of a group do, with one reservation: under the
flat mask they don't see the same of their own token and, with a window, of the token where it ends. Those two tokens
are attended to apart, and both results are merged by their sums.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import cudnn as cudnn_attention
from pallas_kernels import target
from pallas_kernels.decode_attention import mosaic as mosaic_attention
from pallas_kernels.iha_prefill.virtual import Attention, in_groups, merged, virtual_pages, window_of
from pallas_kernels.paged import Pages
from pallas_kernels.pseudo_heads import PseudoHeads


def mosaic(
    q: Float[Array, "batch q_heads pseudo head_dim"],
    keys: Pages,
    values: Pages,
    lengths: Int32[Array, " batch"],
    pseudo: PseudoHeads,
    *,
    scale: float,
) -> Float[Array, "batch q_heads pseudo head_dim"]:
    """See `api.iha_decode`; by the Mosaic kernel of decode attention."""
    target.hopper()  # before anything is made
    return iha_decode(mosaic_attention.decode_attention, q, keys, values, lengths, pseudo, scale=scale)


def cudnn(
    q: Float[Array, "batch q_heads pseudo head_dim"],
    keys: Pages,
    values: Pages,
    lengths: Int32[Array, " batch"],
    pseudo: PseudoHeads,
    *,
    scale: float,
) -> Float[Array, "batch q_heads pseudo head_dim"]:
    """See `api.iha_decode`; by cuDNN's attention."""
    cudnn_attention.check_device()
    return iha_decode(cudnn_attention.decode_attention, q, keys, values, lengths, pseudo, scale=scale)


def iha_decode(
    attention: Attention,
    q: Float[Array, "batch q_heads pseudo head_dim"],
    keys: Pages,
    values: Pages,
    lengths: Int32[Array, " batch"],
    pseudo: PseudoHeads,
    *,
    scale: float,
) -> Float[Array, "batch q_heads pseudo head_dim"]:
    """`api.iha_decode` by an implementation of `decode_attention`."""
    if not q.size:
        raise NotImplementedError("no queries")

    def attend(
        q: Array, keys: Pages, values: Pages, starts: Array, counts: Array, pseudo: PseudoHeads
    ) -> Float[Array, "batch one heads pseudo head_dim"]:
        return _attend(attention, q[:, 0], keys, values, starts + counts, pseudo, scale)[:, None]

    real = (lengths > 0).astype(jnp.int32)
    return in_groups(attend, q[:, None], keys, values, lengths - real, real, pseudo)[:, 0]


def _attend(
    attention: Attention,
    q: Float[Array, "batch heads pseudo head_dim"],
    keys: Pages,
    values: Pages,
    lengths: Int32[Array, " batch"],
    pseudo: PseudoHeads,
    scale: float,
) -> Float[Array, "batch heads pseudo head_dim"]:
    """Of some heads."""
    batch, heads, count, head_dim = q.shape
    queries = q.reshape(batch, heads * count, head_dim)
    if pseudo.mask == "token" or count == 1:
        k, v = virtual_pages(keys, values, pseudo, q.dtype)
        window = window_of(pseudo.window, count, k.keys)
        return attention(queries, k, v, lengths * count, scale=scale, window=window)[0].reshape(q.shape)
    edges, edges_lse = _edges(q, keys, values, lengths, pseudo, scale)
    if pseudo.window == 1:
        return edges
    k, v = virtual_pages(keys, values, pseudo, q.dtype)
    # All pseudo queries see all of these tokens, behind the newest one.
    window = window_of(None if pseudo.window is None else pseudo.window - 1, count, k.keys)
    past, past_lse = attention(queries, k, v, jnp.maximum(lengths - 1, 0) * count, scale=scale, window=window)
    return merged([edges, past.reshape(q.shape)], [edges_lse, past_lse.reshape(q.shape[:3])])


def _edges(
    q: Float[Array, "batch heads pseudo head_dim"],
    keys: Pages,
    values: Pages,
    lengths: Int32[Array, " batch"],
    pseudo: PseudoHeads,
    scale: float,
) -> tuple[Float[Array, "batch heads pseudo head_dim"], Float32[Array, "batch heads pseudo"]]:
    """Attention to the newest token and to the one where the window ends, and the log of the sum of its weights."""
    behind = jnp.asarray([0] if pseudo.window is None else [0, pseudo.window], jnp.int32)
    at = (lengths - 1)[:, None] - behind[None, :]
    exists = at >= 0

    def tokens(pages: Pages) -> Float[Array, "batch tokens kv_heads head_dim"]:
        place = jnp.maximum(at, 0)
        rows = jnp.take_along_axis(pages.table, place // pages.page_size, axis=1)
        return jnp.where(exists[..., None, None], pages.rows[rows, place % pages.page_size], 0).astype(q.dtype)

    k, v = pseudo.keys(tokens(keys)), pseudo.values(tokens(values))
    scores = jnp.einsum("bhpd,bnhed->bhpne", q, k, preferred_element_type=jnp.float32) * jnp.float32(scale)
    visible = pseudo.sees(behind).transpose(1, 0, 2)[None, None] & exists[:, None, None, :, None]
    scores = jnp.where(visible, scores, -jnp.inf)
    top = jnp.max(scores, axis=(-2, -1))
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0)[..., None, None])
    total = jnp.sum(weights, axis=(-2, -1))
    out = jnp.einsum("bhpne,bnhed->bhpd", weights.astype(q.dtype), v, preferred_element_type=jnp.float32)
    # What is merged is of one type.
    out = (out / jnp.where(total > 0, total, 1)[..., None]).astype(q.dtype)
    return out, top + jnp.log(total)
