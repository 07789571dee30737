"""Attention of a model's layers over the paged arenas: what `models.Decoder` takes as `attend`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from jaxdual.kv.layout import ROWS_PER_LAYER, KVLayout
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.iha_decode import iha_decode
from pallas_kernels.iha_prefill import iha_prefill
from pallas_kernels.key_bias import KeyBias
from pallas_kernels.prefill_attention import prefill_attention
from pallas_kernels.pseudo_heads import PseudoHeads

Arena = Float[Array, "rows page_size kv_heads head_dim"]
Arenas = tuple[Float[Array, "_ page_size _ head_dim"], ...]  # one of each layer group, with the heads that are here
Attend = Callable[..., tuple[Array, Arenas]]

# Told of a layer's attention: layer, queries, its group's arena, row ids of the keys, lengths, and sums of each query's
# scores, where they are known. Gives the arena back, for those who write to it once it was looked at.
Look = Callable[[int, Array, Array, Array, Array, Array | None], Array]

# Jitted within the step that they are part of, so that layers share one trace.
_prefill_attention = jax.jit(prefill_attention, static_argnames="window")
_decode_attention = jax.jit(decode_attention, static_argnames=("window", "return_lse"))
_iha_prefill = jax.jit(iha_prefill)
_iha_decode = jax.jit(iha_decode)


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


class GroupPrefill:
    """Writes and attends in one layer group for `seqs` chunks laid side by side, `chunk` tokens each.

    Args:
      page_size: of the arena.
      layers: whose rows each page of the arena holds.
      starts: position of the first token of each chunk.
      counts: real tokens of each chunk.
      table: of the group.
      chunk: padded tokens of a chunk.
      window: sliding window of the group's layers, but for those with pseudo heads, which have their own.
    """

    def __init__(
        self,
        *,
        page_size: int,
        layers: int,
        starts: Int32[Array, " seqs"],
        counts: Int32[Array, " seqs"],
        table: GroupTable,
        chunk: int,
        window: int | None,
    ) -> None:
        offsets = jnp.arange(chunk, dtype=jnp.int32)
        self._layers, self._counts, self._chunk, self._window = layers, counts, chunk, window
        # Masks depend on differences of positions only, so each group counts from the first block that it keeps.
        self._begins = table.relative(starts)
        self._pages = jnp.asarray(table.pages)
        positions = self._begins[:, None] + offsets[None, :]
        self._places = places_of(page_size, positions, offsets[None, :] < counts[:, None], self._pages)

    def attend(
        self,
        index: int | Int32[Array, ""],
        q: Float[Array, "tokens q_heads *pseudo head_dim"],
        k: Float[Array, "tokens kv_heads head_dim"],
        v: Float[Array, "tokens kv_heads head_dim"],
        arena: Arena,
        pseudo: PseudoHeads | None = None,
        *,
        look: Callable[..., Array] | None = None,
        looked: int = 0,
    ) -> tuple[Float[Array, "tokens q_heads *pseudo head_dim"], Arena]:
        """Arguments as of `Attend`, but for these.

        Args:
          index: of the layer among those that a page holds.
          look, looked: see `prefill_attend`; the layer is left out.
        """
        arena = _write(self._layers, index, arena, self._places, k, v)
        rows = _k_rows(self._layers, index, self._pages)
        chunks = q.reshape(self._counts.shape[0], self._chunk, *q.shape[1:])
        if pseudo is not None:
            _refuse_with_pseudo_heads(None, look)
        if look is not None:
            offsets = jnp.arange(looked, dtype=jnp.int32)
            lengths = jnp.where(offsets < self._counts[:, None], self._begins[:, None] + offsets + 1, 0)
            first = chunks[:, :looked].reshape(-1, *q.shape[1:])
            arena = look(first, arena, jnp.repeat(rows, looked, axis=0), lengths.reshape(-1), None)
        paged = (arena, arena, rows, self._begins, self._counts)
        if pseudo is None:
            out = _prefill_attention(chunks, *paged, v_page_table=rows + 1, window=self._window)
        else:
            out = _iha_prefill(chunks, *paged, pseudo, v_page_table=rows + 1)
        return out.reshape(q.shape), arena


def prefill_attend(
    layout: KVLayout,
    starts: Int32[Array, " seqs"],
    counts: Int32[Array, " seqs"],
    tables: Sequence[GroupTable],
    chunk: int,
    *,
    look: Look | None = None,
    looked: int = 0,
) -> Attend:
    """Writes and attends in all layers; arguments as of `GroupPrefill`, with a table for each layer group.

    Args:
      look: is told of the attention of the first `looked` tokens of each chunk in each layer, without their sums.
    """
    groups = [
        GroupPrefill(
            page_size=layout.page_size,
            layers=len(group.layers),
            starts=starts,
            counts=counts,
            table=table,
            chunk=chunk,
            window=group.window,
        )
        for group, table in zip(layout.groups, tables, strict=True)
    ]

    def attend(
        layer: int,
        q: Float[Array, "tokens q_heads *pseudo head_dim"],
        k: Float[Array, "tokens kv_heads head_dim"],
        v: Float[Array, "tokens kv_heads head_dim"],
        arenas: Arenas,
        pseudo: PseudoHeads | None = None,
    ) -> tuple[Float[Array, "tokens q_heads *pseudo head_dim"], Arenas]:
        group, index = layout.place_of(layer)
        of_layer = None if look is None else partial(look, layer)
        out, arena = groups[group].attend(index, q, k, v, arenas[group], pseudo, look=of_layer, looked=looked)
        return out, _replaced(arenas, group, arena)

    return attend


def decode_attend(
    layout: KVLayout,
    positions: Int32[Array, " seqs"],
    tables: Sequence[GroupTable],
    *,
    key_bias: KeyBias | None = None,
    look: Look | None = None,
) -> Attend:
    """Writes and attends for one token of each sequence.

    Args:
      layout: of the arenas.
      positions: of the tokens; -1 for padding.
      tables: one for each layer group.
      key_bias: of the scores, in all layers.
      look: is told of each layer's attention.
    """
    real = positions >= 0
    relative = [jnp.where(real, table.relative(positions), -1) for table in tables]
    pages = [jnp.asarray(table.pages) for table in tables]
    places = [
        places_of(layout.page_size, jnp.maximum(begin, 0)[:, None], real[:, None], of_group)
        for begin, of_group in zip(relative, pages, strict=True)
    ]

    def attend(
        layer: int,
        q: Float[Array, "seqs q_heads *pseudo head_dim"],
        k: Float[Array, "seqs kv_heads head_dim"],
        v: Float[Array, "seqs kv_heads head_dim"],
        arenas: Arenas,
        pseudo: PseudoHeads | None = None,
    ) -> tuple[Float[Array, "seqs q_heads *pseudo head_dim"], Arenas]:
        group, index = layout.place_of(layer)
        layers = len(layout.groups[group].layers)
        arena = _write(layers, index, arenas[group], places[group], k, v)
        rows, lengths = _k_rows(layers, index, pages[group]), relative[group] + 1
        if pseudo is not None:
            _refuse_with_pseudo_heads(key_bias, look)
            mixed = _iha_decode(q, arena, arena, rows, lengths, pseudo, v_page_table=rows + 1)
            return mixed, _replaced(arenas, group, arena)
        attended = _decode_attention(
            q,
            arena,
            arena,
            rows,
            lengths,
            v_page_table=rows + 1,
            window=layout.groups[group].window,
            key_bias=key_bias,
            return_lse=look is not None,
        )
        if look is None:
            return attended, _replaced(arenas, group, arena)
        out, lse = attended
        arena = look(layer, q, arena, rows, lengths, lse)
        return out, _replaced(arenas, group, arena)

    return attend


def _refuse_with_pseudo_heads(key_bias: KeyBias | None, look: Callable[..., Array] | None) -> None:
    if key_bias is not None or look is not None:
        raise NotImplementedError("attention of pseudo heads can't be raised or looked at")


def places_of(
    page_size: int, positions: Int32[Array, "seqs chunk"], real: Array, pages: Int32[Array, "seqs width"]
) -> tuple[jax.Array, jax.Array]:
    """Page and slot in it of every token, flat; padding goes past the end of the arena, where a write is dropped."""
    of_token = jnp.take_along_axis(pages, positions // page_size, axis=1, mode="clip")
    return jnp.where(real, of_token, _nowhere()).reshape(-1), (positions % page_size).reshape(-1)


def _nowhere() -> int:
    # Far past any page, and still no overflow when turned into a row id of up to 500 layers.
    return 2**21


def _k_rows(layers: int, index: int | Int32[Array, ""], pages: Int32[Array, "*any"]) -> Int32[Array, "*any"]:
    return (pages * layers + index) * ROWS_PER_LAYER


def _write(
    layers: int,
    index: int | Int32[Array, ""],
    arena: Arena,
    places: tuple[jax.Array, jax.Array],
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
) -> Arena:
    pages, slots = places
    put: jax.Array = _put(arena, _k_rows(layers, index, pages), slots, k, v)
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
