"""The programs of an engine whose model lies on a mesh of devices.

What the single-device programs do for one batch, these do for one batch of each rank at once: batches lie side by side
along the leading axis, padded to one shape. Slots and pages are counted within a rank, as its scheduler counts them.
Attention, block moves, experts and sampling are written for one device and run on each (`shard_map`), as kernels must;
projections, norms and the output head are split by the compiler after the shardings of parameters and residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec, Sharding
from jaxtyping import Array, Float, Int32

from jaxdual.engine.paged import Arenas, Attend, GroupTable, Look, decode_attend, prefill_attend
from jaxdual.engine.steps import Programs, Routing
from jaxdual.engine.watched import Watched
from jaxdual.kv.layout import KVLayout
from jaxdual.parallel.exchange import ExpertExchange, ExpertSlots, slots_of_choices
from jaxdual.parallel.mesh import RANKS, TENSOR, DeviceMesh
from jaxdual.parallel.placement import STACKS, ExpertMover, expert_slots, move_sizes
from jaxdual.scheduling.experts import Move, Placement
from models import Decoder
from models.moe import MoE
from models.shapes import parameter_path
from pallas_kernels.key_bias import KeyBias
from pallas_kernels.kv_blocks import gather_blocks, scatter_blocks
from pallas_kernels.pseudo_heads import PseudoHeads

_BY_RANK = PartitionSpec(RANKS)
_HEADS = PartitionSpec(RANKS, TENSOR, None)
_QUERY_HEADS = PartitionSpec(RANKS, TENSOR)
ARENA = PartitionSpec(RANKS, None, TENSOR, None)
_WHOLE_ARENA = PartitionSpec(RANKS, None, None, None)  # of layers whose query heads need all key-value heads


class MeshPrograms(Programs):
    """`Programs` on a mesh.

    Args:
      model: its parameters lie as `models.sharding` says, the experts by slot.
      layout: of the arenas, with all key-value heads.
      mesh: of the devices.
      placement: of the experts; None for a model without.
    """

    def __init__(self, model: Decoder, layout: KVLayout, mesh: DeviceMesh, placement: Placement | None) -> None:
        super().__init__(model, layout)
        self._mesh = mesh
        self._place_experts(model, placement)
        self._exchange = ExpertExchange(mesh)
        self._exchanged = jax.jit(self._route_and_exchange)  # within the step: layers share a trace
        self._gathered = jax.jit(lambda results: results, out_shardings=mesh.sharding())
        whole = [group.every_head and mesh.sizes.tensor > 1 for group in layout.groups]
        self._arenas = tuple(_WHOLE_ARENA if one else ARENA for one in whole)
        gather = jax.jit(self._gather, static_argnames=("rows_per_block", "spec"))
        scatter = jax.jit(self._scatter, static_argnames="spec", donate_argnums=0)
        self.gather = lambda arena, *args, **kwargs: gather(arena, *args, **kwargs, spec=self._spec_of(arena))
        self.scatter = lambda arena, *args: scatter(arena, *args, spec=self._spec_of(arena))

    def _place_experts(self, model: Decoder, placement: Placement | None) -> None:
        self._sparse = model.config.sparse_layers
        if placement is None:
            return
        slots = dict(zip(self._sparse, expert_slots(placement, self._mesh), strict=True))
        self.experts = [slots.get(layer) for layer in range(model.config.num_layers)]
        paths = [parameter_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(nnx.state(model))]
        self._stacks = {
            layer: [paths.index(f"layers.{layer}.mlp.experts.{name}") for name in STACKS] for layer in self._sparse
        }
        self._num_experts = placement.num_experts
        self._mover = ExpertMover(self._mesh)

    def move_experts(self, row: int, moves: Sequence[Move], experts: Sequence[int]) -> None:
        """Has steps from now on find the experts of one layer in other slots.

        Args:
          row: of the layer in placements.
          moves: from the slots before.
          experts: in each slot.
        """
        layer = self._sparse[row]
        self._replace(self._stacks[layer], moves)
        placement = Placement(np.array([experts], np.int32), self._mesh.sizes.expert, self._num_experts)
        self.experts[layer] = expert_slots(placement, self._mesh)[0]

    def _replace(self, places: Sequence[int], moves: Sequence[Move], least: int = 0) -> None:
        """Puts moved stacks in the place of those that were there."""
        stacks = self._mover.move([self.leaves[place] for place in places], moves, least)
        for place, stack in zip(places, stacks, strict=True):
            self.leaves[place] = stack

    def warm_up_moves(self) -> Iterator[tuple[str, Callable[[], object]]]:
        """Name and call of every program that moves experts, each of which moves none."""
        if self.experts is None:
            return
        places = self._stacks[self._sparse[0]]

        def move(size: int) -> object:
            self._replace(places, (), least=size)
            return self.leaves[places[0]]

        for size in move_sizes(self.leaves[places[0]].shape[0]):
            yield f"move experts={size}", partial(move, size)

    def arena_sharding(self, group: int = 0) -> Sharding:
        return self._mesh.sharding(*self._arenas[group])

    @property
    def slot_sharding(self) -> Sharding:
        return self._mesh.sharding(*_BY_RANK)

    def _spec_of(self, arena: jax.Array) -> PartitionSpec:
        whole = self._mesh.sizes.tensor > 1 and TENSOR not in arena.sharding.spec  # type: ignore[attr-defined]
        return _WHOLE_ARENA if whole else ARENA

    def split(self, tokens: Int32[Array, "*batch"]) -> Int32[Array, "*batch"]:
        split: Array = jax.lax.with_sharding_constraint(tokens, self._mesh.sharding(self._mesh.rules.tokens))
        return split

    # Attention.

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
        def local(
            look: Look | None, starts: Array, counts: Array, tables: tuple[GroupTable, ...], key_bias: None
        ) -> Attend:
            return prefill_attend(self._layout, starts, counts, tables, chunk, look=look, looked=looked)

        return self._attend(local, watched, starts, counts, tables, None)

    def decode_attend(
        self,
        positions: Int32[Array, " seqs"],
        tables: tuple[GroupTable, ...],
        *,
        key_bias: KeyBias | None = None,
        watched: Watched | None = None,
    ) -> Attend:
        def local(
            look: Look | None, positions: Array, tables: tuple[GroupTable, ...], key_bias: KeyBias | None
        ) -> Attend:
            return decode_attend(self._layout, positions, tables, key_bias=key_bias, look=look)

        return self._attend(local, watched, positions, tables, key_bias)

    def _attend(self, local: Callable[..., Attend], watched: Watched | None, *batch: Any) -> Attend:
        """Attention of each rank over its own pages, each device with its own heads.

        Args:
          local: `(look, *batch)` as one device has them, to attention as it does it.
          watched: what heads of all devices look at.
          batch: of all ranks.
        """

        def attend(
            layer: int, q: Array, k: Array, v: Array, arenas: Arenas, pseudo: PseudoHeads | None = None
        ) -> tuple[Array, Arenas]:
            mixing, structure = jax.tree.flatten(pseudo)
            operands = _Operands(q, k, v, arenas, mixing)
            weights = rows = None
            if watched is not None:
                weights, rows = watched.of(layer), watched.rows

            def on_device(operands: _Operands, weights: Array | None, rows: Any, *batch: Any) -> tuple[Any, ...]:
                operands = operands._replace(pseudo=jax.tree.unflatten(structure, operands.pseudo))
                if weights is None or watched is None:
                    return *local(None, *batch)(layer, *operands), None
                own = Watched(weights[:, None], (layer,), rows, watched.is_biased)
                out = local(own.look, *batch)(layer, *operands)
                return *out, own.attention[:, None]

            keys = _HEADS if pseudo is None else _BY_RANK  # each device mixes its heads' from those of all
            # Mixing weights are split as the query heads, phases not at all.
            of_mixing = [PartitionSpec(None, TENSOR) if one.ndim == 3 else PartitionSpec() for one in mixing]
            specs = _Operands(_HEADS, keys, keys, self._arenas, of_mixing)
            out, arenas, attention = self._mesh.on_each(
                on_device,
                (specs, _QUERY_HEADS, _BY_RANK, *jax.tree.map(lambda _: _BY_RANK, batch)),
                (_HEADS, specs.arenas, _QUERY_HEADS),
            )(operands, weights, rows, *batch)
            if watched is not None and attention is not None:
                watched.note(attention)
            return out, arenas

        return attend

    # Experts.

    def _mixture(self, layer: int, moe: MoE, x: Array, routing: Routing) -> tuple[Array, Array]:
        chosen, out = self._exchanged(moe, x, routing.experts[layer], routing.real)
        return chosen, out

    def _route_and_exchange(self, moe: MoE, x: Array, where: ExpertSlots, real: Array) -> tuple[Array, Array]:
        chosen, weights = moe.route(x)
        slots = slots_of_choices(where, chosen, real, moe.experts.gate.shape[0])
        return chosen, self._exchange(moe.experts, x, slots, weights)

    # Parts of ranks.

    def on_ranks(self, function: Callable[..., Any], *parts: Any) -> Any:
        return self._mesh.on_each(function, _BY_RANK, _BY_RANK)(*parts)

    def on_slot(self, function: Callable[..., Any], state: Any, slot: Int32[Array, ""], *row: Any) -> Any:
        def local(state: Any, slot: Array, *row: Any) -> Any:
            slots = jax.tree.leaves(state)[0].shape[0]
            own = slot - jax.lax.axis_index(RANKS) * slots
            # What is written to a row that the state doesn't have is dropped.
            return function(state, jnp.where((own >= 0) & (own < slots), own, slots), *row)

        whole = PartitionSpec()
        return self._mesh.on_each(local, (_BY_RANK, *(whole for _ in range(1 + len(row)))), _BY_RANK)(state, slot, *row)

    def over_heads(self, attention: Array) -> Array:
        summed: Array = self._mesh.on_each(lambda own: jax.lax.psum(own[:, 0], TENSOR), _QUERY_HEADS, _BY_RANK)(
            attention
        )
        return summed

    def of_slot(self, array: Array, slot: Int32[Array, ""]) -> Array:
        def local(array: Array, slot: Array) -> Array:
            own = slot - jax.lax.axis_index(RANKS) * array.shape[0]
            mine = (own >= 0) & (own < array.shape[0])
            row: Array = jax.lax.psum(jnp.where(mine, array[jnp.where(mine, own, 0)], 0), RANKS)
            return row

        found: Array = self._mesh.on_each(local, (_BY_RANK, PartitionSpec()), PartitionSpec())(array, slot)
        return found

    def for_host[T](self, results: T) -> T:
        if not self._mesh.spans_processes:
            return results
        constrained: T = jax.lax.with_sharding_constraint(results, self._mesh.sharding())
        return constrained

    def on_host(self, results: Any) -> Any:
        if self._mesh.spans_processes:
            results = self._gathered(results)
        return super().on_host(results)

    # Blocks.

    def _gather(
        self,
        arena: Float[Array, "rows page_size kv_heads head_dim"],
        pages: Int32[Array, " blocks"],
        *,
        rows_per_block: int,
        spec: PartitionSpec,
    ) -> Array:
        """Blocks with all heads; those of rank r have its page ids behind those of all ranks before.

        Args:
          spec: how the arena is split.
        """

        def local(arena: Array, pages: Array) -> Array:
            own, mine = self._own_pages(arena, pages, rows_per_block)
            blocks = gather_blocks(arena, own, rows_per_block=rows_per_block)
            summed: Array = jax.lax.psum(jnp.where(mine[:, None, None, None, None], blocks, 0), RANKS)
            return summed

        blocks: Array = self._mesh.on_each(local, (spec, PartitionSpec()), _block_spec(spec))(arena, pages)
        return blocks

    def _scatter(
        self,
        arena: Float[Array, "rows page_size kv_heads head_dim"],
        pages: Int32[Array, " blocks"],
        blocks: Float[Array, "blocks rows_per_block page_size kv_heads head_dim"],
        *,
        spec: PartitionSpec,
    ) -> Array:
        def local(arena: Array, pages: Array, blocks: Array) -> Array:
            own, _ = self._own_pages(arena, pages, blocks.shape[1])
            return scatter_blocks(arena, own, blocks)

        specs = (spec, PartitionSpec(), _block_spec(spec))
        written: Array = self._mesh.on_each(local, specs, spec)(arena, pages, blocks)
        return written

    def _own_pages(self, arena: Array, pages: Array, rows_per_block: int) -> tuple[Array, Array]:
        """Pages as this rank counts them, those of others as padding; and which are its own."""
        count = arena.shape[0] // rows_per_block
        own = pages - jax.lax.axis_index(RANKS) * count
        mine = (own >= 0) & (own < count)
        return jnp.where(mine, own, count), mine


class _Operands(NamedTuple):
    """What attention takes of a layer."""

    q: Any
    k: Any
    v: Any
    arenas: Any
    pseudo: Any


def _block_spec(arena: PartitionSpec) -> PartitionSpec:
    """How blocks of an arena that is split so are."""
    return PartitionSpec(None, None, None, arena[2], None)
