"""The jitted programs of an engine's steps in which sequences are decoded by DySCO."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from jaxdual.engine.dysco import (
    Chosen,
    DyscoRows,
    DyscoState,
    ObservedChunks,
    Watched,
    choose,
    for_all,
    observe,
    set_slot,
)
from jaxdual.engine.paged import Arenas, GroupTable
from jaxdual.engine.router_counts import RouterCounts
from jaxdual.engine.steps import Leaves, Programs, Routing


class DyscoPrograms:
    """Compiled per padded shape and set of watched layers on first use; arenas and state are donated.

    Args:
      programs: of the engine.
    """

    def __init__(self, programs: Programs) -> None:
        self._programs = programs
        donated = ("arenas", "router_counts", "state")
        self.decode = jax.jit(self._decode, donate_argnames=donated, static_argnames="layers")
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
        rows: DyscoRows,
        layers: tuple[int, ...],
        experts: Any = None,
        router_counts: RouterCounts | None = None,
    ) -> tuple[Arenas, Float[Array, "seqs hidden"], RouterCounts | None, DyscoState, Chosen]:
        """`Programs.decode`, of which each rank's first sequences are decoded by DySCO: they go through the layers up
        to the last of `layers`, those of retrieval heads, before all go through all of them.

        The first pass leaves keys and values where the second one writes its own, layer by layer before it reads them.

        Returns:
          Also the new state, and what those sequences have selected.
        """
        programs, model = self._programs, self._programs.model(leaves)
        tokens = programs.split(programs.known(tokens, last_token, slots))
        first: tuple[Array, Array, tuple[GroupTable, ...]]
        first = programs.on_ranks(_leading, rows.slot, (tokens, positions, tables))
        arenas, attention = self._peek(model, arenas, *first, Watched(rows.weights, layers), experts)
        state, chosen, of_first = programs.on_ranks(choose, state, rows, attention, first[1])
        key_bias = programs.on_ranks(for_all, of_first, positions)
        attend = programs.decode_attend(positions, tables, key_bias=key_bias)
        routing = Routing(experts, positions >= 0, router_counts)
        x, arenas = model(tokens, jnp.maximum(positions, 0), attend, arenas, programs.mix(routing))
        return arenas, x, programs.counted(routing), state, programs.for_host(chosen)

    def _peek(
        self,
        model: Any,
        arenas: Arenas,
        tokens: Int32[Array, " rows"],
        positions: Int32[Array, " rows"],
        tables: tuple[GroupTable, ...],
        watched: Watched,
        experts: Any,
    ) -> tuple[Arenas, Float32[Array, "rows keys"]]:
        """What the heads look at when nothing is raised."""
        programs = self._programs
        attend = programs.decode_attend(positions, tables, watched=watched)
        mix = programs.mix(Routing(experts, positions >= 0, None))
        x, rope = model.embed(tokens), model.rope(jnp.maximum(positions, 0))
        for layer in range(max(watched.layers) + 1):
            x, arenas = model.layer(layer, x, rope, attend, arenas, mix)
        return arenas, watched.attention

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
        state = programs.on_ranks(observe, state, chunks, watched.attention)
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


def _leading(few: Array, many: Any) -> Any:
    """As many leading rows of some arrays as another one has."""
    return jax.tree.map(lambda one: one[: few.shape[0]], many)
