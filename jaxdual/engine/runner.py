"""Carries out step plans on the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from jaxdual.engine.buckets import Buckets, PrefillBatch, PrefillShape
from jaxdual.engine.direct_landing import DirectLanding
from jaxdual.engine.dysco import Chosen, ObservedChunks
from jaxdual.engine.dysco_slots import DyscoSlots, DyscoStep, Selections
from jaxdual.engine.mesh_programs import MeshPrograms
from jaxdual.engine.page_tables import PageTables
from jaxdual.engine.paged import GroupTable
from jaxdual.engine.request import Selection, TokenLogprobs
from jaxdual.engine.router_counts import RouterCounts, no_counts
from jaxdual.engine.slot_sampler import SampleBatch, Sampled, SampleRow, SlotBinding, SlotSampler
from jaxdual.engine.steps import Programs
from jaxdual.engine.warm_up import timed
from jaxdual.kv.layout import KVLayout
from jaxdual.kv.manager import GroupPages, PageCopy
from jaxdual.kv.slots import IntegrityError
from jaxdual.parallel.mesh import DeviceMesh
from jaxdual.scheduling.experts import Move, Placement
from jaxdual.scheduling.plan import Chunk, Row, StepPlan
from models import Decoder

# Pages moved by one program between tiers: a copy or two of waste at the end of a long move costs less than another
# program to compile.
COPY_PAGES = 8


@dataclass(frozen=True, slots=True)
class ScoreTargets:
    """Prompt log-probabilities wanted of a chunk: of `tokens`, which follow its positions from number `skip` on."""

    skip: int
    tokens: Sequence[int]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gave.

    Attributes:
      sampled: tokens, one a sampling chunk or row.
      prompt_logprobs: of sequences that wanted them, for the positions of their chunk's targets.
      selections: each with a sequence that wants it told, in the order of their positions.
    """

    sampled: tuple[Sampled, ...]
    prompt_logprobs: Mapping[int, tuple[TokenLogprobs, ...]]
    selections: tuple[tuple[int, Selection], ...]


@dataclass(frozen=True, slots=True)
class _Scored:
    """Residual stream whose prompt log-probabilities are wanted: sequence, first row, target tokens of each."""

    x: jax.Array
    parts: tuple[tuple[int, int, Sequence[int]], ...]


@dataclass(slots=True)
class Launch:
    """A step that was dispatched and not fetched yet.

    Attributes:
      batches: tokens under way.
      selections: of those sequences that want them told.
      scored: residual streams of which something is wanted.
      parked: sequences of which something is kept.
    """

    batches: list[SampleBatch] = field(default_factory=list)
    selections: list[Selections] = field(default_factory=list)
    scored: list[_Scored] = field(default_factory=list)
    parked: tuple[int, ...] = ()


class Runner:
    """Owns what lies on the device: weights, arenas, per-sequence sampler state; and the tables that lead there.

    Dispatch returns at once; the device works in dispatch order, so a later step sees what an earlier one wrote.

    On a mesh each rank has sequences and pages of its own, which are counted from 0 in each; a step is that of all
    ranks together, in the one shape that holds each one's part.

    Args:
      model: to run.
      layout: of the arenas.
      memory: of a rank, for each layer group, in the order of the layout's.
      max_num_seqs: sequences of a rank that run at once.
      max_model_len: tokens of the longest sequence.
      max_chunk: tokens of the longest chunk.
      buckets: padded shapes.
      host: host memory of each layer group, `[ranks * (host_pages + staging_pages), *block]`.
      direct: writes blocks straight into the arenas; see `DirectLanding`.
      mesh: of the devices that the model lies on; None for one.
      placement: of the model's experts on them.
      count_routers: what steps count of the routers' choices, of a model with experts.
      dysco_layers: for which programs of DySCO are warmed up; none for no such programs.
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
        buckets: Buckets,
        host: Sequence[np.ndarray],
        direct: bool = False,
        mesh: DeviceMesh | None = None,
        placement: Placement | None = None,
        count_routers: Literal["off", "activations", "transitions"] = "off",
        dysco_layers: Sequence[int] = (),
    ) -> None:
        self.buckets = buckets
        self.programs: Programs = (
            Programs(model, layout) if mesh is None else MeshPrograms(model, layout, mesh, placement)
        )
        self.layout = layout
        self.ranks = ranks = 1 if mesh is None else mesh.sizes.ranks
        # Committed to the weights' devices from the start, as what programs return is: else they compile twice.
        self.arenas = tuple(
            jnp.zeros(
                layout.arena_shape(ranks * pages.num_pages, group), layout.dtype, device=self.programs.arena_sharding
            )
            for group, pages in enumerate(memory)
        )
        self._addresses = [_addresses(arena) for arena in self.arenas]
        self._tables = [
            PageTables(pages, ranks * (max_num_seqs + 1), layout.page_size, layout.pages_for(max_model_len), max_chunk)
            for pages in memory
        ]
        self._sampler = SlotSampler(self.programs, max_num_seqs, model.config.vocab_size, ranks)
        self._padding_slot = self._sampler.padding_slot
        self._config = model.config
        self._dysco_layers = tuple(dysco_layers)
        self._dysco: DyscoSlots | None = self._new_dysco() if dysco_layers else None
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
        self._memory = tuple(memory)
        self._host = tuple(host)
        self._landing: deque[tuple[int, jax.Array, list[int]]] = deque()
        self._direct: DirectLanding | None = None
        if direct:
            self._direct = DirectLanding([one.shape[1:] for one in host], self.check_arena)

    def dispatch(
        self, plans: Sequence[StepPlan], bindings: Sequence[SlotBinding], targets: Mapping[int, ScoreTargets]
    ) -> Launch:
        """Starts a step.

        Args:
          plans: what to do, of each rank.
          bindings: of the sequences admitted by them.
          targets: of the sequences whose chunk in this step wants prompt log-probabilities.
        """
        launch = Launch()
        if self._dysco is not None:
            launch.parked = self._park(self._dysco, plans)
        for rank, plan in enumerate(plans):
            self._copy(rank, plan.copies)
            for slot, change in plan.tables:
                self._tables[change.group].change(self._slot(rank, slot), change)
        for binding in bindings:
            self._sampler.bind(binding)
            if binding.dysco is not None and self._dysco is None:
                self._dysco = self._new_dysco()
            if self._dysco is not None:
                self._dysco.bind(binding.rank, binding.slot, binding.seq_id, binding.dysco)
        # Rows before chunks: they wait for the step before this one already, so their tokens come first.
        if any(plan.rows for plan in plans):
            self._decode(launch, [plan.rows for plan in plans])
        chunks_of: Sequence[Sequence[Chunk]] = [plan.chunks for plan in plans]
        if self._dysco is not None:
            chunks_of, observed, raised = self._dysco.split(chunks_of)
            for batch in self.buckets.prefill(observed):
                self._observe(self._dysco, batch)
            if any(raised):
                self._raise(launch, self._dysco, raised)
        for batch in self.buckets.prefill(chunks_of):
            self._prefill(launch, batch, targets)
        return launch

    def fetch(self, launch: Launch) -> StepResult:
        """Waits for a step and brings its results to the host."""
        sampled = [one for batch in launch.batches for one in batch.fetch()]
        self._land()
        if self._dysco is not None:
            self._dysco.settle(launch.parked)
        prompt_logprobs = {
            seq_id: self._sampler.score(scored.x, first, wanted)
            for scored in launch.scored
            for seq_id, first, wanted in scored.parts
        }
        selections = tuple(one for told in launch.selections for one in told.fetch())
        return StepResult(tuple(sampled), prompt_logprobs, selections)

    def warm_ups(self, *, moves: bool = False) -> Iterator[tuple[str, Callable[[], float]]]:
        """Name of every program in every shape, and a call that compiles and runs it and returns the seconds it took.

        Further calls of a shape that is compiled already, by a request or before, take next to nothing.

        Args:
          moves: those that move experts, too, where there are some on several devices.
        """
        yield from timed(self._warm_up_runs())
        if moves and isinstance(self.programs, MeshPrograms):
            yield from timed(self.programs.warm_up_moves())

    def move_experts(self, row: int, moves: Sequence[Move], experts: Sequence[int]) -> None:
        """See `MeshPrograms.move_experts`."""
        if not isinstance(self.programs, MeshPrograms):
            raise TypeError("on one device, experts don't move")
        self.programs.move_experts(row, moves, experts)

    # Of a runner that works together with those of other processes (`engine.replay`).

    @property
    def descriptors(self) -> tuple[int, ...]:
        """Readable when one of the other processes has ended."""
        return ()

    def check_processes(self) -> None:
        """Raises `EngineDeadError` if one of the other processes has ended."""

    def close(self) -> None:
        """Ends the other processes."""

    # Single calls.

    def gather(self, group: int, pages: Sequence[int]) -> jax.Array:
        """Starts a copy of up to `COPY_PAGES` pages of a group off the device: the first blocks of the result.

        Args:
          pages: counted over all ranks.
        """
        return self._run_gather(group, self._padded(group, pages))

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

    # Parts of a step. Arrays have a part for each rank; rows of all parts are numbered through.

    def _decode(self, launch: Launch, rows_of: Sequence[Sequence[Row]]) -> None:
        padded = self.buckets.decode(max(map(len, rows_of)))
        slots = np.full((self.ranks, padded), self._padding_slot, np.int32)
        tokens = np.zeros((self.ranks, padded), np.int32)
        positions = np.full((self.ranks, padded), -1, np.int32)
        sampling: list[SampleRow] = []
        for rank, rows in enumerate(rows_of):
            slots[rank, : len(rows)] = [row.slot for row in rows]
            tokens[rank, : len(rows)] = [-1 if row.token is None else row.token for row in rows]
            positions[rank, : len(rows)] = [row.position for row in rows]
            first = rank * padded
            sampling += [
                SampleRow(first + index, row.seq_id, rank, row.slot, row.output_index)
                for index, row in enumerate(rows)
                if row.samples
            ]
        dysco = self._dysco
        step = None if dysco is None else dysco.rows(rows_of, padded)
        if dysco is None or step is None:
            x = self._run_decode(slots, tokens, positions)
        else:
            x, chosen = self._run_decode_dysco(slots, tokens, positions, dysco, step)
            launch.selections += _told(step, chosen)
        launch.batches.append(self._sampler.sample(x, sampling))

    def _prefill(self, launch: Launch, batch: PrefillBatch, targets: Mapping[int, ScoreTargets]) -> None:
        shape, parts, sampling = batch.shape, [], []
        for rank, chunks in enumerate(batch.chunks):
            for index, chunk in enumerate(chunks):
                row, wanted = rank * shape.rows + index, targets.get(chunk.seq_id)
                if wanted is not None:
                    parts.append((chunk.seq_id, row * shape.chunk + wanted.skip, wanted.tokens))
                if chunk.samples:
                    sampling.append(SampleRow(row, chunk.seq_id, rank, chunk.slot, chunk.output_index))
        x, last = self._run_prefill(*self._packed(batch))
        if parts:
            launch.scored.append(_Scored(x, tuple(parts)))
        if sampling:
            launch.batches.append(self._sampler.sample(last, sampling))

    def _park(self, dysco: DyscoSlots, plans: Sequence[StepPlan]) -> tuple[int, ...]:
        for rank, plan in enumerate(plans):
            for parked in plan.parked:
                dysco.park(rank, parked)
            dysco.unpark(plan.unparked)
        return tuple(parked.seq_id for plan in plans for parked in plan.parked)

    def _observe(self, dysco: DyscoSlots, batch: PrefillBatch) -> None:
        chunks, layers = dysco.chunks(batch)
        self._run_observe(*self._packed(batch), dysco, chunks, layers)

    def _raise(self, launch: Launch, dysco: DyscoSlots, chunks_of: Sequence[Sequence[Chunk]]) -> None:
        seqs = self.buckets.decode(max(map(len, chunks_of)))
        step, tails = dysco.tails(chunks_of, seqs)
        x, chosen = self._run_decode_dysco(*tails[:3], dysco, step, each=tails.each)
        launch.selections += _told(step, chosen)
        sampling = [
            SampleRow(rank * seqs + index, chunk.seq_id, rank, chunk.slot, chunk.output_index)
            for rank, chunks in enumerate(chunks_of)
            for index, chunk in enumerate(chunks)
            if chunk.samples
        ]
        if sampling:
            launch.batches.append(self._sampler.sample(x, sampling))

    def _packed(self, batch: PrefillBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, starts, counts and slots of chunks, as programs take them."""
        shape = batch.shape
        tokens = np.zeros((self.ranks, shape.rows, shape.chunk), np.int32)
        starts = np.zeros((self.ranks, shape.rows), np.int32)
        counts = np.zeros((self.ranks, shape.rows), np.int32)
        slots = np.full((self.ranks, shape.rows), self._padding_slot, np.int32)
        for rank, chunks in enumerate(batch.chunks):
            for index, chunk in enumerate(chunks):
                tokens[rank, index, : len(chunk.tokens)] = chunk.tokens
                starts[rank, index] = chunk.start
                counts[rank, index] = len(chunk.tokens)
                slots[rank, index] = chunk.slot
        return tokens, starts, counts, slots

    def _slot(self, rank: int, slot: int) -> int:
        """Row of the tables of all ranks."""
        return rank * (self._padding_slot + 1) + slot

    def _group_tables(self, slots: Int32[np.ndarray, "ranks rows"], chunk: int) -> tuple[GroupTable, ...]:
        rows = slots + np.arange(self.ranks)[:, None] * (self._padding_slot + 1)
        return tuple(tables.of(rows.reshape(-1), chunk) for tables in self._tables)

    # Copies between tiers.

    def _copy(self, rank: int, copies: Sequence[PageCopy]) -> None:
        for run in _runs(copies):
            group = run[0].group
            host, first_page = self._host[group], rank * self._memory[group].num_pages
            first_slot = rank * (len(host) // self.ranks)
            pages, slots = [first_page + copy.page for copy in run], [first_slot + copy.slot for copy in run]
            if run[0].direction == "out":
                self._landing.append((group, self.gather(group, pages), slots))
                continue
            self._land()
            if self._direct is not None:
                self._direct.land(self.arenas, group, pages, host, slots)
            else:
                blocks = np.zeros((COPY_PAGES, *host.shape[1:]), host.dtype)
                blocks[: len(run)] = host[slots]
                self._run_scatter(group, self._padded(group, pages), blocks)

    def _padded(self, group: int, pages: Sequence[int]) -> np.ndarray:
        """Pages of one program, and behind them one that the arena doesn't have: it is not moved."""
        padded = np.full(COPY_PAGES, self.ranks * self._memory[group].num_pages, np.int32)
        padded[: len(pages)] = pages
        return padded

    def _land(self) -> None:
        """Brings blocks on their way out into their host slots, in the order in which they left."""
        while self._landing:
            group, blocks, slots = self._landing.popleft()
            self._host[group][slots] = np.asarray(blocks)[: len(slots)]

    # Programs: each is called in one place, so that warm-up and steps can't differ.

    def _run_decode(
        self,
        slots: Int32[np.ndarray, "ranks rows"],
        tokens: Int32[np.ndarray, "ranks rows"],
        positions: Int32[np.ndarray, "ranks rows"],
    ) -> jax.Array:
        programs, tables = self.programs, self._group_tables(slots, 1)
        batch = (slots.reshape(-1), tokens.reshape(-1), positions.reshape(-1))
        x: jax.Array
        self.arenas, x, self._router_counts = programs.decode(
            programs.leaves,
            self.arenas,
            self._sampler.last_token,
            *batch,
            tables,
            programs.experts,
            self._router_counts,
        )
        return x

    def _run_decode_dysco(
        self,
        slots: Int32[np.ndarray, "ranks rows"],
        tokens: Int32[np.ndarray, "ranks rows"],
        positions: Int32[np.ndarray, "ranks rows"],
        dysco: DyscoSlots,
        step: DyscoStep,
        *,
        each: int = 1,
    ) -> tuple[jax.Array, tuple[Chosen | None, ...]]:
        programs, tables = self.programs, self._group_tables(slots, 1)
        batch = (slots.reshape(-1), tokens.reshape(-1), positions.reshape(-1))
        x: jax.Array
        chosen: tuple[Chosen | None, ...]
        self.arenas, x, self._router_counts, dysco.state, chosen = dysco.programs.decode(
            programs.leaves,
            self.arenas,
            self._sampler.last_token,
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

    def _new_dysco(self) -> DyscoSlots:
        return DyscoSlots(
            self.programs,
            self.buckets,
            slots=self._padding_slot + 1,
            keys=self._tables[0].width * self.layout.page_size,
            heads=self._config.num_heads,
            ranks=self.ranks,
        )

    def _run_prefill(
        self,
        tokens: Int32[np.ndarray, "ranks rows chunk"],
        starts: Int32[np.ndarray, "ranks rows"],
        counts: Int32[np.ndarray, "ranks rows"],
        slots: Int32[np.ndarray, "ranks rows"],
    ) -> tuple[jax.Array, jax.Array]:
        programs, chunk = self.programs, tokens.shape[2]
        batch = (tokens.reshape(-1, chunk), starts.reshape(-1), counts.reshape(-1))
        self.arenas, x, last, self._router_counts = programs.prefill(
            programs.leaves,
            self.arenas,
            *batch,
            self._group_tables(slots, chunk),
            programs.experts,
            self._router_counts,
        )
        return x, last

    def _run_observe(
        self,
        tokens: Int32[np.ndarray, "ranks rows chunk"],
        starts: Int32[np.ndarray, "ranks rows"],
        counts: Int32[np.ndarray, "ranks rows"],
        slots: Int32[np.ndarray, "ranks rows"],
        dysco: DyscoSlots,
        chunks: ObservedChunks,
        layers: tuple[int, ...],
    ) -> None:
        programs, chunk = self.programs, tokens.shape[2]
        batch = (tokens.reshape(-1, chunk), starts.reshape(-1), counts.reshape(-1))
        self.arenas, self._router_counts, dysco.state = dysco.programs.observe(
            programs.leaves,
            self.arenas,
            *batch,
            self._group_tables(slots, chunk),
            dysco.state,
            chunks,
            layers=layers,
            experts=programs.experts,
            router_counts=self._router_counts,
        )

    def _run_gather(self, group: int, pages: np.ndarray) -> jax.Array:
        rows = self.layout.groups[group].rows_per_page
        blocks: jax.Array = self.programs.gather(self.arenas[group], pages, rows_per_block=rows)
        if self._direct is not None:
            self._direct.reads(blocks)
        return blocks

    def _run_scatter(self, group: int, pages: np.ndarray, blocks: np.ndarray) -> None:
        arena = self.programs.scatter(self.arenas[group], pages, blocks)
        self.arenas = (*self.arenas[:group], arena, *self.arenas[group + 1 :])

    def _warm_up_runs(self) -> Iterator[tuple[str, Callable[[], object]]]:
        """Name and call of every program in every shape, all on padding."""
        hidden: dict[int, jax.Array] = {}

        def decode(rows: int) -> object:
            slots = np.full((self.ranks, rows), self._padding_slot, np.int32)
            empty = np.zeros_like(slots)
            hidden[rows] = self._run_decode(slots, empty, empty - 1)
            return hidden[rows]

        def prefill(rows: int, chunk: int) -> object:
            slots = np.full((self.ranks, rows), self._padding_slot, np.int32)
            empty = np.zeros_like(slots)
            return self._run_prefill(np.zeros((self.ranks, rows, chunk), np.int32), empty, empty, slots)

        def copy_out(group: int) -> object:
            return self.gather(group, ())

        def copy_in(group: int) -> object:
            blocks = np.zeros((COPY_PAGES, *self._host[group].shape[1:]), self._host[group].dtype)
            self._run_scatter(group, self._padded(group, ()), blocks)
            return self.arenas[group]

        for rows in self.buckets.rows:
            yield f"decode rows={rows}", partial(decode, rows)
        for shape in self.buckets.prefill_shapes:
            yield f"prefill rows={shape.rows} tokens={shape.chunk}", partial(prefill, shape.rows, shape.chunk)
        yield from self._sampler.warm_ups(hidden.__getitem__, self.buckets.rows)
        if self._dysco is not None and self._dysco_layers:
            yield from self._dysco_warm_ups(self._dysco)
        for group, host in enumerate(self._host):
            if len(host):
                yield f"copy out group={group} pages={COPY_PAGES}", partial(copy_out, group)
                if self._direct is None:
                    yield f"copy in group={group} pages={COPY_PAGES}", partial(copy_in, group)

    def _dysco_warm_ups(self, dysco: DyscoSlots) -> Iterator[tuple[str, Callable[[], object]]]:
        layers = self._dysco_layers

        def decode(rows: int, watched: int) -> object:
            slots = np.full((self.ranks, rows), self._padding_slot, np.int32)
            empty = np.zeros_like(slots)
            nobody = DyscoStep(dysco.no_rows(watched, layers), layers=(layers, ()))
            return self._run_decode_dysco(slots, empty, empty - 1, dysco, nobody)

        def observe(shape: PrefillShape) -> object:
            nothing = PrefillBatch(shape, ((),) * self.ranks)
            self._run_observe(*self._packed(nothing), dysco, dysco.no_chunks(shape, layers), layers)
            return dysco.state

        for rows in self.buckets.rows:
            for watched in self.buckets.watched_sizes(rows):
                yield f"decode rows={rows} dysco={watched}", partial(decode, rows, watched)
        for shape in self.buckets.shortest_shapes:
            yield f"observe rows={shape.rows} tokens={shape.chunk}", partial(observe, shape)
        yield from dysco.warm_ups()


def _told(step: DyscoStep, chosen: Sequence[Chosen | None]) -> list[Selections]:
    """Selections of a step that somebody wants told."""
    return [
        Selections(wanted, one) for wanted, one in zip(step.wanted, chosen, strict=True) if wanted and one is not None
    ]


def _addresses(arena: jax.Array) -> tuple[int, ...]:
    """Where an arena lies on each of this process's devices."""
    return tuple(shard.data.unsafe_buffer_pointer() for shard in arena.addressable_shards)


def _runs(copies: Sequence[PageCopy]) -> Iterator[list[PageCopy]]:
    """Neighbouring copies of one direction and group, at most as many as one program moves."""
    run: list[PageCopy] = []
    for copy in copies:
        if run and ((copy.direction, copy.group) != (run[0].direction, run[0].group) or len(run) == COPY_PAGES):
            yield run
            run = []
        run.append(copy)
    if run:
        yield run
