"""Dense causal attention over whole sequences: what a model is trained and checked with."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from models.layers import Attend, matmul_precision


def causal_attention(
    q: Float[Array, "B L Hq d"], k: Float[Array, "B L Hkv d"], v: Float[Array, "B L Hkv d"]
) -> Float[Array, "B L Hq d"]:
    """Attention of each position over itself and the ones before, scale `1 / sqrt(d)`, softmax in float32.

    Takes `B * Hq * L * L` floats of memory.

    Args:
      q: `[batch, length, query heads, head_dim]`; query heads are a multiple of the key-value heads.
      k, v: `[batch, length, key-value heads, head_dim]`.
    """
    batch, length, heads, head_dim = q.shape
    precision = matmul_precision(q.dtype)
    grouped = q.reshape(batch, length, k.shape[2], -1, head_dim)
    scores = jnp.einsum("blhgd,bmhd->bhglm", grouped, k, precision=precision).astype(jnp.float32) / math.sqrt(head_dim)
    causal = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1).astype(v.dtype)
    out = jnp.einsum("bhglm,bmhd->blhgd", weights, v, precision=precision)
    return out.reshape(batch, length, heads, head_dim)


def dense_attend(batch: int, length: int) -> Attend:
    """An `attend` for `batch` whole sequences of `length` tokens, flattened batch first; the cache passes unused."""

    def attend(
        _layer: int, q: Float[Array, "T Hq d"], k: Float[Array, "T Hkv d"], v: Float[Array, "T Hkv d"], cache: Any
    ) -> tuple[Float[Array, "T Hq d"], Any]:
        q, k, v = (x.reshape(batch, length, *x.shape[1:]) for x in (q, k, v))
        out = causal_attention(q, k, v)
        return out.reshape(batch * length, *out.shape[2:]), cache

    return attend
