"""DySCO on the device: the state of its sequences, what their retrieval heads look at, and what is raised by it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

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
      slot: of each.
      weights: of the heads in each watched layer; they sum up to 1, or are all 0 where nobody looks.
      is_first: whether it has no relevance yet.
      history: weight of the relevance before.
      top_p, top_k: limits of the selection.
      candidates: tokens that may be selected: the first so many.
      bias: added to the scores of selected tokens.
    """

    slot: Int32[Array, " rows"] | Int32[np.ndarray, " rows"]
    weights: Float32[Array, "rows layers heads"] | Float32[np.ndarray, "rows layers heads"]
    is_first: Bool[Array, " rows"] | Bool[np.ndarray, " rows"]
    history: Float32[Array, " rows"] | Float32[np.ndarray, " rows"]
    top_p: Float32[Array, " rows"] | Float32[np.ndarray, " rows"]
    top_k: Int32[Array, " rows"] | Int32[np.ndarray, " rows"]
    candidates: Int32[Array, " rows"] | Int32[np.ndarray, " rows"]
    bias: Float32[Array, " rows"] | Float32[np.ndarray, " rows"]


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
    """

    weights: Float32[Array, "rows layers heads"] | Float32[np.ndarray, "rows layers heads"]
    layers: tuple[int, ...]
    _parts: list[Float32[Array, "rows keys"]] = field(default_factory=list)

    def of(self, layer: int) -> Float32[Array, "rows heads"] | None:
        """Weights of a layer's heads; None for one that is not watched."""
        return jnp.asarray(self.weights)[:, self.layers.index(layer)] if layer in self.layers else None

    def look(
        self,
        layer: int,
        q: Float[Array, "rows heads head_dim"],
        arena: Array,
        table: Int32[Array, "rows width"],
        lengths: Int32[Array, " rows"],
        lse: Float32[Array, "rows heads"] | None,
    ) -> None:
        """See `paged.Look`."""
        weights = self.of(layer)
        if weights is None:
            return
        if lse is None:
            _, lse = decode_attention(q, arena, arena, table, lengths, v_page_table=table + 1, return_lse=True)
        self.note(retrieval_scores(q, arena, table, lengths, lse, weights))

    def note(self, attention: Float32[Array, "rows keys"]) -> None:
        """Takes what a layer's heads look at."""
        self._parts.append(attention)

    @property
    def attention(self) -> Float32[Array, "rows keys"]:
        """Mean over the heads of the probabilities that they give each key."""
        return sum(self._parts[1:], start=self._parts[0])


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
    positions: Int32[Array, " rows"],
) -> tuple[DyscoState, Chosen, KeyBias]:
    """Blends new attention into the relevance, selects, and says what is added to the scores of each row."""
    slot, history, is_first = jnp.asarray(rows.slot), jnp.asarray(rows.history), jnp.asarray(rows.is_first)
    relevance = blend(state.relevance[slot], attention, history, is_first)
    candidates, top_p, top_k = jnp.asarray(rows.candidates), jnp.asarray(rows.top_p), jnp.asarray(rows.top_k)
    selected = select(relevance, candidates, top_p, top_k, relevance.shape[1])
    bits = pack(raised(selected, state.template[slot], positions + 1))
    state = state._replace(relevance=state.relevance.at[slot].set(relevance))
    return state, Chosen(selected, relevance), KeyBias(bits, jnp.asarray(rows.bias))


def for_all(of_first: KeyBias, positions: Int32[Array, " seqs"]) -> KeyBias:
    """What is added to the scores of all sequences of a step, of which the first have some."""
    others = positions.shape[0] - of_first.value.shape[0]
    return KeyBias(jnp.pad(of_first.bits, ((0, others), (0, 0))), jnp.pad(of_first.value, (0, others)))
