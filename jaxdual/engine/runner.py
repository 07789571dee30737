"""Carries out step plans on the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxdual.engine.buckets import Buckets, PrefillBatch
from jaxdual.engine.direct_landing import DirectLanding
from jaxdual.engine.paged import GroupTable
from jaxdual.engine.request import TokenLogprobs
from jaxdual.engine.slot_sampler import SampleBatch, Sampled, SampleRow, SlotBinding, SlotSampler
from jaxdual.engine.steps import Programs
from jaxdual.engine.warm_up import timed
from jaxdual.kv.layout import KVLayout, most_blocks
from jaxdual.kv.manager import GroupPages, PageCopy, TableChange
from jaxdual.kv.slots import IntegrityError
from jaxdual.scheduling.batch import Row, StepPlan
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
    """

    sampled: tuple[Sampled, ...]
    prompt_logprobs: Mapping[int, tuple[TokenLogprobs, ...]]


@dataclass(frozen=True, slots=True)
class _Scored:
    """Residual stream whose prompt log-probabilities are wanted: sequence, first row, target tokens of each."""

    x: jax.Array
    parts: tuple[tuple[int, int, Sequence[int]], ...]


class _Tables:
    """Page tables of all slots in one layer group, as the plans' changes left them.

    Args:
      memory: of the group.
      slots: rows; the last one is padding's and stays zero.
      page_size: tokens a page.
      max_pages: pages of the longest sequence.
      max_chunk: tokens of the longest chunk.
    """

    def __init__(self, memory: GroupPages, slots: int, page_size: int, max_pages: int, max_chunk: int) -> None:
        self._window = memory.window
        self._page_size = page_size
        self._pages = np.zeros((slots, most_blocks(memory.window, max_chunk, page_size, max_pages)), np.int32)
        self._first = np.zeros(slots, np.int32)

    def change(self, slot: int, change: TableChange) -> None:
        self._pages[slot, change.start : change.start + len(change.pages)] = change.pages
        self._first[slot] = change.first * self._page_size

    def of(self, slots: np.ndarray, chunk: int) -> GroupTable:
        """Tables of `slots` for `chunk` queries each."""
        width = most_blocks(self._window, chunk, self._page_size, self._pages.shape[1])
        # Fancy indices copy: the device may still read a step's tables when the next one changes these.
        return GroupTable(self._pages[slots, :width], None if self._window is None else self._first[slots])


@dataclass(slots=True)
class Launch:
    """A step that was dispatched and not fetched yet."""

    batches: list[SampleBatch] = field(default_factory=list)
    scored: list[_Scored] = field(default_factory=list)


class Runner:
    """Owns what lies on the device: weights, arenas, per-sequence sampler state; and the tables that lead there.

    Dispatch returns at once; the device works in dispatch order, so a later step sees what an earlier one wrote.

    Args:
      model: to run.
      layout: of the arenas.
      memory: of each layer group, in the order of the layout's.
      max_num_seqs: sequences that run at once.
      max_model_len: tokens of the longest sequence.
      max_chunk: tokens of the longest chunk.
      buckets: padded shapes.
      host: host memory of each layer group, `[host_pages + staging_pages, *block]`.
      direct: writes blocks straight into the arenas; see `DirectLanding`.
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
    ) -> None:
        self.buckets = buckets
        self.programs = Programs(model, layout)
        self.layout = layout
        # Committed to the weights' device from the start, as what programs return is: else they compile twice.
        (device,) = self.programs.leaves[0].devices()
        self.arenas = tuple(
            jax.device_put(jnp.zeros(layout.arena_shape(pages.num_pages, group), layout.dtype), device)
            for group, pages in enumerate(memory)
        )
        self._addresses = [arena.unsafe_buffer_pointer() for arena in self.arenas]
        self._tables = [
            _Tables(pages, max_num_seqs + 1, layout.page_size, layout.pages_for(max_model_len), max_chunk)
            for pages in memory
        ]
        self._sampler = SlotSampler(self.programs, max_num_seqs, model.config.vocab_size)
        self._padding_slot = self._sampler.padding_slot
        self._memory = tuple(memory)
        self._host = tuple(host)
        self._landing: deque[tuple[int, jax.Array, list[int]]] = deque()
        self._direct: DirectLanding | None = None
        if direct:
            self._direct = DirectLanding([one.shape[1:] for one in host], self.check_arena)

    def dispatch(self, plan: StepPlan, bindings: Sequence[SlotBinding], targets: Mapping[int, ScoreTargets]) -> Launch:
        """Starts a step.

        Args:
          plan: what to do.
          bindings: of the sequences admitted by it.
          targets: of the sequences whose chunk in this step wants prompt log-probabilities.
        """
        launch = Launch()
        self._copy(plan.copies)
        for slot, change in plan.tables:
            self._tables[change.group].change(slot, change)
        for binding in bindings:
            self._sampler.bind(binding)
        # Rows before chunks: they wait for the step before this one already, so their tokens come first.
        if plan.rows:
            self._decode(launch, plan.rows)
        for batch in self.buckets.prefill(plan.chunks):
            self._prefill(launch, batch, targets)
        return launch

    def fetch(self, launch: Launch) -> StepResult:
        """Waits for a step and brings its results to the host."""
        sampled = [one for batch in launch.batches for one in batch.fetch()]
        self._land()
        prompt_logprobs = {
            seq_id: self._sampler.score(scored.x, first, wanted)
            for scored in launch.scored
            for seq_id, first, wanted in scored.parts
        }
        return StepResult(tuple(sampled), prompt_logprobs)

    def warm_up(self, report: Callable[[str, float], None] = lambda name, seconds: None) -> None:
        """Compiles and runs every program in every shape once, on padding only.

        Args:
          report: called with the name of each shape and the seconds that it took.
        """
        for name, run in self.warm_ups():
            report(name, run())

    def warm_ups(self) -> Iterator[tuple[str, Callable[[], float]]]:
        """Name of every program in every shape, and a call that compiles and runs it and returns the seconds it took.

        Further calls of a shape that is compiled already, by a request or before, take next to nothing.
        """
        return timed(self._warm_up_runs())

    def gather(self, group: int, pages: Sequence[int]) -> jax.Array:
        """Starts a copy of up to `COPY_PAGES` pages of a group off the device: the first blocks of the result."""
        return self._run_gather(group, self._padded(group, pages))

    def check_arena(self) -> None:
        """Raises `IntegrityError` if an arena is not the buffer that it was at the start."""
        for group, (arena, before) in enumerate(zip(self.arenas, self._addresses, strict=True)):
            address = arena.unsafe_buffer_pointer()
            if address != before:
                raise IntegrityError(f"the arena of group {group} moved from {before:#x} to {address:#x}")

    # Parts of a step.

    def _decode(self, launch: Launch, rows: Sequence[Row]) -> None:
        padded = self.buckets.decode(len(rows))
        slots = np.full(padded, self._padding_slot, np.int32)
        tokens = np.zeros(padded, np.int32)
        positions = np.full(padded, -1, np.int32)
        slots[: len(rows)] = [row.slot for row in rows]
        tokens[: len(rows)] = [-1 if row.token is None else row.token for row in rows]
        positions[: len(rows)] = [row.position for row in rows]
        x = self._run_decode(slots, tokens, positions, self._group_tables(slots, 1))
        sampling = [SampleRow(index, row.seq_id, row.slot, row.output_index) for index, row in enumerate(rows)]
        launch.batches.append(self._sampler.sample(x, sampling))

    def _prefill(self, launch: Launch, batch: PrefillBatch, targets: Mapping[int, ScoreTargets]) -> None:
        shape = batch.shape
        tokens = np.zeros((shape.rows, shape.chunk), np.int32)
        starts = np.zeros(shape.rows, np.int32)
        counts = np.zeros(shape.rows, np.int32)
        slots = np.full(shape.rows, self._padding_slot, np.int32)
        for index, chunk in enumerate(batch.chunks):
            tokens[index, : len(chunk.tokens)] = chunk.tokens
            starts[index] = chunk.start
            counts[index] = len(chunk.tokens)
            slots[index] = chunk.slot
        x, last = self._run_prefill(tokens, starts, counts, self._group_tables(slots, shape.chunk))
        parts = tuple(
            (chunk.seq_id, index * shape.chunk + targets[chunk.seq_id].skip, targets[chunk.seq_id].tokens)
            for index, chunk in enumerate(batch.chunks)
            if chunk.seq_id in targets
        )
        if parts:
            launch.scored.append(_Scored(x, parts))
        sampling = [
            SampleRow(index, chunk.seq_id, chunk.slot, chunk.output_index)
            for index, chunk in enumerate(batch.chunks)
            if chunk.samples
        ]
        if sampling:
            launch.batches.append(self._sampler.sample(last, sampling))

    def _group_tables(self, slots: np.ndarray, chunk: int) -> tuple[GroupTable, ...]:
        return tuple(tables.of(slots, chunk) for tables in self._tables)

    # Copies between tiers.

    def _copy(self, copies: Sequence[PageCopy]) -> None:
        for run in _runs(copies):
            group, pages, slots = run[0].group, [copy.page for copy in run], [copy.slot for copy in run]
            host = self._host[group]
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
        padded = np.full(COPY_PAGES, self._memory[group].num_pages, np.int32)
        padded[: len(pages)] = pages
        return padded

    def _land(self) -> None:
        """Brings blocks on their way out into their host slots, in the order in which they left."""
        while self._landing:
            group, blocks, slots = self._landing.popleft()
            self._host[group][slots] = np.asarray(blocks)[: len(slots)]

    # Programs: each is called in one place, so that warm-up and steps can't differ.

    def _run_decode(
        self, slots: np.ndarray, tokens: np.ndarray, positions: np.ndarray, tables: tuple[GroupTable, ...]
    ) -> jax.Array:
        programs = self.programs
        x: jax.Array
        self.arenas, x = programs.decode(
            programs.leaves, self.arenas, self._sampler.last_token, slots, tokens, positions, tables
        )
        return x

    def _run_prefill(
        self, tokens: np.ndarray, starts: np.ndarray, counts: np.ndarray, tables: tuple[GroupTable, ...]
    ) -> tuple[jax.Array, jax.Array]:
        programs = self.programs
        self.arenas, x, last = programs.prefill(programs.leaves, self.arenas, tokens, starts, counts, tables)
        return x, last

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
            slots, empty = np.full(rows, self._padding_slot, np.int32), np.zeros(rows, np.int32)
            hidden[rows] = self._run_decode(slots, empty, empty - 1, self._group_tables(slots, 1))
            return hidden[rows]

        def prefill(rows: int, chunk: int) -> object:
            tokens, empty = np.zeros((rows, chunk), np.int32), np.zeros(rows, np.int32)
            slots = np.full(rows, self._padding_slot, np.int32)
            return self._run_prefill(tokens, empty, empty, self._group_tables(slots, chunk))

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
        for group, host in enumerate(self._host):
            if len(host):
                yield f"copy out group={group} pages={COPY_PAGES}", partial(copy_out, group)
                if self._direct is None:
                    yield f"copy in group={group} pages={COPY_PAGES}", partial(copy_in, group)


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
