"""The jitted programs of an engine's steps in which sequences are decoded by DySCO."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from jaxdual.engine.dysco import (
    Chosen,
    DyscoRows,
    DyscoState,
    ObservedChunks,
    PassedRows,
    choose_after,
    choose_before,
    choose_in_turn,
    for_all,
    observe,
    set_slot,
)
from jaxdual.engine.paged import Arenas, Attend, GroupTable
from jaxdual.engine.router_counts import RouterCounts
from jaxdual.engine.steps import Leaves, Programs, Routing
from jaxdual.engine.watched import Watched, at_rows
from pallas_kernels.key_bias import WORD, KeyBias

_Part = tuple[Any, KeyBias]  # rows, and what is added to their scores


class DyscoPrograms:
    """Compiled per padded shape and set of watched layers on first use; arenas and state are donated.

    Args:
      programs: of the engine.
    """

    def __init__(self, programs: Programs) -> None:
        self._programs = programs
        donated = ("arenas", "router_counts", "state")
        self.decode = jax.jit(self._decode, donate_argnames=donated, static_argnames=("layers", "each"))
        self.observe = jax.jit(self._observe, donate_argnames=donated, static_argnames="layers")
        self.set_slot = jax.jit(self._set_slot, donate_argnums=0)
        self.relevance_of = jax.jit(self._relevance_of)

    def _decode(
        self,
        leaves: Leaves,
        arenas: Arenas,
        last_token: Int32[Array, " slots"],
        slots: Int32[Array, " seqs"],
        tokens: Int32[Array, " seqs"],
        positions: Int32[Array, " seqs"],
        tables: tuple[GroupTable, ...],
        state: DyscoState,
        peeked: DyscoRows | None,
        passed: PassedRows | None,
        layers: tuple[tuple[int, ...], tuple[int, ...]],
        each: int = 1,
        experts: Any = None,
        router_counts: RouterCounts | None = None,
    ) -> tuple[Arenas, Float[Array, "seqs hidden"], RouterCounts | None, DyscoState, tuple[Chosen | None, ...]]:
        """`Programs.decode`, of which some rows are decoded by DySCO. Those peeked go through the layers up to the last
        with one of their retrieval heads, before all rows go through all of them.

        The first pass leaves keys and values where the second one writes its own, layer by layer before it reads them.

        Args:
          peeked, passed: rows that go through the model twice and once; None for none.
          layers: those with retrieval heads of either.
          each: rows that are tokens of one sequence, one after the other; all are peeked then.

        Returns:
          Of the last token of each sequence; also the new state, and what peeked and passed rows have selected.
        """
        programs, model = self._programs, self._programs.model(leaves)
        tokens = programs.split(programs.known(tokens, last_token, slots))
        words = -(-state.relevance.shape[1] // WORD)
        chosen: list[Chosen | None] = [None, None]
        routing = Routing(experts, positions >= 0, router_counts)
        below, behind = list[_Part](), list[_Part]()
        if peeked is not None:
            arenas, state, chosen[0], key_bias = self._chosen(
                model, arenas, tokens, positions, tables, state, peeked, layers[0], each, experts
            )
            below.append((peeked.row, key_bias))
        behind += below
        x, rope = model.embed(tokens), model.rope(jnp.maximum(positions, 0))
        mix, first = programs.mix(routing), 0
        if passed is not None:
            lengths = programs.on_ranks(at_rows, passed.rows.row, positions + 1)
            before = programs.on_ranks(choose_before, state, passed, lengths)
            below.append((passed.rows.row, before[1]))
            watched = Watched(passed.rows.weights, layers[1], passed.rows.row, is_biased=True)
            attend = self._raised(positions, tables, words, below, watched)
            first = max(layers[1], default=-1) + 1
            for layer in range(first):
                x, arenas = model.layer(layer, x, rope, attend, arenas, mix)
            attention = jnp.zeros((lengths.shape[0], state.relevance.shape[1]))
            if first:
                attention = programs.over_heads(watched.attention)
            state, chosen[1], key_bias = programs.on_ranks(choose_after, state, passed, before, attention, lengths)
            behind.append((passed.rows.row, key_bias))
        attend = self._raised(positions, tables, words, behind)
        for layer in range(first, model.config.num_layers):
            x, arenas = model.layer(layer, x, rope, attend, arenas, mix)
        last = programs.on_ranks(lambda x: x.reshape(-1, each, x.shape[1])[:, -1], x)
        return arenas, last, programs.counted(routing), state, programs.for_host(tuple(chosen))

    def _chosen(
        self,
        model: Any,
        arenas: Arenas,
        tokens: Int32[Array, " seqs"],
        positions: Int32[Array, " seqs"],
        tables: tuple[GroupTable, ...],
        state: DyscoState,
        peeked: DyscoRows,
        layers: tuple[int, ...],
        each: int,
        experts: Any,
    ) -> tuple[Arenas, DyscoState, Chosen, KeyBias]:
        """The first pass: what peeked rows select, and what it adds to their scores in the second."""
        programs = self._programs
        few, lengths, few_tables = programs.on_ranks(at_rows, peeked.row, (tokens, positions + 1, tables))
        watched = Watched(peeked.weights, layers)
        arenas, attention = self._peek(model, arenas, few, lengths, few_tables, watched, experts)
        state, chosen, key_bias = programs.on_ranks(
            partial(choose_in_turn, each=each), state, peeked, attention, lengths
        )
        return arenas, state, chosen, key_bias

    def _raised(
        self,
        positions: Int32[Array, " seqs"],
        tables: tuple[GroupTable, ...],
        words: int,
        parts: Sequence[_Part],
        watched: Watched | None = None,
    ) -> Attend:
        """Attention of all rows, to which something is added for some."""

        def everybody(positions: Array, *parts: _Part) -> KeyBias:
            return for_all(positions, words, *parts)

        key_bias = self._programs.on_ranks(everybody, positions, *parts)
        return self._programs.decode_attend(positions, tables, key_bias=key_bias, watched=watched)

    def _peek(
        self,
        model: Any,
        arenas: Arenas,
        tokens: Int32[Array, " rows"],
        lengths: Int32[Array, " rows"],
        tables: tuple[GroupTable, ...],
        watched: Watched,
        experts: Any,
    ) -> tuple[Arenas, Float32[Array, "rows keys"]]:
        """What the heads look at when nothing is raised; padding has no length."""
        programs = self._programs
        attend = programs.decode_attend(lengths - 1, tables, watched=watched)
        mix = programs.mix(Routing(experts, lengths > 0, None))
        x, rope = model.embed(tokens), model.rope(jnp.maximum(lengths - 1, 0))
        for layer in range(max(watched.layers) + 1):
            x, arenas = model.layer(layer, x, rope, attend, arenas, mix)
        return arenas, programs.over_heads(watched.attention)

    def _observe(
        self,
        leaves: Leaves,
        arenas: Arenas,
        tokens: Int32[Array, "seqs chunk"],
        starts: Int32[Array, " seqs"],
        counts: Int32[Array, " seqs"],
        tables: tuple[GroupTable, ...],
        state: DyscoState,
        chunks: ObservedChunks,
        layers: tuple[int, ...],
        experts: Any = None,
        router_counts: RouterCounts | None = None,
    ) -> tuple[Arenas, RouterCounts | None, DyscoState]:
        """`Programs.prefill` of chunks whose tokens are watched; nothing comes after them in a prompt's computation
        that needs their residual stream.
        """
        programs, looked = self._programs, chunks.offsets.shape[1]
        watched = Watched(jnp.repeat(jnp.asarray(chunks.weights), looked, axis=0), layers)
        tokens, width = programs.split(tokens), tokens.shape[1]
        offsets = jnp.arange(width, dtype=jnp.int32)[None, :]
        positions = starts[:, None] + offsets
        attend = programs.prefill_attend(starts, counts, tables, width, watched=watched, looked=looked)
        routing = Routing(experts, (offsets < counts[:, None]).reshape(-1), router_counts)
        _, arenas = programs.model(leaves)(
            tokens.reshape(-1), positions.reshape(-1), attend, arenas, programs.mix(routing)
        )
        state = programs.on_ranks(observe, state, chunks, programs.over_heads(watched.attention))
        return arenas, programs.counted(routing), state

    def _set_slot(
        self,
        state: DyscoState,
        slot: Int32[Array, ""],
        relevance: Float32[Array, " keys"],
        template: Bool[Array, " keys"],
    ) -> DyscoState:
        """See `dysco.set_slot`; slots are counted over all ranks."""
        written: DyscoState = self._programs.on_slot(set_slot, state, slot, relevance, template)
        return written

    def _relevance_of(self, state: DyscoState, slot: Int32[Array, ""]) -> Float32[Array, " keys"]:
        """Of the sequence in a slot, counted over all ranks."""
        return self._programs.of_slot(state.relevance, slot)
