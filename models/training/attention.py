"""Causal attention for training on a CPU, of plain and of pseudo heads."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from models.iha import virtual_heads, virtual_window
from models.layers import Attend, matmul_precision
from pallas_kernels.pseudo_heads import PseudoHeads

_BLOCKS = 8
_SMALLEST_BLOCK = 64


def blocked_attend(batch: int, length: int, windows: Sequence[int | None] = ()) -> Attend:
    """An ``attend`` for ``batch`` whole sequences of ``length`` tokens, flattened batch first; the cache passes unused.

    Same result as `models.attention.dense_attend`. Queries come in blocks, so that the keys after a block and those
    before its window cost nothing, and one key-value head of one sequence is computed at a time, again in the backward
    pass: its scores then fit into a core's cache, which is worth more than the second computation costs. Pseudo heads
    are plain attention on the virtual sequence, whose tokens are ``P`` times as many.

    Args:
        batch, length: of the sequences.
        windows: `ModelConfig.layer_windows`; a layer with pseudo heads has its window from them.
    """

    def attend(
        layer: int,
        q: Float[Array, "T Hq *P d"],
        k: Float[Array, "T Hkv d"],
        v: Float[Array, "T Hkv d"],
        cache: Any,
        pseudo: PseudoHeads | None = None,
    ) -> tuple[Float[Array, "T Hq *P d"], Any]:
        if pseudo is None:
            return _attention(batch, q, k, v, windows[layer] if windows else None), cache
        tokens, heads, count, head_dim = q.shape
        window, span = virtual_window(pseudo)
        out = _attention(batch, *virtual_heads(q, k, v, pseudo), window, span)
        return out.reshape(tokens, count, heads, head_dim).swapaxes(1, 2), cache

    return attend


def seen(start: int, stop: int, window: int | None, span: int = 1) -> tuple[int, int]:
    """First key that a query at ``start`` or behind it sees, and the end of those that one before ``stop`` does.

    Args:
        start, stop: of the queries.
        window: keys that a query sees at most, in units of ``span`` positions; None for all.
        span: neighbouring positions that count as one.
    """
    first = 0 if window is None else max(0, (start // span - window + 1) * span)
    return first, ((stop - 1) // span + 1) * span


def block_of(length: int) -> int:
    """Queries of a block, of sequences of this length."""
    return max(_SMALLEST_BLOCK, -(-length // _BLOCKS))


def _attention(
    batch: int,
    q: Float[Array, "T Hq d"],
    k: Float[Array, "T Hkv d"],
    v: Float[Array, "T Hkv d"],
    window: int | None,
    span: int = 1,
) -> Float[Array, "T Hq d"]:
    tokens, heads, head_dim = q.shape
    length, groups = tokens // batch, k.shape[1]
    queries = q.reshape(batch, length, groups, heads // groups, head_dim).transpose(0, 2, 3, 1, 4)
    queries = queries.reshape(batch * groups, heads // groups, length, head_dim) / math.sqrt(head_dim)
    keys, values = (
        x.reshape(batch, length, groups, head_dim).transpose(0, 2, 1, 3).reshape(batch * groups, length, head_dim)
        for x in (k, v)
    )

    @jax.checkpoint
    def one(group: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return _one_group(*group, window=window, span=span)

    out: jax.Array = jax.lax.map(one, (queries, keys, values))
    out = out.reshape(batch, groups, heads // groups, length, head_dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(tokens, heads, head_dim)


def _one_group(
    queries: Float[Array, "G L d"],
    keys: Float[Array, "L d"],
    values: Float[Array, "L d"],
    window: int | None,
    span: int,
) -> Float[Array, "G L d"]:
    group, length, head_dim = queries.shape
    precision = matmul_precision(queries.dtype)
    block = block_of(length)
    outputs = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        first, end = seen(start, stop, window, span)
        rows = queries[:, start:stop].reshape(-1, head_dim)
        scores = jnp.dot(rows, keys[first:end].T, precision=precision)
        at = jnp.tile(jnp.arange(start, stop), group)[:, None] // span
        of_keys = jnp.arange(first, end) // span
        visible = at >= of_keys
        if window is not None:
            visible &= at - window < of_keys
        # Of what is seen alone: a far larger score of another key would leave nothing but zeros.
        scores = jnp.where(visible, scores, -jnp.inf)
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
        out = jnp.dot(weights, values[first:end], precision=precision) / weights.sum(axis=-1, keepdims=True)
        outputs.append(out.reshape(group, stop - start, head_dim))
    return jnp.concatenate(outputs, axis=1)
