"""Dense causal attention over whole sequences: what a model is trained and checked with."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from models.iha import virtual_heads, virtual_window
from models.layers import Attend, matmul_precision
from pallas_kernels.pseudo_heads import PseudoHeads


def causal_attention(
    q: Float[Array, "B L Hq d"],
    k: Float[Array, "B L Hkv d"],
    v: Float[Array, "B L Hkv d"],
    window: int | None = None,
    span: int = 1,
) -> Float[Array, "B L Hq d"]:
    """Attention of each position over itself and the ones before, scale `1 / sqrt(d)`, softmax in float32 or wider.

    Takes `B * Hq * L * L` floats of memory.

    Args:
      q: `[batch, length, query heads, head_dim]`; query heads are a multiple of the key-value heads.
      k, v: `[batch, length, key-value heads, head_dim]`.
      window: keys that a query sees at most, its own position's included; None for all.
      span: neighbouring positions that count as one, for what is seen and for the window.
    """
    batch, length, heads, head_dim = q.shape
    precision = matmul_precision(q.dtype)
    grouped = q.reshape(batch, length, k.shape[2], -1, head_dim)
    scores = jnp.einsum("blhgd,bmhd->bhglm", grouped, k, precision=precision) / math.sqrt(head_dim)
    scores = scores.astype(jnp.promote_types(q.dtype, jnp.float32))
    at = jnp.arange(length) // span
    visible = at[None, :] <= at[:, None]
    if window is not None:
        visible &= at[None, :] > at[:, None] - window
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1).astype(v.dtype)
    out = jnp.einsum("bhglm,bmhd->blhgd", weights, v, precision=precision)
    return out.reshape(batch, length, heads, head_dim)


def dense_attend(batch: int, length: int, windows: Sequence[int | None] = ()) -> Attend:
    """An `attend` for `batch` whole sequences of `length` tokens, flattened batch first; the cache passes unused.

    Args:
      batch, length: of the sequences.
      windows: `ModelConfig.layer_windows`.
    """

    def attend(
        layer: int,
        q: Float[Array, "T Hq *P d"],
        k: Float[Array, "T Hkv d"],
        v: Float[Array, "T Hkv d"],
        cache: Any,
        pseudo: PseudoHeads | None = None,
    ) -> tuple[Float[Array, "T Hq *P d"], Any]:
        if pseudo is not None:
            return pseudo_attention(batch, q, k, v, pseudo), cache
        q, k, v = (x.reshape(batch, length, *x.shape[1:]) for x in (q, k, v))
        out = causal_attention(q, k, v, windows[layer] if windows else None)
        return out.reshape(batch * length, *out.shape[2:]), cache

    return attend


def pseudo_attention(
    batch: int,
    q: Float[Array, "T H P d"],
    k: Float[Array, "T Hkv d"],
    v: Float[Array, "T Hkv d"],
    pseudo: PseudoHeads,
    *,
    library: bool = False,
) -> Float[Array, "T H P d"]:
    """Attention of the pseudo heads of `batch` whole sequences of equal length over themselves.

    Args:
      batch: sequences, which lie one after the other.
      q: rotated pseudo queries.
      k: raw keys, rotated for their tokens.
      v: raw values.
      pseudo: makes pseudo keys and values of them.
      library: by `jax.nn.dot_product_attention` (cuDNN on a GPU), which takes the flat mask only.

    Raises:
      ValueError: the library and another mask.
    """
    tokens, heads, count, head_dim = q.shape
    q, k, v = (x.reshape(batch, -1, heads, head_dim) for x in virtual_heads(q, k, v, pseudo))
    window, span = virtual_window(pseudo)
    if library:
        if pseudo.mask != "flat":
            raise ValueError(f"mask is {pseudo.mask!r}; the library's attention takes the flat mask")
        local = None if window is None else (window - 1, 0)
        out = jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=local)
    else:
        out = causal_attention(q, k, v, window=window, span=span)
    return out.reshape(tokens, count, heads, head_dim).swapaxes(1, 2)
