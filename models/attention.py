"""Dense causal attention over whole sequences: what a model is trained and checked with."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from models.layers import Attend, matmul_precision


def causal_attention(
    q: Float[Array, "B L Hq d"],
    k: Float[Array, "B L Hkv d"],
    v: Float[Array, "B L Hkv d"],
    window: int | None = None,
) -> Float[Array, "B L Hq d"]:
    """Attention of each position over itself and the ones before, scale `1 / sqrt(d)`, softmax in float32.

    Takes `B * Hq * L * L` floats of memory.

    Args:
      q: `[batch, length, query heads, head_dim]`; query heads are a multiple of the key-value heads.
      k, v: `[batch, length, key-value heads, head_dim]`.
      window: keys that a query sees at most, its own position's included; None for all.
    """
    batch, length, heads, head_dim = q.shape
    precision = matmul_precision(q.dtype)
    grouped = q.reshape(batch, length, k.shape[2], -1, head_dim)
    scores = jnp.einsum("blhgd,bmhd->bhglm", grouped, k, precision=precision).astype(jnp.float32) / math.sqrt(head_dim)
    visible = jnp.tril(jnp.ones((length, length), bool))
    if window is not None:
        visible &= ~jnp.tril(visible, -window)
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
        layer: int, q: Float[Array, "T Hq d"], k: Float[Array, "T Hkv d"], v: Float[Array, "T Hkv d"], cache: Any
    ) -> tuple[Float[Array, "T Hq d"], Any]:
        q, k, v = (x.reshape(batch, length, *x.shape[1:]) for x in (q, k, v))
        out = causal_attention(q, k, v, windows[layer] if windows else None)
        return out.reshape(batch * length, *out.shape[2:]), cache

    return attend
