"""Attention of a model's layers over the paged arenas: what `models.Decoder` takes as `attend`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from jaxdual.kv.layout import ROWS_PER_LAYER, KVLayout
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.prefill_attention import prefill_attention

Arena = Float[Array, "rows page_size kv_heads head_dim"]
Arenas = tuple[Float[Array, "_ page_size kv_heads head_dim"], ...]  # one of each layer group
Attend = Callable[..., tuple[Array, Arenas]]

# Jitted within the step that they are part of, so that layers share one trace.
_prefill_attention = jax.jit(prefill_attention, static_argnames="window")
_decode_attention = jax.jit(decode_attention, static_argnames="window")


class GroupTable(NamedTuple):
    """Page tables of a step's sequences in one layer group.

    Attributes:
      pages: `[seqs, width]` page ids in token order, padded with any valid id.
      first: `[seqs]` position of the first token of each table, since blocks out of a window's sight are left out; None
        under full attention, where all begin at 0.
    """

    pages: Int32[Array, "seqs width"] | Int32[np.ndarray, "seqs width"]
    first: Int32[Array, " seqs"] | Int32[np.ndarray, " seqs"] | None = None

    def relative(self, positions: Int32[Array, " seqs"]) -> Int32[Array, " seqs"]:
        """Positions counted from the first token of each table."""
        return positions if self.first is None else positions - self.first


def prefill_attend(
    layout: KVLayout,
    starts: Int32[Array, " seqs"],
    counts: Int32[Array, " seqs"],
    tables: Sequence[GroupTable],
    chunk: int,
) -> Attend:
    """Writes and attends for `seqs` chunks laid side by side, `chunk` tokens each.

    Args:
      layout: of the arenas.
      starts: position of the first token of each chunk.
      counts: real tokens of each chunk.
      tables: one for each layer group.
      chunk: padded tokens of a chunk.
    """
    offsets = jnp.arange(chunk, dtype=jnp.int32)
    real = offsets[None, :] < counts[:, None]
    # Masks depend on differences of positions only, so each group counts from the first block that it keeps.
    begins = [table.relative(starts) for table in tables]
    places = [
        _places(layout, begin[:, None] + offsets[None, :], real, table)
        for begin, table in zip(begins, tables, strict=True)
    ]

    def attend(
        layer: int,
        q: Float[Array, "tokens q_heads head_dim"],
        k: Float[Array, "tokens kv_heads head_dim"],
        v: Float[Array, "tokens kv_heads head_dim"],
        arenas: Arenas,
    ) -> tuple[Float[Array, "tokens q_heads head_dim"], Arenas]:
        group, index = layout.place_of(layer)
        arena = _write(layout, group, index, arenas[group], places[group], k, v)
        rows = _k_rows(layout, group, index, jnp.asarray(tables[group].pages))
        out = _prefill_attention(
            q.reshape(starts.shape[0], chunk, *q.shape[1:]),
            arena,
            arena,
            rows,
            begins[group],
            counts,
            v_page_table=rows + 1,
            window=layout.groups[group].window,
        )
        return out.reshape(q.shape), _replaced(arenas, group, arena)

    return attend


def decode_attend(layout: KVLayout, positions: Int32[Array, " seqs"], tables: Sequence[GroupTable]) -> Attend:
    """Writes and attends for one token of each sequence.

    Args:
      layout: of the arenas.
      positions: of the tokens; -1 for padding.
      tables: one for each layer group.
    """
    real = positions >= 0
    relative = [jnp.where(real, table.relative(positions), -1) for table in tables]
    places = [
        _places(layout, jnp.maximum(begin, 0)[:, None], real[:, None], table)
        for begin, table in zip(relative, tables, strict=True)
    ]

    def attend(
        layer: int,
        q: Float[Array, "seqs q_heads head_dim"],
        k: Float[Array, "seqs kv_heads head_dim"],
        v: Float[Array, "seqs kv_heads head_dim"],
        arenas: Arenas,
    ) -> tuple[Float[Array, "seqs q_heads head_dim"], Arenas]:
        group, index = layout.place_of(layer)
        arena = _write(layout, group, index, arenas[group], places[group], k, v)
        rows = _k_rows(layout, group, index, jnp.asarray(tables[group].pages))
        out = _decode_attention(
            q,
            arena,
            arena,
            rows,
            relative[group] + 1,
            v_page_table=rows + 1,
            window=layout.groups[group].window,
        )
        return out, _replaced(arenas, group, arena)

    return attend


def _places(
    layout: KVLayout, positions: Int32[Array, "seqs chunk"], real: Array, table: GroupTable
) -> tuple[jax.Array, jax.Array]:
    """Page and slot in it of every token, flat; padding goes past the end of the arena, where a write is dropped."""
    pages = jnp.take_along_axis(jnp.asarray(table.pages), positions // layout.page_size, axis=1, mode="clip")
    return jnp.where(real, pages, _nowhere()).reshape(-1), (positions % layout.page_size).reshape(-1)


def _nowhere() -> int:
    # Far past any page, and still no overflow when turned into a row id of up to 500 layers.
    return 2**21


def _k_rows(layout: KVLayout, group: int, index: int, pages: Int32[Array, "*any"]) -> Int32[Array, "*any"]:
    return (pages * len(layout.groups[group].layers) + index) * ROWS_PER_LAYER


def _write(
    layout: KVLayout,
    group: int,
    index: int,
    arena: Arena,
    places: tuple[jax.Array, jax.Array],
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
) -> Arena:
    pages, slots = places
    k_rows = _k_rows(layout, group, index, pages)
    put: jax.Array = _put(arena, k_rows, slots, k, v)
    return put


@jax.jit
def _put(
    arena: Arena,
    k_rows: Int32[Array, " tokens"],
    slots: Int32[Array, " tokens"],
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
) -> Arena:
    rows = jnp.concatenate([k_rows, k_rows + 1])
    written: jax.Array = arena.at[rows, jnp.tile(slots, 2)].set(
        jnp.concatenate([k, v]).astype(arena.dtype), mode="drop"
    )
    return written


def _replaced(arenas: Arenas, group: int, arena: Arena) -> Arenas:
    return (*arenas[:group], arena, *arenas[group + 1 :])
