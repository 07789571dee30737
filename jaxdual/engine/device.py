"""What lies on the devices of an engine, and the programs that change it: each is called in one place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from jaxdual.engine.dysco import Chosen, ObservedChunks
from jaxdual.engine.dysco_slots import DyscoSlots, DyscoStep
from jaxdual.engine.mesh_programs import MeshPrograms
from jaxdual.engine.page_tables import PageTables
from jaxdual.engine.paged import GroupTable
from jaxdual.engine.router_counts import RouterCounts, no_counts
from jaxdual.engine.slot_sampler import SlotSampler
from jaxdual.engine.steps import Programs
from jaxdual.kv.layout import KVLayout
from jaxdual.kv.manager import GroupPages, TableChange
from jaxdual.kv.slots import IntegrityError
from jaxdual.parallel.mesh import DeviceMesh
from jaxdual.scheduling.experts import Placement
from models import Decoder


class Device:
    """Owns weights, arenas, per-sequence sampler state and router counts; and the tables that lead there.

    Warm-up and steps call programs here, so that they can't differ. Arrays have a part for each rank.

    Args:
      model: to run.
      layout: of the arenas.
      memory: of a rank, for each layer group, in the order of the layout's.
      max_num_seqs: sequences of a rank that run at once.
      max_model_len: tokens of the longest sequence.
      max_chunk: tokens of the longest chunk.
      mesh: of the devices that the model lies on; None for one.
      placement: of the model's experts on them.
      count_routers: what steps count of the routers' choices, of a model with experts.

    Attributes:
      ranks: that have sequences and pages of their own.
      padding_slot: of each rank, behind those of its sequences.
      keys: that a sequence's table has room for.
      num_heads: query heads of a layer.
    """

    def __init__(
        self,
        model: Decoder,
        layout: KVLayout,
        *,
        memory: Sequence[GroupPages],
        max_num_seqs: int,
        max_model_len: int,
        max_chunk: int,
        mesh: DeviceMesh | None = None,
        placement: Placement | None = None,
        count_routers: Literal["off", "activations", "transitions"] = "off",
    ) -> None:
        self.programs: Programs = (
            Programs(model, layout) if mesh is None else MeshPrograms(model, layout, mesh, placement)
        )
        self.layout = layout
        self.ranks = ranks = 1 if mesh is None else mesh.sizes.ranks
        # Committed to the weights' devices from the start, as what programs return is: else they compile twice.
        self.arenas = tuple(
            jnp.zeros(
                layout.arena_shape(ranks * pages.num_pages, group),
                layout.dtype,
                device=self.programs.arena_sharding(group),
            )
            for group, pages in enumerate(memory)
        )
        self._addresses = [_addresses(arena) for arena in self.arenas]
        self._tables = [
            PageTables(pages, ranks * (max_num_seqs + 1), layout.page_size, layout.pages_for(max_model_len), max_chunk)
            for pages in memory
        ]
        self.sampler = SlotSampler(self.programs, max_num_seqs, model.config.vocab_size, ranks)
        self.padding_slot = self.sampler.padding_slot
        self.keys = self._tables[0].width * layout.page_size
        self.num_heads = model.config.num_heads
        moe = model.config.moe
        self._router_counts: RouterCounts | None = None
        if count_routers != "off" and moe is not None:
            self._router_counts = no_counts(
                ranks,
                len(model.config.sparse_layers),
                moe.num_experts,
                self.programs.slot_sharding,
                transitions=count_routers == "transitions",
            )

    def take_router_counts(self) -> RouterCounts | None:
        """What routers have chosen since the last call, on the host; waits for it. None where nothing is counted."""
        counts = self._router_counts
        if counts is None:
            return None
        taken: RouterCounts = self.programs.on_host(counts)
        self._router_counts = jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype, device=one.sharding), counts)
        return taken

    def check_arena(self) -> None:
        """Raises `IntegrityError` if an arena is not the buffer that it was at the start."""
        for group, (arena, before) in enumerate(zip(self.arenas, self._addresses, strict=True)):
            addresses = _addresses(arena)
            if addresses != before:
                raise IntegrityError(f"the arena of group {group} moved from {before} to {addresses}")

    def change_table(self, rank: int, slot: int, change: TableChange) -> None:
        """From the next program on, a sequence's pages are others."""
        self._tables[change.group].change(rank * (self.padding_slot + 1) + slot, change)

    def group_tables(self, slots: Int32[np.ndarray, "ranks rows"], chunk: int) -> tuple[GroupTable, ...]:
        """Tables of the sequences in some slots, for chunks of so many tokens."""
        rows = slots + np.arange(self.ranks)[:, None] * (self.padding_slot + 1)
        return tuple(tables.of(rows.reshape(-1), chunk) for tables in self._tables)

    def decode(
        self,
        slots: Int32[np.ndarray, "ranks rows"],
        tokens: Int32[np.ndarray, "ranks rows"],
        positions: Int32[np.ndarray, "ranks rows"],
    ) -> jax.Array:
        """Starts `Programs.decode`: the residual stream of all rows."""
        programs, tables = self.programs, self.group_tables(slots, 1)
        batch = (slots.reshape(-1), tokens.reshape(-1), positions.reshape(-1))
        x: jax.Array
        self.arenas, x, self._router_counts = programs.decode(
            programs.leaves,
            self.arenas,
            self.sampler.last_token,
            *batch,
            tables,
            programs.experts,
            self._router_counts,
        )
        return x

    def decode_dysco(
        self,
        slots: Int32[np.ndarray, "ranks rows"],
        tokens: Int32[np.ndarray, "ranks rows"],
        positions: Int32[np.ndarray, "ranks rows"],
        dysco: DyscoSlots,
        step: DyscoStep,
        *,
        each: int = 1,
    ) -> tuple[jax.Array, tuple[Chosen | None, ...]]:
        """Starts `DyscoPrograms.decode`: the residual stream of all rows, and what was chosen."""
        programs, tables = self.programs, self.group_tables(slots, 1)
        batch = (slots.reshape(-1), tokens.reshape(-1), positions.reshape(-1))
        x: jax.Array
        chosen: tuple[Chosen | None, ...]
        self.arenas, x, self._router_counts, dysco.state, chosen = dysco.programs.decode(
            programs.leaves,
            self.arenas,
            self.sampler.last_token,
            *batch,
            tables,
            dysco.state,
            step.peeked,
            step.passed,
            layers=step.layers,
            each=each,
            experts=programs.experts,
            router_counts=self._router_counts,
        )
        return x, chosen

    def prefill(
        self,
        tokens: Int32[np.ndarray, "ranks rows chunk"],
        starts: Int32[np.ndarray, "ranks rows"],
        counts: Int32[np.ndarray, "ranks rows"],
        slots: Int32[np.ndarray, "ranks rows"],
    ) -> tuple[jax.Array, jax.Array]:
        """Starts `Programs.prefill`: the residual stream of all tokens, and of the last one of each chunk."""
        programs, chunk = self.programs, tokens.shape[2]
        batch = (tokens.reshape(-1, chunk), starts.reshape(-1), counts.reshape(-1))
        self.arenas, x, last, self._router_counts = programs.prefill(
            programs.leaves,
            self.arenas,
            *batch,
            self.group_tables(slots, chunk),
            programs.experts,
            self._router_counts,
        )
        return x, last

    def observe(
        self,
        tokens: Int32[np.ndarray, "ranks rows chunk"],
        starts: Int32[np.ndarray, "ranks rows"],
        counts: Int32[np.ndarray, "ranks rows"],
        slots: Int32[np.ndarray, "ranks rows"],
        dysco: DyscoSlots,
        chunks: ObservedChunks,
        layers: tuple[int, ...],
    ) -> None:
        """Starts `DyscoPrograms.observe`."""
        programs, chunk = self.programs, tokens.shape[2]
        batch = (tokens.reshape(-1, chunk), starts.reshape(-1), counts.reshape(-1))
        self.arenas, self._router_counts, dysco.state = dysco.programs.observe(
            programs.leaves,
            self.arenas,
            *batch,
            self.group_tables(slots, chunk),
            dysco.state,
            chunks,
            layers=layers,
            experts=programs.experts,
            router_counts=self._router_counts,
        )

    def gather(self, group: int, pages: Int32[np.ndarray, " pages"]) -> jax.Array:
        """Starts a copy of pages of a group, counted over all ranks, out of its arena."""
        rows = self.layout.groups[group].rows_per_page
        blocks: jax.Array = self.programs.gather(self.arenas[group], pages, rows_per_block=rows)
        return blocks

    def scatter(self, group: int, pages: Int32[np.ndarray, " pages"], blocks: np.ndarray) -> None:
        """Starts a copy of blocks to pages of a group, counted over all ranks."""
        arena = self.programs.scatter(self.arenas[group], pages, blocks)
        self.arenas = (*self.arenas[:group], arena, *self.arenas[group + 1 :])


def _addresses(arena: jax.Array) -> tuple[int, ...]:
    """Where an arena lies on each of this process's devices."""
    return tuple(shard.data.unsafe_buffer_pointer() for shard in arena.addressable_shards)
