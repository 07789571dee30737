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
from jaxdual.engine.paged import Arenas, GroupTable
from jaxdual.engine.steps import Leaves, Programs, Routing

Stash = Float[Array, "tokens hidden"]


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
        self.upper = jax.jit(self._upper, donate_argnames=donated)

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
        positions, real = _positions(starts, counts, chunk)
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
        stash = stash.at[self._rows(positions, real, tables[0], stash)].set(x, mode="drop")
        return arenas, stash, p_ik(probe, x[_last(counts, chunk)])

    def _upper(
        self,
        leaves: Leaves,
        arenas: Arenas,
        stash: Stash,
        starts: Int32[Array, " seqs"],
        counts: Int32[Array, " seqs"],
        tables: tuple[GroupTable, ...],
        padding: Int32[Array, " chunk"],
        experts: Any = None,
    ) -> tuple[Arenas, Stash, Float[Array, "seqs hidden"]]:
        """Upper layers of chunks that have gone through the lower ones: residual stream of the last token of each.

        Args:
          padding: of the length that chunks are padded to; its values are not used.
        """
        programs, model, chunk = self._programs, self._programs.model(leaves), padding.shape[0]
        positions, real = _positions(starts, counts, chunk)
        attend = programs.prefill_attend(starts, counts, tables, chunk)
        routing = Routing(experts, real.reshape(-1), None)
        x = stash.at[self._rows(positions, real, tables[0], stash)].get(mode="fill", fill_value=0)
        layers = range(self._tap, model.config.num_layers)
        x, arenas = model.run(layers, x, positions.reshape(-1), attend, arenas, programs.mix(routing))
        return arenas, stash, x[_last(counts, chunk)]

    def _rows(
        self, positions: Int32[Array, "seqs chunk"], real: Array, table: GroupTable, stash: Stash
    ) -> Int32[Array, " rows"]:
        """Where tokens lie in the stash; padding lies behind its end."""
        pages = jnp.take_along_axis(jnp.asarray(table.pages), positions // self._page_size, axis=1, mode="clip")
        rows = pages * self._page_size + positions % self._page_size
        return jnp.where(real, rows, stash.shape[0]).reshape(-1)


def _positions(starts: Int32[Array, " seqs"], counts: Int32[Array, " seqs"], chunk: int) -> tuple[Array, Array]:
    """Positions of the tokens of chunks, and which tokens are no padding; `[seqs, chunk]`."""
    offsets = jnp.arange(chunk, dtype=jnp.int32)[None, :]
    return starts[:, None] + offsets, offsets < counts[:, None]


def _last(counts: Int32[Array, " seqs"], chunk: int) -> Int32[Array, " seqs"]:
    """Rows of the last tokens of chunks that lie side by side."""
    return jnp.arange(counts.shape[0], dtype=jnp.int32) * chunk + jnp.maximum(counts - 1, 0)
