"""Interleaved Head Attention by attention kernels that know nothing of pseudo heads.

With the pseudo keys of token n at the places `n * P + p` of a virtual sequence, the flat mask is the causal one, and
its window `window * P` places: what prefill and decode attention do already. So there is no second flash kernel. One
that mixed in its loop would read and mix the keys again for every block of queries, where a chunk mixes them once here.

What that costs is memory and traffic: pseudo keys and values are `P * q_heads / kv_heads` times the raw ones, are
written once and read by the kernel. They are made for some heads of some sequences at a time, within `GROUP_BYTES`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import cudnn as cudnn_attention
from pallas_kernels import target
from pallas_kernels.paged import Pages
from pallas_kernels.prefill_attention import mosaic as mosaic_attention
from pallas_kernels.pseudo_heads import PseudoHeads

type Attention = Callable[..., tuple[jax.Array, jax.Array]]

PAGE_SIZE = 128  # of the virtual sequences: one that all kernels of attention take, whatever the raw pages are
GROUP_BYTES = 256 * 2**20


def mosaic(
    q: Float[Array, "seqs chunk q_heads pseudo head_dim"],
    keys: Pages,
    values: Pages,
    starts: Int32[Array, " seqs"],
    counts: Int32[Array, " seqs"],
    pseudo: PseudoHeads,
    *,
    scale: float,
) -> Float[Array, "seqs chunk q_heads pseudo head_dim"]:
    """See `api.iha_prefill`; by the Mosaic kernel of prefill attention."""
    target.hopper()  # before anything is made
    return iha_prefill(mosaic_attention.prefill_attention, q, keys, values, starts, counts, pseudo, scale=scale)


def cudnn(
    q: Float[Array, "seqs chunk q_heads pseudo head_dim"],
    keys: Pages,
    values: Pages,
    starts: Int32[Array, " seqs"],
    counts: Int32[Array, " seqs"],
    pseudo: PseudoHeads,
    *,
    scale: float,
) -> Float[Array, "seqs chunk q_heads pseudo head_dim"]:
    """See `api.iha_prefill`; by cuDNN's attention."""
    cudnn_attention.check_device()
    return iha_prefill(cudnn_attention.prefill_attention, q, keys, values, starts, counts, pseudo, scale=scale)


def iha_prefill(
    attention: Attention,
    q: Float[Array, "seqs chunk q_heads pseudo head_dim"],
    keys: Pages,
    values: Pages,
    starts: Int32[Array, " seqs"],
    counts: Int32[Array, " seqs"],
    pseudo: PseudoHeads,
    *,
    scale: float,
) -> Float[Array, "seqs chunk q_heads pseudo head_dim"]:
    """`api.iha_prefill` by an implementation of `prefill_attention`."""
    if not q.size:
        raise NotImplementedError("no queries")

    def attend(
        q: Array, keys: Pages, values: Pages, starts: Array, counts: Array, pseudo: PseudoHeads
    ) -> Float[Array, "seqs chunk heads pseudo head_dim"]:
        attend_to = _in_order if pseudo.mask == "flat" else _by_pseudo_key
        return attend_to(attention, q, keys, values, starts, counts, pseudo, scale)

    return in_groups(attend, q, keys, values, starts, counts, pseudo)


def _in_order(
    attention: Attention,
    q: Float[Array, "seqs chunk heads pseudo head_dim"],
    keys: Pages,
    values: Pages,
    starts: Int32[Array, " seqs"],
    counts: Int32[Array, " seqs"],
    pseudo: PseudoHeads,
    scale: float,
) -> Float[Array, "seqs chunk heads pseudo head_dim"]:
    """The flat mask: causal attention to the virtual sequence."""
    seqs, chunk, heads, count, head_dim = q.shape
    k, v = virtual_pages(keys, values, pseudo, q.dtype)
    places = q.swapaxes(2, 3).reshape(seqs, chunk * count, heads, head_dim)
    window = window_of(pseudo.window, count, k.keys)
    out, _ = attention(places, k, v, starts * count, counts * count, scale=scale, window=window)
    return out.reshape(seqs, chunk, count, heads, head_dim).swapaxes(2, 3)


def _by_pseudo_key(
    attention: Attention,
    q: Float[Array, "seqs chunk heads pseudo head_dim"],
    keys: Pages,
    values: Pages,
    starts: Int32[Array, " seqs"],
    counts: Int32[Array, " seqs"],
    pseudo: PseudoHeads,
    scale: float,
) -> Float[Array, "seqs chunk heads pseudo head_dim"]:
    """The mask of whole tokens: causal attention of all pseudo queries to each pseudo key, merged by their sums."""
    seqs, chunk, heads, count, head_dim = q.shape
    # Pseudo queries of a head share its pseudo keys.
    queries = q.reshape(seqs, chunk, heads * count, head_dim)
    window = window_of(pseudo.window, 1, keys.keys)
    parts, sums = [], []
    for i in range(count):
        k, v = virtual_pages(keys, values, _only(pseudo, i), q.dtype)
        out, lse = attention(queries, k, v, starts, counts, scale=scale, window=window)
        parts.append(out)
        sums.append(lse)
    return merged(parts, sums).reshape(q.shape)


def _only(pseudo: PseudoHeads, i: int) -> PseudoHeads:
    """Keys and values of one pseudo head."""
    one = slice(i, i + 1)
    return PseudoHeads(
        pseudo.alpha_k[..., one],
        pseudo.alpha_v[..., one],
        pseudo.cos[one],
        pseudo.sin[one],
        mask=pseudo.mask,
        window=pseudo.window,
    )


def merged(
    parts: list[Float[Array, "*queries head_dim"]], sums: list[Float32[Array, "*queries"]]
) -> Float[Array, "*queries head_dim"]:
    """What attention to all keys gives, from that to parts of them and the logs of the sums of their weights."""
    lse = jnp.stack(sums)
    top = jnp.max(lse, axis=0)
    weights = jnp.exp(lse - jnp.where(jnp.isfinite(top), top, 0))
    total = jnp.sum(weights, axis=0)
    shares = weights / jnp.where(total > 0, total, 1)
    return jnp.sum(jnp.stack(parts) * shares[..., None], axis=0).astype(parts[0].dtype)


def window_of(window: int | None, count: int, places: int) -> int | None:
    """A window of tokens in places of a virtual sequence; None if it hides nothing, so that no large one overflows."""
    return None if window is None or window * count >= places else window * count


def virtual_pages(keys: Pages, values: Pages, pseudo: PseudoHeads, dtype: Any) -> tuple[Pages, Pages]:
    """Pseudo keys and values of all tokens of the tables in pages of their own, in the order of `n * P + p`."""
    seqs, heads, places = keys.table.shape[0], pseudo.alpha_k.shape[1], keys.keys * pseudo.count
    pages = -(-places // PAGE_SIZE)
    table = jnp.arange(seqs * pages, dtype=jnp.int32).reshape(seqs, pages)

    def laid_out(raw: Pages, mixed: Callable[[jax.Array], jax.Array]) -> Pages:
        tokens = raw.rows[raw.table].reshape(seqs, raw.keys, *raw.rows.shape[2:])
        made = mixed(tokens.astype(dtype)).swapaxes(2, 3).reshape(seqs, places, heads, -1)
        made = jnp.pad(made, ((0, 0), (0, pages * PAGE_SIZE - places), (0, 0), (0, 0)))
        return Pages(made.reshape(seqs * pages, PAGE_SIZE, heads, -1), table)

    return laid_out(keys, pseudo.keys), laid_out(values, pseudo.values)


def in_groups(
    attend: Callable[[Array, Pages, Pages, Array, Array, PseudoHeads], jax.Array],
    q: Float[Array, "seqs chunk q_heads pseudo head_dim"],
    keys: Pages,
    values: Pages,
    starts: Int32[Array, " seqs"],
    counts: Int32[Array, " seqs"],
    pseudo: PseudoHeads,
) -> Float[Array, "seqs chunk q_heads pseudo head_dim"]:
    """Calls `attend` with some heads of some sequences at a time, one call after the other.

    Args:
      attend: takes what follows it, of fewer sequences and heads; the rows of the pages stay whole.
    """
    seqs, _, q_heads, count, head_dim = q.shape
    some_seqs, some_heads = group_sizes(
        seqs, q_heads, keys.keys * head_dim, keys.kv_heads, count, jnp.dtype(q.dtype).itemsize
    )

    def of_seqs(of: tuple[Array, ...]) -> Array:
        q, k_table, v_table, starts, counts = of
        k, v = Pages(keys.rows, k_table), Pages(values.rows, v_table)

        def of_heads(of: tuple[Array, ...]) -> jax.Array:
            q, alpha_k, alpha_v = of
            group = PseudoHeads(alpha_k, alpha_v, pseudo.cos, pseudo.sin, mask=pseudo.mask, window=pseudo.window)
            return attend(q, k, v, starts, counts, group)

        cut = tuple(_cut(x, axis, some_heads) for x, axis in ((q, 2), (pseudo.alpha_k, 1), (pseudo.alpha_v, 1)))
        return jnp.moveaxis(_one_by_one(of_heads, cut), 0, 2).reshape(q.shape)

    arrays = (q, keys.table, values.table, starts, counts)
    return _one_by_one(of_seqs, tuple(_cut(x, 0, some_seqs) for x in arrays)).reshape(q.shape)


def group_sizes(
    seqs: int, q_heads: int, numbers: int, kv_heads: int, count: int, itemsize: int, limit: int = GROUP_BYTES
) -> tuple[int, int]:
    """Sequences and heads of a call: divisors, the most that keep what is made for it within `limit` bytes.

    Args:
      numbers: of the keys of one head of a sequence.
      itemsize: of such a number.
    """

    def fits(seqs: int, heads: int) -> bool:
        # Of keys and of values, one after the other in float32 first: raw ones, and pseudo ones.
        return seqs * numbers * (kv_heads + heads * count) * (2 * itemsize + 4) <= limit

    some_seqs = max((n for n in range(1, seqs + 1) if seqs % n == 0 and fits(n, 1)), default=1)
    some_heads = max((n for n in range(1, q_heads + 1) if q_heads % n == 0 and fits(some_seqs, n)), default=1)
    return some_seqs, some_heads


def _cut(x: Array, axis: int, size: int) -> Array:
    """Groups of `size` along an axis, in front: `[groups, ...]`."""
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :]), axis, 0)


def _one_by_one(function: Callable[[tuple[Array, ...]], Array], arrays: tuple[Array, ...]) -> Array:
    """`jax.lax.map`; without a loop where there is one group."""
    if arrays[0].shape[0] == 1:
        return function(tuple(x[0] for x in arrays))[None]
    mapped: Array = jax.lax.map(function, arrays)
    return mapped
