"""The jitted programs of an engine, as pure functions of parameters, arenas and per-sequence state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding
from jaxtyping import Array, Bool, Float, Float32, Int32

from jaxdual.engine import sampler
from jaxdual.engine.paged import Arenas, Attend, GroupTable, decode_attend, prefill_attend
from jaxdual.engine.router_counts import RouterCounts, count
from jaxdual.engine.sampler import Logprobs, SampleInputs, SamplerState
from jaxdual.engine.watched import Watched
from jaxdual.kv.layout import KVLayout
from models import Decoder
from models.layers import Mix
from models.moe import MoE
from pallas_kernels.key_bias import KeyBias
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


def chunk_positions(
    starts: Int32[Array, " seqs"], counts: Int32[Array, " seqs"], chunk: int
) -> tuple[Int32[Array, "seqs chunk"], Bool[Array, "seqs chunk"]]:
    """Positions of the tokens of padded chunks, and which of them are no padding."""
    offsets = jnp.arange(chunk, dtype=jnp.int32)[None, :]
    return starts[:, None] + offsets, offsets < counts[:, None]


def last_rows(counts: Int32[Array, " seqs"], chunk: int) -> Int32[Array, " seqs"]:
    """Rows of the last tokens of padded chunks that lie side by side."""
    return jnp.arange(counts.shape[0], dtype=jnp.int32) * chunk + jnp.maximum(counts - 1, 0)


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
        self.sample = jax.jit(self._sample, donate_argnums=2)
        self.score = jax.jit(self._score)
        self.set_slot = jax.jit(partial(self.on_slot, sampler.set_slot), donate_argnums=0)
        self.gather: Callable[..., jax.Array] = jax.jit(gather_blocks, static_argnames="rows_per_block")
        self.scatter: Callable[..., jax.Array] = jax.jit(scatter_blocks, donate_argnums=0)

    def arena_sharding(self, group: int = 0) -> Sharding:
        """Where the arena of a layer group lies."""
        return self.slot_sharding

    @property
    def slot_sharding(self) -> Sharding:
        """Where state lies that has a row for each slot."""
        sharding: Sharding = self.leaves[0].sharding
        return sharding

    def on_host(self, results: Any) -> Any:
        """Arrays of the device as arrays of the host, whole; waits for them."""
        return jax.tree.map(np.asarray, results)

    def model(self, leaves: Leaves) -> Any:
        """The model of some leaves, while a step is traced."""
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
        chunk = tokens.shape[1]
        tokens = self.split(tokens)
        positions, real = chunk_positions(starts, counts, chunk)
        attend = self.prefill_attend(starts, counts, tables, chunk)
        routing = Routing(experts, real.reshape(-1), router_counts)
        x, arenas = self.model(leaves)(tokens.reshape(-1), positions.reshape(-1), attend, arenas, self.mix(routing))
        return arenas, x, x[last_rows(counts, chunk)], self.counted(routing)

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
        tokens = self.split(self.known(tokens, last_token, slots))
        attend, routing = self.decode_attend(positions, tables), Routing(experts, positions >= 0, router_counts)
        x, arenas = self.model(leaves)(tokens, jnp.maximum(positions, 0), attend, arenas, self.mix(routing))
        return arenas, x, self.counted(routing)

    def known(
        self, tokens: Int32[Array, " seqs"], last_token: Int32[Array, " slots"], slots: Int32[Array, " seqs"]
    ) -> Int32[Array, " seqs"]:
        """Tokens, with the last one sampled in its slot in place of each -1."""
        sampled: Array = self.on_ranks(lambda last, slots: last[slots], last_token, slots)
        return jnp.where(tokens < 0, sampled, tokens)

    def _sample(
        self, leaves: Leaves, x: Float[Array, "rows hidden"], state: SamplerState, inputs: SampleInputs
    ) -> tuple[SamplerState, Int32[Array, " rows"], Logprobs]:
        sampled: tuple[SamplerState, Array, Logprobs]
        sampled = self.on_ranks(sampler.sample, self.model(leaves).head(x), state, inputs)
        state, tokens, logprobs = sampled
        return state, *self.for_host((tokens, logprobs))

    def _score(self, leaves: Leaves, x: Float[Array, "rows hidden"], tokens: Int32[Array, " rows"]) -> Logprobs:
        return self.for_host(sampler.token_logprobs(self.model(leaves).head(x), tokens))

    def mix(self, routing: Routing) -> Mix | None:
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

    def counted(self, routing: Routing) -> RouterCounts | None:
        """Counts, with what the layers of a step have chosen."""
        if routing.counts is None:
            return None
        counted: RouterCounts = self.on_ranks(count, routing.counts, routing.chosen, routing.real)
        return counted

    # What depends on where things lie: here, on one device.

    def split(self, tokens: Int32[Array, "*batch"]) -> Int32[Array, "*batch"]:
        """Puts the tokens of each rank on its devices, which the residual stream then follows."""
        return tokens

    def prefill_attend(
        self,
        starts: Int32[Array, " seqs"],
        counts: Int32[Array, " seqs"],
        tables: tuple[GroupTable, ...],
        chunk: int,
        *,
        watched: Watched | None = None,
        looked: int = 0,
    ) -> Attend:
        """`paged.prefill_attend`."""
        look = None if watched is None else watched.look
        return prefill_attend(self._layout, starts, counts, tables, chunk, look=look, looked=looked)

    def decode_attend(
        self,
        positions: Int32[Array, " seqs"],
        tables: tuple[GroupTable, ...],
        *,
        key_bias: KeyBias | None = None,
        watched: Watched | None = None,
    ) -> Attend:
        """`paged.decode_attend`."""
        look = None if watched is None else watched.look
        return decode_attend(self._layout, positions, tables, key_bias=key_bias, look=look)

    def _mixture(
        self, layer: int, moe: MoE, x: Float[Array, "T D"], routing: Routing
    ) -> tuple[Int32[Array, "T k"], Float[Array, "T D"]]:
        """What each token chose, and what became of it."""
        chosen, out = _routed(moe, x)
        return chosen, out

    def on_ranks(self, function: Callable[..., Any], *parts: Any) -> Any:
        """Calls a function with each rank's parts of some arrays, which are split along their first axes."""
        return function(*parts)

    def on_slot(self, function: Callable[..., Any], state: Any, slot: Int32[Array, ""], *row: Any) -> Any:
        """Calls `function(state, slot, *row)`, which writes the row of a slot.

        Args:
          slot: counted over all ranks.
        """
        return function(state, slot, *row)

    def over_heads(self, attention: Array) -> Float32[Array, "rows keys"]:
        """What heads of all devices look at, of what `Watched` has taken."""
        return attention

    def of_slot(self, array: Array, slot: Int32[Array, ""]) -> Array:
        """The row of a slot, counted over all ranks, whole on each device."""
        return array[slot]

    def for_host[T](self, results: T) -> T:
        """Results that every process can read whole."""
        return results
