"""DySCO on the device: the state of its sequences, what their retrieval heads look at, and what is raised by it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

from jaxdual.decoding.relevance import blend, raised, select
from pallas_kernels.key_bias import KeyBias, pack


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
