"""Attention of a prompt's last span to every token, layer by layer, in memory that the prompt's length bounds.

Two prompts that begin alike are computed together: their common tokens once, and as many more as the second one has.
"""

import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from models import Decoder
from models.layers import matmul_precision

_ROWS = 64  # queries whose scores are held at once, at most
_STEP = 256  # tokens that lengths differ by, at least
_SCORE_BYTES = 1 << 28  # of these scores, as far as more than one row is held


def span_attention(
    model: Decoder, tokens: Sequence[int], start: int, other: Sequence[int], other_start: int, layers: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Attention of two prompts' last spans, of one layer after the other.

    At no time are there more scores than those of a few queries to all tokens, and no more attention than one layer's.

    Args:
      model: whose layers are called one by one.
      tokens, other: the prompts; what they have in common at their beginning is computed once.
      start, other_start: first token of the spans, which reach to the prompts' ends.
      layers: how many, from the first.

    Yields:
      Post-softmax attention `[heads, tokens]` float32 to each token of its prompt, for both prompts, as means over the
      span's rows.
    """
    shared = next((at for at, (a, b) in enumerate(zip(tokens, other, strict=False)) if a != b), None)
    shared = min(len(tokens), len(other)) if shared is None else shared
    flat = np.array([*tokens, *other[shared:]], np.int32)
    # Rows behind both prompts are more of the second one, whose tokens don't see them.
    size = _padded(len(flat))
    positions = np.arange(size, dtype=np.int32)
    positions[len(tokens) :] += shared - len(tokens)
    of_other = np.concatenate([np.arange(shared), np.arange(len(tokens), len(flat))])
    spans = np.zeros((2, size), np.float32)
    spans[0, start : len(tokens)] = 1 / (len(tokens) - start)
    spans[1, of_other[other_start:]] = 1 / (len(other) - other_start)
    at = jnp.asarray(positions)
    x, rope = model.embed(jnp.asarray(np.pad(flat, (0, size - len(flat))))), model.rope(at)

    def attend(
        layer: int, q: jax.Array, k: jax.Array, v: jax.Array, _: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        window = model.config.window_of(layer) or size
        out, means = _attend(q, k, v, at, jnp.asarray(spans), len(tokens), shared, window)
        return out, means

    for layer in range(layers):
        x, means = model.layer(layer, x, rope, attend, None)
        attention = np.asarray(means)
        yield attention[0, :, : len(tokens)], attention[1][:, of_other]


@jax.jit
def _attend(
    q: Float[Array, "T Hq d"],
    k: Float[Array, "T Hkv d"],
    v: Float[Array, "T Hkv d"],
    positions: Int[Array, "T"],
    spans: Float32[Array, "S T"],
    length: int | Int[Array, ""],
    shared: int | Int[Array, ""],
    window: int | Int[Array, ""],
) -> tuple[Float[Array, "T Hq d"], Float32[Array, "S Hq T"]]:
    """Causal attention, and its weights summed over rows, each weighted by `spans`."""
    size, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    rows = _ROWS
    while rows > 1 and rows * heads * size * 4 > _SCORE_BYTES:
        rows //= 2
    precision = matmul_precision(q.dtype)

    def visible(queries: Int[Array, "R"]) -> Bool[Array, "R T"]:
        query, key = queries[:, None], jnp.arange(size)[None]
        same = (key < shared) | ((key < length) == (query < length))
        ahead = positions[queries][:, None] - positions[None]
        return same & (ahead >= 0) & (ahead < window)

    def some_rows(
        sums: Float32[Array, "S Hkv G T"], chunk: Int[Array, "R"]
    ) -> tuple[Float32[Array, "S Hkv G T"], Float[Array, "R Hkv G d"]]:
        grouped = q[chunk].reshape(rows, kv_heads, -1, head_dim)
        scores = jnp.einsum("rhgd,thd->hgrt", grouped, k, precision=precision, preferred_element_type=jnp.float32)
        scores = jnp.where(visible(chunk), scores / math.sqrt(head_dim), -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1)
        sums += jnp.einsum("hgrt,sr->shgt", weights, spans[:, chunk], precision=jax.lax.Precision.HIGHEST)
        return sums, jnp.einsum("hgrt,thd->rhgd", weights.astype(v.dtype), v, precision=precision)

    nothing = jnp.zeros((len(spans), kv_heads, heads // kv_heads, size), jnp.float32)
    sums, out = jax.lax.scan(some_rows, nothing, jnp.arange(size).reshape(-1, rows))
    return out.reshape(size, heads, head_dim), sums.reshape(len(spans), heads, size)


def _padded(length: int) -> int:
    """A length of few, so that few programs compile: 255 tokens or an eighth more, at most, and whole chunks."""
    step = max(_STEP, 1 << max(length.bit_length() - 4, 0))
    return -(-length // step) * step
