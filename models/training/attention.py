"""Dense causal attention for training on a CPU."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from models.layers import Attend, matmul_precision

_BLOCKS = 8
_SMALLEST_BLOCK = 64


def blocked_attend(batch: int, length: int) -> Attend:
    """An ``attend`` for ``batch`` whole sequences of ``length`` tokens, flattened batch first; the cache passes unused.

    Same result as `models.attention.dense_attend`. Queries come in blocks, so that the keys after a block cost nothing,
    and one key-value head of one sequence is computed at a time, again in the backward pass: its scores then fit into
    a core's cache, which is worth more than the second computation costs.
    """
    block = max(_SMALLEST_BLOCK, -(-length // _BLOCKS))

    def attend(
        _layer: int, q: Float[Array, "T Hq d"], k: Float[Array, "T Hkv d"], v: Float[Array, "T Hkv d"], cache: Any
    ) -> tuple[Float[Array, "T Hq d"], Any]:
        heads, head_dim = q.shape[1:]
        groups = k.shape[1]
        queries = q.reshape(batch, length, groups, heads // groups, head_dim).transpose(0, 2, 3, 1, 4)
        queries = queries.reshape(batch * groups, heads // groups, length, head_dim) / math.sqrt(head_dim)
        keys, values = (
            x.reshape(batch, length, groups, head_dim).transpose(0, 2, 1, 3).reshape(batch * groups, length, head_dim)
            for x in (k, v)
        )

        @jax.checkpoint
        def one(group: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
            return _one_group(*group, block=block)

        out = jax.lax.map(one, (queries, keys, values))
        out = out.reshape(batch, groups, heads // groups, length, head_dim).transpose(0, 3, 1, 2, 4)
        return out.reshape(batch * length, heads, head_dim), cache

    return attend


def _one_group(
    queries: Float[Array, "G L d"], keys: Float[Array, "L d"], values: Float[Array, "L d"], block: int
) -> Float[Array, "G L d"]:
    group, length, head_dim = queries.shape
    precision = matmul_precision(queries.dtype)
    outputs = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        rows = queries[:, start:stop].reshape(-1, head_dim)
        scores = jnp.dot(rows, keys[:stop].T, precision=precision)
        causal = jnp.tile(jnp.arange(start, stop), group)[:, None] >= jnp.arange(stop)
        # Of what is seen alone: a far larger score of a later key would leave nothing but zeros.
        scores = jnp.where(causal, scores, -jnp.inf)
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
        out = jnp.dot(weights, values[:stop], precision=precision) / weights.sum(axis=-1, keepdims=True)
        outputs.append(out.reshape(group, stop - start, head_dim))
    return jnp.concatenate(outputs, axis=1)
