"""Carries out step plans on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import jax
import numpy as np

from jaxdual.cascade.probe import Probe
from jaxdual.cascade.work import Work
from jaxdual.engine.buckets import Buckets, PrefillBatch, PrefillShape
from jaxdual.engine.device import Device
from jaxdual.engine.dysco import Chosen
from jaxdual.engine.dysco_slots import DyscoSlots, DyscoStep, Selections
from jaxdual.engine.gated_prefill import Asked, GatedPrefill
from jaxdual.engine.mesh_programs import MeshPrograms
from jaxdual.engine.request import Selection, TokenLogprobs
from jaxdual.engine.router_counts import RouterCounts
from jaxdual.engine.slot_sampler import SampleBatch, Sampled, SampleRow, SlotBinding
from jaxdual.engine.tier_copies import TierCopies
from jaxdual.engine.warm_up import timed
from jaxdual.kv.layout import KVLayout
from jaxdual.kv.manager import GroupPages
from jaxdual.parallel.mesh import DeviceMesh
from jaxdual.scheduling.experts import Move, Placement
from jaxdual.scheduling.plan import Chunk, Row, StepPlan
from models import Decoder


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
      p_ik: of prompts at whose end it was asked, with their sequences.
    """

    sampled: tuple[Sampled, ...]
    prompt_logprobs: Mapping[int, tuple[TokenLogprobs, ...]]
    selections: tuple[tuple[int, Selection], ...]
    p_ik: tuple[tuple[int, float], ...] = ()


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
      asked: P(IK) of prompts.
    """

    batches: list[SampleBatch] = field(default_factory=list)
    selections: list[Selections] = field(default_factory=list)
    scored: list[_Scored] = field(default_factory=list)
    parked: tuple[int, ...] = ()
    asked: list[Asked] = field(default_factory=list)


class Runner:
    """Has the device do what plans say, in padded batches.

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
      probe: of the model, for prompts that may be refused; on one device only.

    Attributes:
      work: tokens computed in all steps so far.
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
        probe: Probe | None = None,
    ) -> None:
        self.buckets = buckets
        self.work = Work()
        self.device = Device(
            model,
            layout,
            memory=memory,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            max_chunk=max_chunk,
            mesh=mesh,
            placement=placement,
            count_routers=count_routers,
        )
        self.ranks = self.device.ranks
        self._sampler, self._padding_slot = self.device.sampler, self.device.padding_slot
        self._copies = TierCopies(self.device, memory, host, direct=direct)
        self._dysco_layers = tuple(dysco_layers)
        self._dysco: DyscoSlots | None = self._new_dysco() if dysco_layers else None
        self._gated = None if probe is None else GatedPrefill(self.device, probe, memory[0].num_pages)

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
            self._copies.copy(rank, plan.copies)
            for slot, change in plan.tables:
                self.device.change_table(rank, slot, change)
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
        self.work += _work(plans)
        if self._gated is not None:
            (chunks,) = chunks_of
            self._prefill_gated(launch, self._gated, chunks)
            chunks_of = [[chunk for chunk in chunks if chunk.part == "whole"]]
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
        self._copies.land()
        if self._dysco is not None:
            self._dysco.settle(launch.parked)
        prompt_logprobs = {
            seq_id: self._sampler.score(scored.x, first, wanted)
            for scored in launch.scored
            for seq_id, first, wanted in scored.parts
        }
        selections = tuple(one for told in launch.selections for one in told.fetch())
        p_ik = tuple(one for asked in launch.asked for one in asked.fetch())
        return StepResult(tuple(sampled), prompt_logprobs, selections, p_ik)

    def warm_ups(self, *, moves: bool = False) -> Iterator[tuple[str, Callable[[], float]]]:
        """Name of every program in every shape, and a call that compiles and runs it and returns the seconds it took.

        Further calls of a shape that is compiled already, by a request or before, take next to nothing.

        Args:
          moves: those that move experts, too, where there are some on several devices.
        """
        programs = self.device.programs
        yield from timed(self._warm_up_runs())
        if moves and isinstance(programs, MeshPrograms):
            yield from timed(programs.warm_up_moves())

    def move_experts(self, row: int, moves: Sequence[Move], experts: Sequence[int]) -> None:
        """See `MeshPrograms.move_experts`."""
        programs = self.device.programs
        if not isinstance(programs, MeshPrograms):
            raise TypeError("on one device, experts don't move")
        programs.move_experts(row, moves, experts)

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
        """See `TierCopies.gather`."""
        return self._copies.gather(group, pages)

    def take_router_counts(self) -> RouterCounts | None:
        """See `Device.take_router_counts`."""
        return self.device.take_router_counts()

    def check_arena(self) -> None:
        """See `Device.check_arena`."""
        self.device.check_arena()

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
            x = self.device.decode(slots, tokens, positions)
        else:
            x, chosen = self.device.decode_dysco(slots, tokens, positions, dysco, step)
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
        x, last = self.device.prefill(*self._packed(batch))
        if parts:
            launch.scored.append(_Scored(x, tuple(parts)))
        if sampling:
            launch.batches.append(self._sampler.sample(last, sampling))

    def _prefill_gated(self, launch: Launch, gated: GatedPrefill, chunks: Sequence[Chunk]) -> None:
        for batch in self.buckets.prefill([[chunk for chunk in chunks if chunk.part == "lower"]]):
            p_ik = gated.lower(*self._packed(batch))
            rows = [(row, chunk.seq_id) for row, chunk in enumerate(batch.chunks[0]) if chunk.asks]
            launch.asked.append(Asked(p_ik, tuple(rows)))
        for batch in self.buckets.prefill([[chunk for chunk in chunks if chunk.part == "upper"]]):
            last = gated.upper(*self._packed(batch)[1:], batch.shape.chunk)
            sampling = [
                SampleRow(row, chunk.seq_id, 0, chunk.slot, chunk.output_index)
                for row, chunk in enumerate(batch.chunks[0])
                if chunk.samples
            ]
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
        self.device.observe(*self._packed(batch), dysco, chunks, layers)

    def _raise(self, launch: Launch, dysco: DyscoSlots, chunks_of: Sequence[Sequence[Chunk]]) -> None:
        seqs = self.buckets.decode(max(map(len, chunks_of)))
        step, tails = dysco.tails(chunks_of, seqs)
        x, chosen = self.device.decode_dysco(*tails[:3], dysco, step, each=tails.each)
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

    def _new_dysco(self) -> DyscoSlots:
        device = self.device
        return DyscoSlots(
            device.programs,
            self.buckets,
            slots=device.padding_slot + 1,
            keys=device.keys,
            heads=device.num_heads,
            ranks=device.ranks,
            layers=self._dysco_layers,
        )

    def _warm_up_runs(self) -> Iterator[tuple[str, Callable[[], object]]]:
        """Name and call of every program in every shape, all on padding."""
        hidden: dict[int, jax.Array] = {}

        def decode(rows: int) -> object:
            slots = np.full((self.ranks, rows), self._padding_slot, np.int32)
            empty = np.zeros_like(slots)
            hidden[rows] = self.device.decode(slots, empty, empty - 1)
            return hidden[rows]

        def prefill(rows: int, chunk: int) -> object:
            slots = np.full((self.ranks, rows), self._padding_slot, np.int32)
            empty = np.zeros_like(slots)
            return self.device.prefill(np.zeros((self.ranks, rows, chunk), np.int32), empty, empty, slots)

        for rows in self.buckets.rows:
            yield f"decode rows={rows}", partial(decode, rows)
        for shape in self.buckets.prefill_shapes:
            yield f"prefill rows={shape.rows} tokens={shape.chunk}", partial(prefill, shape.rows, shape.chunk)
        if self._gated is not None:
            yield from self._gated.warm_ups(self.buckets.prefill_shapes)
        yield from self._sampler.warm_ups(hidden.__getitem__, self.buckets.rows)
        if self._dysco is not None and self._dysco_layers:
            yield from self._dysco_warm_ups(self._dysco)
        yield from self._copies.warm_ups()

    def _dysco_warm_ups(self, dysco: DyscoSlots) -> Iterator[tuple[str, Callable[[], object]]]:
        layers = self._dysco_layers

        def decode(rows: int, watched: int) -> object:
            slots = np.full((self.ranks, rows), self._padding_slot, np.int32)
            empty = np.zeros_like(slots)
            nobody = DyscoStep(dysco.no_rows(watched, layers), layers=(layers, ()))
            return self.device.decode_dysco(slots, empty, empty - 1, dysco, nobody)

        def observe(shape: PrefillShape) -> object:
            nothing = PrefillBatch(shape, ((),) * self.ranks)
            self.device.observe(*self._packed(nothing), dysco, dysco.no_chunks(shape, layers), layers)
            return dysco.state

        for rows in self.buckets.rows:
            for watched in self.buckets.watched_sizes(rows):
                yield f"decode rows={rows} dysco={watched}", partial(decode, rows, watched)
        for shape in self.buckets.shortest_shapes:
            yield f"observe rows={shape.rows} tokens={shape.chunk}", partial(observe, shape)
        yield from dysco.warm_ups()


def _work(plans: Sequence[StepPlan]) -> Work:
    """Tokens that go through either part of the layers."""
    rows = sum(len(plan.rows) for plan in plans)
    chunks = [chunk for plan in plans for chunk in plan.chunks]
    return Work(
        rows + sum(len(chunk.tokens) for chunk in chunks if chunk.part != "upper"),
        rows + sum(len(chunk.tokens) for chunk in chunks if chunk.part != "lower"),
    )


def _told(step: DyscoStep, chosen: Sequence[Chosen | None]) -> list[Selections]:
    """Selections of a step that somebody wants told."""
    return [
        Selections(wanted, one) for wanted, one in zip(step.wanted, chosen, strict=True) if wanted and one is not None
    ]
