"""Attention of a model's layers over the paged arena: what `models.Decoder` takes as `attend`."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jaxdual.kv.layout import ROWS_PER_LAYER, KVLayout
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.prefill_attention import prefill_attention

Arena = Float[Array, "rows page_size kv_heads head_dim"]
Attend = Callable[..., tuple[Array, Arena]]


def prefill_attend(
    layout: KVLayout,
    starts: Int32[Array, " seqs"],
    counts: Int32[Array, " seqs"],
    table: Int32[Array, "seqs width"],
    chunk: int,
) -> Attend:
    """Writes and attends for `seqs` chunks laid side by side, `chunk` tokens each.

    Args:
      layout: of the arena.
      starts: position of the first token of each chunk.
      counts: real tokens of each chunk.
      table: page ids of each sequence, padded with any valid id.
      chunk: padded tokens of a chunk.
    """
    offsets = jnp.arange(chunk, dtype=jnp.int32)
    positions = starts[:, None] + offsets[None, :]
    pages = jnp.take_along_axis(table, positions // layout.page_size, axis=1, mode="clip")
    # Padding goes past the end of the arena, where a write is dropped.
    pages = jnp.where(offsets[None, :] < counts[:, None], pages, _nowhere())
    slots = (positions % layout.page_size).reshape(-1)

    def attend(
        layer: int,
        q: Float[Array, "tokens q_heads head_dim"],
        k: Float[Array, "tokens kv_heads head_dim"],
        v: Float[Array, "tokens kv_heads head_dim"],
        arena: Arena,
    ) -> tuple[Float[Array, "tokens q_heads head_dim"], Arena]:
        arena = _write(arena, _k_rows(layout, pages.reshape(-1), layer), slots, k, v)
        rows = _k_rows(layout, table, layer)
        out = prefill_attention(
            q.reshape(starts.shape[0], chunk, *q.shape[1:]), arena, arena, rows, starts, counts, v_page_table=rows + 1
        )
        return out.reshape(q.shape), arena

    return attend


def decode_attend(layout: KVLayout, positions: Int32[Array, " seqs"], table: Int32[Array, "seqs width"]) -> Attend:
    """Writes and attends for one token of each sequence.

    Args:
      layout: of the arena.
      positions: of the tokens; -1 for padding.
      table: page ids of each sequence, padded with any valid id.
    """
    pages = jnp.take_along_axis(table, jnp.maximum(positions, 0)[:, None] // layout.page_size, axis=1, mode="clip")
    pages = jnp.where(positions >= 0, pages[:, 0], _nowhere())
    slots = positions % layout.page_size

    def attend(
        layer: int,
        q: Float[Array, "seqs q_heads head_dim"],
        k: Float[Array, "seqs kv_heads head_dim"],
        v: Float[Array, "seqs kv_heads head_dim"],
        arena: Arena,
    ) -> tuple[Float[Array, "seqs q_heads head_dim"], Arena]:
        arena = _write(arena, _k_rows(layout, pages, layer), slots, k, v)
        rows = _k_rows(layout, table, layer)
        return decode_attention(q, arena, arena, rows, positions + 1, v_page_table=rows + 1), arena

    return attend


def _nowhere() -> int:
    # Far past any page, and still no overflow when turned into a row id of up to 500 layers.
    return 2**21


def _k_rows(layout: KVLayout, pages: Int32[Array, "*any"], layer: int) -> Int32[Array, "*any"]:
    return (pages * layout.num_layers + layer) * ROWS_PER_LAYER


def _write(
    arena: Arena,
    k_rows: Int32[Array, " tokens"],
    slots: Int32[Array, " tokens"],
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
) -> Arena:
    rows = jnp.concatenate([k_rows, k_rows + 1])
    return arena.at[rows, jnp.tile(slots, 2)].set(jnp.concatenate([k, v]).astype(arena.dtype), mode="drop")
