"""The jitted programs of an engine, as pure functions of parameters, arenas and per-sequence state."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from jaxdual.engine import sampler
from jaxdual.engine.paged import Arenas, GroupTable, decode_attend, prefill_attend
from jaxdual.engine.sampler import Logprobs, SampleInputs, SamplerState
from jaxdual.kv.layout import KVLayout
from models import Decoder
from pallas_kernels.kv_blocks import gather_blocks, scatter_blocks

Leaves = list[jax.Array]


class Programs:
    """Compiled per padded shape on first use; the arenas and the sampler state are donated.

    Args:
      model: whose weights are handed to each call as leaves (`leaves`), so that nothing is baked into a program.
      layout: of the arenas.
    """

    def __init__(self, model: Decoder, layout: KVLayout) -> None:
        graphdef, state = nnx.split(model)
        self.leaves, self._structure = jax.tree.flatten(state)
        self._graphdef = graphdef
        self._layout = layout
        self.prefill = jax.jit(self._prefill, donate_argnums=1)
        self.decode = jax.jit(self._decode, donate_argnums=1)
        self.sample = jax.jit(self._sample, donate_argnums=2)
        self.score = jax.jit(self._score)
        self.set_slot = jax.jit(sampler.set_slot, donate_argnums=0)
        self.gather = jax.jit(gather_blocks, static_argnames="rows_per_block")
        self.scatter = jax.jit(scatter_blocks, donate_argnums=0)

    def _model(self, leaves: Leaves) -> Any:
        return nnx.merge(self._graphdef, jax.tree.unflatten(self._structure, leaves))

    def _prefill(
        self,
        leaves: Leaves,
        arenas: Arenas,
        tokens: Int32[Array, "seqs chunk"],
        starts: Int32[Array, " seqs"],
        counts: Int32[Array, " seqs"],
        tables: tuple[GroupTable, ...],
    ) -> tuple[Arenas, Float[Array, "tokens hidden"], Float[Array, "seqs hidden"]]:
        """Residual stream of all tokens, and of the last token of each chunk."""
        seqs, chunk = tokens.shape
        positions = starts[:, None] + jnp.arange(chunk, dtype=jnp.int32)[None, :]
        attend = prefill_attend(self._layout, starts, counts, tables, chunk)
        x, arenas = self._model(leaves)(tokens.reshape(-1), positions.reshape(-1), attend, arenas)
        last = jnp.arange(seqs, dtype=jnp.int32) * chunk + jnp.maximum(counts - 1, 0)
        return arenas, x, x[last]

    def _decode(
        self,
        leaves: Leaves,
        arenas: Arenas,
        last_token: Int32[Array, " slots"],
        slots: Int32[Array, " seqs"],
        tokens: Int32[Array, " seqs"],
        positions: Int32[Array, " seqs"],
        tables: tuple[GroupTable, ...],
    ) -> tuple[Arenas, Float[Array, "seqs hidden"]]:
        """Residual stream of one token of each sequence; a token of -1 stands for the last one sampled in its slot."""
        tokens = jnp.where(tokens < 0, last_token[slots], tokens)
        attend = decode_attend(self._layout, positions, tables)
        x, arenas = self._model(leaves)(tokens, jnp.maximum(positions, 0), attend, arenas)
        return arenas, x

    def _sample(
        self, leaves: Leaves, x: Float[Array, "rows hidden"], state: SamplerState, inputs: SampleInputs
    ) -> tuple[SamplerState, Int32[Array, " rows"], Logprobs]:
        return sampler.sample(self._model(leaves).head(x), state, inputs)

    def _score(self, leaves: Leaves, x: Float[Array, "rows hidden"], tokens: Int32[Array, " rows"]) -> Logprobs:
        return sampler.token_logprobs(self._model(leaves).head(x), tokens)
