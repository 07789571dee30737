"""DySCO in the engine: what its sequences have on the device, and what a decode step does with it.

A sequence that is decoded so has a row of state for its slot. Its tokens from `SlotDysco.observed_from` on are computed
one at a time; before each, its retrieval heads are watched in a pass of its own, and from `raised_from` on the
attention to what they look at is raised.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array, Bool, Float32, Int32

from jaxdual.decoding.dysco import Dysco, first_raised, template_mask
from jaxdual.decoding.relevance import blend, raised, select
from jaxdual.engine.request import Selection
from jaxdual.scheduling.batch import Row
from pallas_kernels.key_bias import KeyBias, pack
from pallas_kernels.retrieval_scores import retrieval_scores


@dataclass(frozen=True, slots=True)
class SlotDysco:
    """How a sequence is decoded.

    Attributes:
      params: of the request.
      observed_from: position of the first token whose attention counts.
      raised_from: position of the first token with raised attention.
      template: positions in the prompt that are never raised.
    """

    params: Dysco
    observed_from: int
    raised_from: int
    template: Sequence[int]


def slot_dysco(params: Dysco, prompt: Sequence[int]) -> SlotDysco:
    """How a prompt is decoded."""
    begin = first_raised(len(prompt), params.tail, params.observe)
    observed = max(begin - max(params.observe - 1, 0), 0)
    template = np.flatnonzero(template_mask(prompt, params.template_sequences)).tolist()
    return SlotDysco(params, observed, begin, template)


class DyscoState(NamedTuple):
    """Of all slots.

    Attributes:
      relevance: of each token so far.
      template: which tokens are never raised.
    """

    relevance: Float32[Array, "slots keys"]
    template: Bool[Array, "slots keys"]


class DyscoRows(NamedTuple):
    """The rows of a step that are decoded by DySCO.

    Attributes:
      slot: of each.
      weights: of the heads in each watched layer; they sum up to 1.
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

    def look(self, layer: int, q: Array, arena: Array, table: Array, lengths: Array, lse: Array) -> None:
        """See `paged.Look`."""
        if layer in self.layers:
            weights = jnp.asarray(self.weights)[:, self.layers.index(layer)]
            self._parts.append(retrieval_scores(q, arena, table, lengths, lse, weights))

    @property
    def attention(self) -> Float32[Array, "rows keys"]:
        """Mean over the heads of the probabilities that they give each key."""
        return sum(self._parts[1:], start=self._parts[0])


def choose(
    state: DyscoState,
    rows: DyscoRows,
    attention: Float32[Array, "rows keys"],
    positions: Int32[Array, " seqs"],
) -> tuple[DyscoState, Chosen, KeyBias]:
    """Blends new attention into the relevance, selects, and says what is added to the scores of all sequences.

    Args:
      positions: of all sequences of the step, of which `rows` are the first.
    """
    count = attention.shape[0]
    lengths = positions[:count] + 1
    before, history, is_first = state.relevance[rows.slot], jnp.asarray(rows.history), jnp.asarray(rows.is_first)
    relevance = blend(before, attention, history, is_first)
    candidates, top_p, top_k = jnp.asarray(rows.candidates), jnp.asarray(rows.top_p), jnp.asarray(rows.top_k)
    selected = select(relevance, candidates, top_p, top_k)
    bits = pack(raised(selected, state.template[rows.slot], lengths))
    everybody = jnp.zeros((positions.shape[0], bits.shape[1]), jnp.uint32)
    value = jnp.zeros(positions.shape[0], jnp.float32)
    key_bias = KeyBias(everybody.at[:count].set(bits), value.at[:count].set(rows.bias))
    state = state._replace(relevance=state.relevance.at[rows.slot].set(relevance))
    return state, Chosen(selected, relevance), key_bias


@jax.jit
def _with_template(state: DyscoState, slot: Int32[Array, ""], template: Bool[Array, " keys"]) -> DyscoState:
    return state._replace(template=state.template.at[slot].set(template))


class DyscoSlots:
    """The sequences that are decoded so, by slot.

    Args:
      slots: with one of padding, which is the last.
      keys: that a table has room for.
      heads: query heads of a layer.
      sharding: of the state.

    Attributes:
      state: on the device.
    """

    def __init__(self, slots: int, keys: int, heads: int, sharding: Sharding) -> None:
        self._padding, self._keys, self._heads = slots - 1, keys, heads
        self._bound: dict[int, SlotDysco] = {}
        self.state = DyscoState(
            jnp.zeros((slots, keys), jnp.float32, device=sharding), jnp.zeros((slots, keys), bool, device=sharding)
        )

    def bind(self, slot: int, dysco: SlotDysco | None) -> None:
        """A slot gets a sequence."""
        if dysco is None:
            self._bound.pop(slot, None)
            return
        self._bound[slot] = dysco
        template = np.zeros(self._keys, bool)
        template[list(dysco.template)] = True
        self.state = _with_template(self.state, np.int32(slot), template)

    def __contains__(self, slot: int) -> bool:
        return slot in self._bound

    def told(self, rows: Sequence[Row]) -> dict[int, Row]:
        """Rows, by number, that select something, and whose requests want to know what."""
        return {
            number: row
            for number, row in enumerate(rows)
            if (dysco := self._bound[row.slot]).params.return_selection and row.position >= dysco.raised_from
        }

    def rows(self, rows: Sequence[Row], padded: int) -> tuple[DyscoRows, tuple[int, ...]]:
        """What the device is told of the rows, which all have one, and the layers that are watched."""
        bound = [self._bound[row.slot] for row in rows]
        layers = tuple(sorted({layer for dysco in bound for layer, _ in dysco.params.heads}))
        out = DyscoRows(
            slot=np.full(padded, self._padding, np.int32),
            weights=np.zeros((padded, len(layers), self._heads), np.float32),
            is_first=np.ones(padded, bool),
            history=np.zeros(padded, np.float32),
            top_p=np.ones(padded, np.float32),
            top_k=np.ones(padded, np.int32),
            candidates=np.zeros(padded, np.int32),
            bias=np.zeros(padded, np.float32),
        )
        for number, (row, dysco) in enumerate(zip(rows, bound, strict=True)):
            params = dysco.params
            out.slot[number] = row.slot
            for layer, head in params.heads:
                out.weights[number, layers.index(layer), head] = 1 / len(params.heads)
            is_raised = row.position >= dysco.raised_from
            out.is_first[number] = row.position == dysco.observed_from
            out.history[number] = 1.0 if params.static and is_raised else params.history
            out.top_p[number] = 1.0 if params.top_p is None else params.top_p
            out.top_k[number] = self._keys if params.top_k is None else min(params.top_k, self._keys)
            out.candidates[number] = dysco.raised_from if params.static else row.position + 1
            out.bias[number] = math.log(params.strength) if is_raised else 0.0
        return out, layers


@dataclass(frozen=True, slots=True)
class Selections:
    """Selections under way, of those rows, by number, whose requests want to know them."""

    wanted: Mapping[int, Row]
    chosen: Chosen

    def fetch(self) -> dict[int, Selection]:
        """Waits for the device; by sequence."""
        selected, relevance = map(np.asarray, self.chosen)
        return {
            row.seq_id: Selection(
                row.position,
                np.flatnonzero(selected[number]).tolist(),
                relevance[number, : row.position + 1].tobytes(),
            )
            for number, row in self.wanted.items()
        }
