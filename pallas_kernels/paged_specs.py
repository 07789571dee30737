"""Random arguments of the named workloads on paged keys and values."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.key_bias import WORD, KeyBias
from pallas_kernels.pseudo_heads import Mask, PseudoHeads


def random_pages(
    key: jax.Array, *, seqs: int, width: int, page_size: int, kv_heads: int, head_dim: int, dtype: str
) -> dict[str, jax.Array]:
    """Arguments that say where keys and values are: one arena, whose pages are dealt at random.

    Args:
      width: pages of a sequence.
    """
    arena_key, table_key = jax.random.split(key)
    shape = (2 * seqs * width, page_size, kv_heads, head_dim)
    # There are no random numbers of 8 bits.
    pages = jax.random.normal(arena_key, shape, "bfloat16" if jnp.dtype(dtype).itemsize == 1 else dtype).astype(dtype)
    k_table = 2 * jax.random.permutation(table_key, seqs * width).reshape(seqs, width).astype(jnp.int32)
    return {"k_pages": pages, "v_pages": pages, "page_table": k_table, "v_page_table": k_table + 1}


def random_key_bias(key: jax.Array, seqs: int, keys: int) -> KeyBias:
    """A bias of half of the keys that a page table has room for."""
    bits = jax.random.bits(key, (seqs, -(-keys // WORD)), jnp.uint32)
    return KeyBias(bits, jnp.full((seqs,), 0.7, jnp.float32))


def random_pseudo_heads(
    key: jax.Array, *, kv_heads: int, q_heads: int, count: int, head_dim: int, mask: Mask, window: int | None
) -> PseudoHeads:
    """Pseudo heads of all source heads, each rotated by its number as a place in the sequence."""
    shape = (2, kv_heads, q_heads, count)
    alpha_k, alpha_v = jax.random.normal(key, shape, jnp.float32) / kv_heads**0.5
    half = head_dim // 2
    frequencies = 5e5 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(count, dtype=jnp.float32)[:, None] * frequencies
    return PseudoHeads(alpha_k, alpha_v, jnp.cos(angles), jnp.sin(angles), mask=mask, window=window)
