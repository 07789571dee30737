"""DySCO on the device: the state of its sequences, what their retrieval heads look at, and what is raised by it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32

from jaxdual.decoding.relevance import blend, raised, select
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.key_bias import KeyBias, pack
from pallas_kernels.retrieval_scores import retrieval_scores


class DyscoState(NamedTuple):
    """Of all slots.

    Attributes:
      relevance: of each token so far.
      template: which tokens are never raised.
    """

    relevance: Float32[Array, "slots keys"]
    template: Bool[Array, "slots keys"]


def set_slot(
    state: DyscoState, slot: Int32[Array, ""], relevance: Float32[Array, " keys"], template: Bool[Array, " keys"]
) -> DyscoState:
    """Writes the state of one sequence."""
    return DyscoState(state.relevance.at[slot].set(relevance), state.template.at[slot].set(template))


class DyscoRows(NamedTuple):
    """Rows of a step that are decoded by DySCO.

    Attributes:
      row: number of each among all rows of its rank; past the last one for padding.
      slot: of each.
      weights: of the heads in each watched layer; they sum up to 1, or are all 0 where nobody looks.
      is_first: whether it has no relevance yet.
      history: weight of the relevance before.
      top_p, top_k: limits of the selection.
      candidates: tokens that may be selected: the first so many.
      bias: added to the scores of selected tokens.
    """

    row: Int32[Array, " rows"] | Int32[np.ndarray, " rows"]
    slot: Int32[Array, " rows"] | Int32[np.ndarray, " rows"]
    weights: Float32[Array, "rows layers heads"] | Float32[np.ndarray, "rows layers heads"]
    is_first: Bool[Array, " rows"] | Bool[np.ndarray, " rows"]
    history: Float32[Array, " rows"] | Float32[np.ndarray, " rows"]
    top_p: Float32[Array, " rows"] | Float32[np.ndarray, " rows"]
    top_k: Int32[Array, " rows"] | Int32[np.ndarray, " rows"]
    candidates: Int32[Array, " rows"] | Int32[np.ndarray, " rows"]
    bias: Float32[Array, " rows"] | Float32[np.ndarray, " rows"]


class PassedRows(NamedTuple):
    """Rows that go through the model once: what they look at while it is raised already comes late.

    Attributes:
      rows: `candidates` are those of the selection after they were looked at.
      known: tokens that may be selected before: the first so many.
      below: added to the scores of tokens selected before, in layers up to the last that is watched.
      is_fresh: whether it is the selection after that is raised in the layers behind; else it is the one before.
    """

    rows: DyscoRows
    known: Int32[Array, " rows"] | Int32[np.ndarray, " rows"]
    below: Float32[Array, " rows"] | Float32[np.ndarray, " rows"]
    is_fresh: Bool[Array, " rows"] | Bool[np.ndarray, " rows"]


class ObservedChunks(NamedTuple):
    """Chunks of prompts whose tokens are watched, and not raised.

    Attributes:
      slot, weights: as of `DyscoRows`.
      offsets: what the attention of each token of the chunk weighs in the relevance after it.
      history: what the relevance before weighs.
    """

    slot: Int32[Array, " rows"] | Int32[np.ndarray, " rows"]
    weights: Float32[Array, "rows layers heads"] | Float32[np.ndarray, "rows layers heads"]
    offsets: Float32[Array, "rows tokens"] | Float32[np.ndarray, "rows tokens"]
    history: Float32[Array, " rows"] | Float32[np.ndarray, " rows"]


class Chosen(NamedTuple):
    """What came of a step: what each row has selected, and by which relevance."""

    selected: Bool[Array, "rows keys"]
    relevance: Float32[Array, "rows keys"]


@dataclass(slots=True)
class Watched:
    """Attention of retrieval heads, layer by layer, while a pass is traced.

    Attributes:
      weights: of the heads of each watched layer.
      layers: these.
      rows: which rows of the pass these are; None for all.
      is_biased: whether something is added to the pass's scores, which heads are watched without.
    """

    weights: Float32[Array, "rows layers heads"] | Float32[np.ndarray, "rows layers heads"]
    layers: tuple[int, ...]
    rows: Int32[Array, " rows"] | Int32[np.ndarray, " rows"] | None = None
    is_biased: bool = False
    _parts: list[Float32[Array, "rows keys"]] = field(default_factory=list)

    def of(self, layer: int) -> Float32[Array, "rows heads"] | None:
        """Weights of a layer's heads; None for one that is not watched."""
        return jnp.asarray(self.weights)[:, self.layers.index(layer)] if layer in self.layers else None

    def look(
        self,
        layer: int,
        q: Float[Array, "seqs heads head_dim"],
        arena: Array,
        table: Int32[Array, "seqs width"],
        lengths: Int32[Array, " seqs"],
        lse: Float32[Array, "seqs heads"] | None,
    ) -> Array:
        """See `paged.Look`."""
        weights = self.of(layer)
        if weights is None:
            return arena
        if self.rows is not None:
            q, table, lengths = at_rows(self.rows, (q, table, lengths))
            lse = None if lse is None else at_rows(self.rows, lse)
        if lse is None or self.is_biased:
            _, lse = decode_attention(q, arena, arena, table, lengths, v_page_table=table + 1, return_lse=True)
        # The layer behind writes into the arena. Unless it does so after it was read here, XLA copies the whole arena.
        attention, arena = jax.lax.optimization_barrier(
            (retrieval_scores(q, arena, table, lengths, lse, weights), arena)
        )
        self.note(attention)
        return arena

    def note(self, attention: Float32[Array, "rows keys"]) -> None:
        """Takes what a layer's heads look at."""
        self._parts.append(attention)

    @property
    def attention(self) -> Float32[Array, "rows keys"]:
        """Mean over the heads of the probabilities that they give each key."""
        return sum(self._parts[1:], start=self._parts[0])


def at_rows(rows: Int32[Array, " rows"] | Int32[np.ndarray, " rows"], arrays: Any) -> Any:
    """Some rows of arrays that have one for each sequence; padding gets zeros, and so no length."""
    return jax.tree.map(lambda one: one.at[rows].get(mode="fill", fill_value=0), arrays)


def observe(state: DyscoState, chunks: ObservedChunks, attention: Float32[Array, "rows_tokens keys"]) -> DyscoState:
    """Blends the attention of some tokens of each sequence into its relevance, at once.

    Args:
      attention: of the tokens of all chunks, one after the other.
    """
    offsets, slot = jnp.asarray(chunks.offsets), jnp.asarray(chunks.slot)
    seen = jnp.einsum("st,stk->sk", offsets, attention.reshape(*offsets.shape, -1), precision=jax.lax.Precision.HIGHEST)
    relevance = jnp.asarray(chunks.history)[:, None] * state.relevance[slot] + seen
    return state._replace(relevance=state.relevance.at[slot].set(relevance))


def choose(
    state: DyscoState,
    rows: DyscoRows,
    attention: Float32[Array, "rows keys"],
    lengths: Int32[Array, " rows"],
) -> tuple[DyscoState, Chosen, KeyBias]:
    """Blends new attention into the relevance, selects, and says what is added to the scores of each row.

    Args:
      lengths: tokens of each sequence, with the new one.
    """
    slot, history, is_first = jnp.asarray(rows.slot), jnp.asarray(rows.history), jnp.asarray(rows.is_first)
    relevance = blend(state.relevance[slot], attention, history, is_first)
    selected = _selected(relevance, rows, jnp.asarray(rows.candidates))
    bits = pack(raised(selected, state.template[slot], lengths))
    state = state._replace(relevance=state.relevance.at[slot].set(relevance))
    return state, Chosen(selected, relevance), KeyBias(bits, jnp.asarray(rows.bias))


def choose_in_turn(
    state: DyscoState,
    rows: DyscoRows,
    attention: Float32[Array, "rows keys"],
    lengths: Int32[Array, " rows"],
    *,
    each: int,
) -> tuple[DyscoState, Chosen, KeyBias]:
    """`choose`, where `each` rows, one after the other, are tokens of one sequence that follow each other."""
    if each == 1:
        return choose(state, rows, attention, lengths)

    def turn(state: DyscoState, now: tuple[DyscoRows, Array, Array]) -> tuple[DyscoState, tuple[Chosen, KeyBias]]:
        state, chosen, key_bias = choose(state, *now)
        return state, (chosen, key_bias)

    def by_turn(one: Array) -> Array:
        return jnp.moveaxis(jnp.asarray(one).reshape(-1, each, *one.shape[1:]), 1, 0)

    def by_row(one: Array) -> Array:
        return jnp.moveaxis(one, 0, 1).reshape(-1, *one.shape[2:])

    state, out = jax.lax.scan(turn, state, jax.tree.map(by_turn, (rows, attention, lengths)))
    chosen, key_bias = jax.tree.map(by_row, out)
    return state, chosen, key_bias


def choose_before(
    state: DyscoState, passed: PassedRows, lengths: Int32[Array, " rows"]
) -> tuple[Bool[Array, "rows keys"], KeyBias]:
    """What rows that are passed once select by the relevance before them, and what it adds in watched layers."""
    slot = jnp.asarray(passed.rows.slot)
    selected = _selected(state.relevance[slot], passed.rows, jnp.asarray(passed.known))
    bits = pack(raised(selected, state.template[slot], lengths))
    return selected, KeyBias(bits, jnp.asarray(passed.below))


def choose_after(
    state: DyscoState,
    passed: PassedRows,
    before: tuple[Bool[Array, "rows keys"], KeyBias],
    attention: Float32[Array, "rows keys"],
    lengths: Int32[Array, " rows"],
) -> tuple[DyscoState, Chosen, KeyBias]:
    """`choose` for rows that are passed once, with what is added to their scores in the layers behind those watched.

    Args:
      before: of `choose_before`.
    """
    state, chosen, after = choose(state, passed.rows, attention, lengths)
    selected, key_bias = before
    fresh = jnp.asarray(passed.is_fresh)[:, None]
    chosen = chosen._replace(selected=jnp.where(fresh, chosen.selected, selected))
    return state, chosen, after._replace(bits=jnp.where(fresh, after.bits, key_bias.bits))


def for_all(
    positions: Int32[Array, " seqs"], words: int, *parts: tuple[Int32[Array, " rows"] | np.ndarray, KeyBias]
) -> KeyBias:
    """What is added to the scores of all sequences of a step: nothing but for some rows."""
    bits, value = jnp.zeros((*positions.shape, words), jnp.uint32), jnp.zeros(positions.shape, jnp.float32)
    for rows, part in parts:
        bits = bits.at[rows].set(part.bits, mode="drop")
        value = value.at[rows].set(part.value, mode="drop")
    return KeyBias(bits, value)


def _selected(
    relevance: Float32[Array, "rows keys"], rows: DyscoRows, candidates: Int32[Array, " rows"]
) -> Bool[Array, "rows keys"]:
    top_p, top_k = jnp.asarray(rows.top_p), jnp.asarray(rows.top_k)
    return select(relevance, candidates, top_p, top_k)
