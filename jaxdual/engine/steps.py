"""The jitted programs of an engine, as pure functions of parameters, arenas and per-sequence state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding
from jaxtyping import Array, Bool, Float, Float32, Int32

from jaxdual.engine import sampler
from jaxdual.engine.dysco import Chosen, DyscoRows, DyscoState, Watched, choose
from jaxdual.engine.paged import Arenas, Attend, GroupTable, decode_attend, prefill_attend
from jaxdual.engine.router_counts import RouterCounts, count
from jaxdual.engine.sampler import Logprobs, SampleInputs, SamplerState
from jaxdual.kv.layout import KVLayout
from models import Decoder
from models.layers import Mix
from models.moe import MoE
from pallas_kernels.kv_blocks import gather_blocks, scatter_blocks

Leaves = list[jax.Array]


@dataclass(slots=True)
class Routing:
    """What the mixtures of experts of one traced step need to know, and what they chose.

    Attributes:
      experts: where the experts of each layer are; None where they are all in place.
      real: which tokens are no padding.
      counts: what choices are added to; None for no counting.
      chosen: experts of each token, of the layers so far.
    """

    experts: Any
    real: Bool[Array, " tokens"]
    counts: RouterCounts | None
    chosen: list[Int32[Array, "tokens k"]] = field(default_factory=list)


@jax.jit  # within the step: layers share a trace
def _routed(moe: MoE, x: Float[Array, "T D"]) -> tuple[Int32[Array, "T k"], Float[Array, "T D"]]:
    chosen, weights = moe.route(x)
    return chosen, moe.apply(x, chosen, weights)


class Programs:
    """Compiled per padded shape on first use; the arenas and the sampler state are donated.

    Args:
      model: whose weights are handed to each call as leaves (`leaves`), so that nothing is baked into a program.
      layout: of the arenas.

    Attributes:
      experts: where the experts of each layer are, an argument of the steps; None where they are all in place.
    """

    experts: Any = None

    def __init__(self, model: Decoder, layout: KVLayout) -> None:
        graphdef, state = nnx.split(model)
        self.leaves, self._structure = jax.tree.flatten(state)
        self._graphdef = graphdef
        self._layout = layout
        donated = ("arenas", "router_counts")
        self.prefill = jax.jit(self._prefill, donate_argnames=donated)
        self.decode = jax.jit(self._decode, donate_argnames=donated)
        self.decode_dysco = jax.jit(self._decode_dysco, donate_argnames=(*donated, "state"), static_argnames="layers")
        self.sample = jax.jit(self._sample, donate_argnums=2)
        self.score = jax.jit(self._score)
        self.set_slot = jax.jit(sampler.set_slot, donate_argnums=0)
        self.gather = jax.jit(gather_blocks, static_argnames="rows_per_block")
        self.scatter = jax.jit(scatter_blocks, donate_argnums=0)

    @property
    def arena_sharding(self) -> Sharding:
        """Where arenas lie."""
        sharding: Sharding = self.leaves[0].sharding
        return sharding

    @property
    def slot_sharding(self) -> Sharding:
        """Where state lies that has a row for each slot."""
        return self.arena_sharding

    def on_host(self, results: Any) -> Any:
        """Arrays of the device as arrays of the host, whole; waits for them."""
        return jax.tree.map(np.asarray, results)

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
        experts: Any = None,
        router_counts: RouterCounts | None = None,
    ) -> tuple[Arenas, Float[Array, "tokens hidden"], Float[Array, "seqs hidden"], RouterCounts | None]:
        """Residual stream of all tokens, and of the last token of each chunk."""
        seqs, chunk = tokens.shape
        tokens = self._split(tokens)
        offsets = jnp.arange(chunk, dtype=jnp.int32)[None, :]
        positions = starts[:, None] + offsets
        attend = self._prefill_attend(starts, counts, tables, chunk)
        routing = Routing(experts, (offsets < counts[:, None]).reshape(-1), router_counts)
        x, arenas = self._model(leaves)(tokens.reshape(-1), positions.reshape(-1), attend, arenas, self._mix(routing))
        last = jnp.arange(seqs, dtype=jnp.int32) * chunk + jnp.maximum(counts - 1, 0)
        return arenas, x, x[last], self._counted(routing)

    def _decode(
        self,
        leaves: Leaves,
        arenas: Arenas,
        last_token: Int32[Array, " slots"],
        slots: Int32[Array, " seqs"],
        tokens: Int32[Array, " seqs"],
        positions: Int32[Array, " seqs"],
        tables: tuple[GroupTable, ...],
        experts: Any = None,
        router_counts: RouterCounts | None = None,
    ) -> tuple[Arenas, Float[Array, "seqs hidden"], RouterCounts | None]:
        """Residual stream of one token of each sequence; a token of -1 stands for the last one sampled in its slot."""
        tokens = self._split(jnp.where(tokens < 0, self._at_slots(last_token, slots), tokens))
        attend, routing = self._decode_attend(positions, tables), Routing(experts, positions >= 0, router_counts)
        return self._all_layers(self._model(leaves), arenas, tokens, positions, attend, routing)

    def _all_layers(
        self,
        model: Any,
        arenas: Arenas,
        tokens: Int32[Array, " seqs"],
        positions: Int32[Array, " seqs"],
        attend: Attend,
        routing: Routing,
    ) -> tuple[Arenas, Float[Array, "seqs hidden"], RouterCounts | None]:
        """One token of each sequence; positions of padding are -1."""
        x, arenas = model(tokens, jnp.maximum(positions, 0), attend, arenas, self._mix(routing))
        return arenas, x, self._counted(routing)

    def _decode_dysco(
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
        """`_decode`, of which the first sequences are decoded by DySCO: they go through the layers up to the last of
        `layers`, those of retrieval heads, before all go through all of them.

        The first pass leaves keys and values where the second one writes its own, layer by layer before it reads them.

        Returns:
          Also the new state, and what those sequences have selected.
        """
        model, count = self._model(leaves), rows.slot.shape[0]
        tokens = jnp.where(tokens < 0, self._at_slots(last_token, slots), tokens)
        first = tuple(GroupTable(table.pages[:count]) for table in tables)
        watched = Watched(rows.weights, layers)
        attend = decode_attend(self._layout, positions[:count], first, look=watched.look)
        x, rope = model.embed(tokens[:count]), model.rope(jnp.maximum(positions[:count], 0))
        mix = self._mix(Routing(experts, positions[:count] >= 0, None))
        for layer in range(max(layers) + 1):
            x, arenas = model.layer(layer, x, rope, attend, arenas, mix)
        state, chosen, key_bias = choose(state, rows, watched.attention, positions)
        attend = decode_attend(self._layout, positions, tables, key_bias=key_bias)
        routing = Routing(experts, positions >= 0, router_counts)
        return *self._all_layers(model, arenas, tokens, positions, attend, routing), state, chosen

    def _sample(
        self, leaves: Leaves, x: Float[Array, "rows hidden"], state: SamplerState, inputs: SampleInputs
    ) -> tuple[SamplerState, Int32[Array, " rows"], Logprobs]:
        return self._sampled(self._model(leaves).head(x), state, inputs)

    def _score(self, leaves: Leaves, x: Float[Array, "rows hidden"], tokens: Int32[Array, " rows"]) -> Logprobs:
        return sampler.token_logprobs(self._model(leaves).head(x), tokens)

    def _mix(self, routing: Routing) -> Mix | None:
        """How mixtures of experts are computed; it notes what was chosen. None for as the model does."""
        if routing.counts is None and routing.experts is None:
            return None

        def mix(layer: int, mlp: nnx.Module, x: Array) -> Array:
            out: Array
            if not isinstance(mlp, MoE):
                out = mlp(x)
                return out
            chosen, out = self._mixture(layer, mlp, x, routing)
            routing.chosen.append(chosen)
            return out

        return mix

    def _counted(self, routing: Routing) -> RouterCounts | None:
        return None if routing.counts is None else self._count(routing.counts, routing.chosen, routing.real)

    # What depends on where things lie: here, on one device.

    def _split(self, tokens: Int32[Array, "*batch"]) -> Int32[Array, "*batch"]:
        """Puts the tokens of each rank on its devices, which the residual stream then follows."""
        return tokens

    def _prefill_attend(
        self, starts: Int32[Array, " seqs"], counts: Int32[Array, " seqs"], tables: tuple[GroupTable, ...], chunk: int
    ) -> Attend:
        return prefill_attend(self._layout, starts, counts, tables, chunk)

    def _decode_attend(self, positions: Int32[Array, " seqs"], tables: tuple[GroupTable, ...]) -> Attend:
        return decode_attend(self._layout, positions, tables)

    def _mixture(
        self, layer: int, moe: MoE, x: Float[Array, "T D"], routing: Routing
    ) -> tuple[Int32[Array, "T k"], Float[Array, "T D"]]:
        """What each token chose, and what became of it."""
        chosen, out = _routed(moe, x)
        return chosen, out

    def _count(
        self, counts: RouterCounts, chosen: Sequence[Int32[Array, "T k"]], real: Bool[Array, " T"]
    ) -> RouterCounts:
        return count(counts, chosen, real)

    def _at_slots(self, last_token: Int32[Array, " slots"], slots: Int32[Array, " seqs"]) -> Int32[Array, " seqs"]:
        return last_token[slots]

    def _sampled(
        self, logits: Float32[Array, "rows vocab"], state: SamplerState, inputs: SampleInputs
    ) -> tuple[SamplerState, Int32[Array, " rows"], Logprobs]:
        return sampler.sample(logits, state, inputs)
