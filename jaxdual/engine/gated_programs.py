"""The jitted programs of prompts that may be refused: their lower layers with the probe behind them, and their upper
layers.

Between the two, the residual stream of a token lies where its page of KV memory says: as many rows as the arena has
tokens. So a prompt waits for its verdict however many chunks it has, and goes on in chunks of any other lengths.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from jaxdual.cascade.probe import ProbeParameters, p_ik
from jaxdual.engine.paged import Arenas, GroupTable, places_of
from jaxdual.engine.steps import Leaves, Programs, Routing, chunk_positions, last_rows

Stash = Float[Array, "pages page_size hidden"]


class GatedPrograms:
    """Compiled per padded shape on first use; arenas and stash are donated.

    Args:
      programs: of the engine, whose model has one group of layers, which see all tokens.
      tap: layers below the probe.
      page_size: of the arena.
    """

    def __init__(self, programs: Programs, tap: int, page_size: int) -> None:
        self._programs, self._tap, self._page_size = programs, tap, page_size
        donated = ("arenas", "stash")
        self.lower = jax.jit(self._lower, donate_argnames=donated)
        self.upper = jax.jit(self._upper, donate_argnames=donated, static_argnames="chunk")

    def _lower(
        self,
        leaves: Leaves,
        probe: ProbeParameters,
        arenas: Arenas,
        stash: Stash,
        tokens: Int32[Array, "seqs chunk"],
        starts: Int32[Array, " seqs"],
        counts: Int32[Array, " seqs"],
        tables: tuple[GroupTable, ...],
        experts: Any = None,
    ) -> tuple[Arenas, Stash, Float32[Array, " seqs"]]:
        """Embedding and lower layers of chunks; P(IK) at the last token of each."""
        programs, model, chunk = self._programs, self._programs.model(leaves), tokens.shape[1]
        positions, real = chunk_positions(starts, counts, chunk)
        attend = programs.prefill_attend(starts, counts, tables, chunk)
        routing = Routing(experts, real.reshape(-1), None)
        x, arenas = model.run(
            range(self._tap),
            model.embed(tokens.reshape(-1)),
            positions.reshape(-1),
            attend,
            arenas,
            programs.mix(routing),
        )
        stash = stash.at[self._places(positions, real, tables)].set(x, mode="drop")
        return arenas, stash, p_ik(probe, x[last_rows(counts, chunk)])

    def _upper(
        self,
        leaves: Leaves,
        arenas: Arenas,
        stash: Stash,
        starts: Int32[Array, " seqs"],
        counts: Int32[Array, " seqs"],
        tables: tuple[GroupTable, ...],
        chunk: int,
        experts: Any = None,
    ) -> tuple[Arenas, Stash, Float[Array, "seqs hidden"]]:
        """Upper layers of chunks that have gone through the lower ones: residual stream of the last token of each.

        Args:
          chunk: tokens that chunks are padded to.
        """
        programs, model = self._programs, self._programs.model(leaves)
        positions, real = chunk_positions(starts, counts, chunk)
        attend = programs.prefill_attend(starts, counts, tables, chunk)
        routing = Routing(experts, real.reshape(-1), None)
        x = stash.at[self._places(positions, real, tables)].get(mode="fill", fill_value=0)
        layers = range(self._tap, model.config.num_layers)
        x, arenas = model.run(layers, x, positions.reshape(-1), attend, arenas, programs.mix(routing))
        return arenas, stash, x[last_rows(counts, chunk)]

    def _places(
        self, positions: Int32[Array, "seqs chunk"], real: Array, tables: tuple[GroupTable, ...]
    ) -> tuple[jax.Array, jax.Array]:
        return places_of(self._page_size, positions, real, jnp.asarray(tables[0].pages))
