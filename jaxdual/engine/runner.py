"""Carries out step plans on the device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxdual.engine import sampler
from jaxdual.engine.buckets import Buckets, PrefillBatch
from jaxdual.engine.request import TokenLogprobs
from jaxdual.engine.sampler import Logprobs, SlotSampling
from jaxdual.engine.steps import Programs
from jaxdual.kv.layout import KVLayout
from jaxdual.kv.manager import PageCopy
from jaxdual.kv.slots import IntegrityError
from jaxdual.scheduling.batch import Row, StepPlan
from models import Decoder

# Pages moved by one program between tiers, and prompt tokens scored by one: a copy or two of waste at the end of a
# long move costs less than another program to compile.
_COPY_PAGES = 8
_SCORE_TOKENS = 128


@dataclass(frozen=True, slots=True)
class SlotBinding:
    """A sequence that runs from a step on: its slot, how it is sampled, and the tokens that penalties look at."""

    slot: int
    sampling: SlotSampling
    prompt: Sequence[int]
    output: Sequence[int]


@dataclass(frozen=True, slots=True)
class ScoreTargets:
    """Prompt log-probabilities wanted of a chunk: of `tokens`, which follow its positions from number `skip` on."""

    skip: int
    tokens: Sequence[int]


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token that a step gave a sequence."""

    seq_id: int
    token: int
    logprobs: TokenLogprobs | None


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
class _Batch:
    """Tokens under way: row number and sequence of each."""

    seqs: tuple[tuple[int, int], ...]
    tokens: jax.Array
    logprobs: Logprobs | None


@dataclass(frozen=True, slots=True)
class _Scored:
    """Residual stream whose prompt log-probabilities are wanted: sequence, first row, target tokens of each."""

    x: jax.Array
    parts: tuple[tuple[int, int, Sequence[int]], ...]


@dataclass(slots=True)
class Launch:
    """A step that was dispatched and not fetched yet."""

    batches: list[_Batch] = field(default_factory=list)
    scored: list[_Scored] = field(default_factory=list)


class Runner:
    """Owns what lies on the device: weights, arena, per-sequence sampler state.

    Dispatch returns at once; the device works in dispatch order, so a later step sees what an earlier one wrote.

    Args:
      model: to run.
      layout: of the arena.
      num_pages: pages of the arena.
      host_pages: pages of the host tier.
      max_num_seqs: sequences that run at once.
      buckets: padded shapes.
    """

    def __init__(
        self,
        model: Decoder,
        layout: KVLayout,
        *,
        num_pages: int,
        host_pages: int,
        max_num_seqs: int,
        buckets: Buckets,
    ) -> None:
        self.buckets = buckets
        self.programs = Programs(model, layout)
        self.vocab_size = model.config.vocab_size
        self.layout = layout
        # Committed to the weights' device from the start, as what programs return is: else they compile twice.
        (device,) = self.programs.leaves[0].devices()
        self.arena = jax.device_put(jnp.zeros(layout.arena_shape(num_pages), layout.dtype), device)
        self._arena_address = self.arena.unsafe_buffer_pointer()
        self._state = jax.device_put(sampler.new_state(max_num_seqs, self.vocab_size), device)
        self._padding_slot = max_num_seqs
        self._num_pages = num_pages
        self._host = np.zeros((host_pages, *layout.block_shape()), jnp.dtype(layout.dtype))
        self._landing: deque[tuple[jax.Array, list[int]]] = deque()
        self._sampling: dict[int, SlotSampling] = {}

    def dispatch(self, plan: StepPlan, bindings: Sequence[SlotBinding], targets: Mapping[int, ScoreTargets]) -> Launch:
        """Starts a step.

        Args:
          plan: what to do.
          bindings: of the sequences admitted by it.
          targets: of the sequences whose chunk in this step wants prompt log-probabilities.
        """
        launch = Launch()
        self._copy(plan.copies)
        for binding in bindings:
            self._bind(binding)
        # Rows before chunks: they wait for the step before this one already, so their tokens come first.
        if plan.rows:
            self._decode(launch, plan.rows)
        for batch in self.buckets.prefill(plan.chunks):
            self._prefill(launch, batch, targets)
        return launch

    def fetch(self, launch: Launch) -> StepResult:
        """Waits for a step and brings its results to the host."""
        sampled = []
        for batch in launch.batches:
            tokens = np.asarray(batch.tokens)
            logprobs = None if batch.logprobs is None else Logprobs(*map(np.asarray, batch.logprobs))
            for row, seq_id in batch.seqs:
                part = None if logprobs is None else _logprobs_at(logprobs, row)
                sampled.append(Sampled(seq_id, int(tokens[row]), part))
        self._land()
        prompt_logprobs = {
            seq_id: self._score(scored.x, first, wanted)
            for scored in launch.scored
            for seq_id, first, wanted in scored.parts
        }
        return StepResult(tuple(sampled), prompt_logprobs)

    def warm_up(self, report: Callable[[str, float], None] = lambda name, seconds: None) -> None:
        """Compiles and runs every program in every shape once, on padding only.

        Args:
          report: called with the name of each shape and the seconds that it took.
        """
        for name, run in self.warm_up_runs():
            start = time.perf_counter()
            jax.block_until_ready(run())
            report(name, time.perf_counter() - start)

    def check_arena(self) -> None:
        """Raises `IntegrityError` if the arena is not the buffer that it was at the start."""
        address = self.arena.unsafe_buffer_pointer()
        if address != self._arena_address:
            raise IntegrityError(f"the arena moved from {self._arena_address:#x} to {address:#x}")

    # Parts of a step.

    def _decode(self, launch: Launch, rows: Sequence[Row]) -> None:
        shape = self.buckets.decode(len(rows), max(len(row.pages) for row in rows))
        slots = np.full(shape.rows, self._padding_slot, np.int32)
        tokens = np.zeros(shape.rows, np.int32)
        positions = np.full(shape.rows, -1, np.int32)
        table = np.zeros((shape.rows, shape.width), np.int32)
        for index, row in enumerate(rows):
            slots[index] = row.slot
            tokens[index] = -1 if row.token is None else row.token
            positions[index] = row.position
            table[index, : len(row.pages)] = row.pages
        x = self._run_decode(slots, tokens, positions, table)
        self._sample(launch, x, [(index, row.seq_id, row.slot, row.output_index) for index, row in enumerate(rows)])

    def _prefill(self, launch: Launch, batch: PrefillBatch, targets: Mapping[int, ScoreTargets]) -> None:
        shape = batch.shape
        tokens = np.zeros((shape.rows, shape.chunk), np.int32)
        starts = np.zeros(shape.rows, np.int32)
        counts = np.zeros(shape.rows, np.int32)
        table = np.zeros((shape.rows, shape.width), np.int32)
        for index, chunk in enumerate(batch.chunks):
            tokens[index, : len(chunk.tokens)] = chunk.tokens
            starts[index] = chunk.start
            counts[index] = len(chunk.tokens)
            table[index, : len(chunk.pages)] = chunk.pages
        x, last = self._run_prefill(tokens, starts, counts, table)
        parts = tuple(
            (chunk.seq_id, index * shape.chunk + targets[chunk.seq_id].skip, targets[chunk.seq_id].tokens)
            for index, chunk in enumerate(batch.chunks)
            if chunk.seq_id in targets
        )
        if parts:
            launch.scored.append(_Scored(x, parts))
        sampling = [
            (index, chunk.seq_id, chunk.slot, chunk.output_index)
            for index, chunk in enumerate(batch.chunks)
            if chunk.samples
        ]
        if sampling:
            self._sample(launch, last, sampling)

    def _sample(self, launch: Launch, x: jax.Array, rows: Sequence[tuple[int, int, int, int]]) -> None:
        """Samples rows of `x`, given as row number, sequence, slot and output index."""
        packed: list[tuple[int, int, SlotSampling] | None] = [None] * x.shape[0]
        for index, _, slot, output_index in rows:
            packed[index] = (slot, output_index, self._sampling[slot])
        inputs = sampler.pack(packed, self._padding_slot, self.vocab_size)
        tokens, logprobs = self._run_sample(x, inputs)
        launch.batches.append(
            _Batch(
                seqs=tuple((index, seq_id) for index, seq_id, _, _ in rows),
                tokens=tokens,
                logprobs=logprobs if inputs.wants_logprobs.any() else None,
            )
        )

    def _bind(self, binding: SlotBinding) -> None:
        params = binding.sampling.params
        self._sampling[binding.slot] = binding.sampling
        if not (params.has_penalties or params.logit_bias):
            return
        in_prompt = np.zeros(self.vocab_size, bool)
        in_prompt[list(binding.prompt)] = True
        bias = np.zeros(self.vocab_size, np.float32)
        for token, value in (params.logit_bias or {}).items():
            bias[token] = value
        counts = np.bincount(np.asarray(binding.output, np.int64), minlength=self.vocab_size).astype(np.int32)
        self._run_set_slot(binding.slot, counts, in_prompt, bias)

    def _score(self, x: jax.Array, first: int, targets: Sequence[int]) -> tuple[TokenLogprobs, ...]:
        rows = np.asarray(x)[first : first + len(targets)]
        scores: list[TokenLogprobs] = []
        for start in range(0, len(targets), _SCORE_TOKENS):
            part = rows[start : start + _SCORE_TOKENS]
            padded = np.zeros((_SCORE_TOKENS, rows.shape[1]), rows.dtype)
            padded[: len(part)] = part
            tokens = np.zeros(_SCORE_TOKENS, np.int32)
            tokens[: len(part)] = targets[start : start + _SCORE_TOKENS]
            logprobs = self._run_score(padded, tokens)
            scores += [_logprobs_at(logprobs, row) for row in range(len(part))]
        return tuple(scores)

    # Copies between tiers.

    def _copy(self, copies: Sequence[PageCopy]) -> None:
        for direction, run in _runs(copies):
            if direction == "out":
                leaving = self._run_gather(_padded_pages(run, self._num_pages - 1))
                self._landing.append((leaving, [copy.slot for copy in run]))
            else:
                self._land()
                blocks = np.zeros((_COPY_PAGES, *self._host.shape[1:]), self._host.dtype)
                blocks[: len(run)] = self._host[[copy.slot for copy in run]]
                self._run_scatter(_padded_pages(run, self._num_pages), blocks)

    def _land(self) -> None:
        """Brings blocks on their way out into their host slots, in the order in which they left."""
        while self._landing:
            blocks, slots = self._landing.popleft()
            self._host[slots] = np.asarray(blocks)[: len(slots)]

    # Programs: each is called in one place, so that warm-up and steps can't differ.

    def _run_decode(self, slots: np.ndarray, tokens: np.ndarray, positions: np.ndarray, table: np.ndarray) -> jax.Array:
        programs = self.programs
        x: jax.Array
        self.arena, x = programs.decode(
            programs.leaves, self.arena, self._state.last_token, slots, tokens, positions, table
        )
        return x

    def _run_prefill(
        self, tokens: np.ndarray, starts: np.ndarray, counts: np.ndarray, table: np.ndarray
    ) -> tuple[jax.Array, jax.Array]:
        programs = self.programs
        self.arena, x, last = programs.prefill(programs.leaves, self.arena, tokens, starts, counts, table)
        return x, last

    def _run_sample(self, x: jax.Array, inputs: sampler.SampleInputs) -> tuple[jax.Array, Logprobs]:
        self._state, tokens, logprobs = self.programs.sample(self.programs.leaves, x, self._state, inputs)
        return tokens, logprobs

    def _run_score(self, x: np.ndarray, tokens: np.ndarray) -> Logprobs:
        return Logprobs(*map(np.asarray, self.programs.score(self.programs.leaves, x, tokens)))

    def _run_set_slot(self, slot: int, counts: np.ndarray, in_prompt: np.ndarray, bias: np.ndarray) -> None:
        self._state = self.programs.set_slot(self._state, np.int32(slot), counts, in_prompt, bias)

    def _run_gather(self, pages: np.ndarray) -> jax.Array:
        blocks: jax.Array = self.programs.gather(self.arena, pages)
        return blocks

    def _run_scatter(self, pages: np.ndarray, blocks: np.ndarray) -> None:
        self.arena = self.programs.scatter(self.arena, pages, blocks)

    def warm_up_runs(self) -> Iterator[tuple[str, Callable[[], object]]]:
        """Name and call of every program in every shape, all on padding."""
        hidden: dict[int, jax.Array] = {}

        def decode(rows: int, width: int) -> object:
            slots, empty = np.full(rows, self._padding_slot, np.int32), np.zeros(rows, np.int32)
            hidden[rows] = self._run_decode(slots, empty, empty - 1, np.zeros((rows, width), np.int32))
            return hidden[rows]

        def sample(rows: int) -> object:
            return self._run_sample(hidden[rows], sampler.pack([None] * rows, self._padding_slot, self.vocab_size))

        def prefill(rows: int, chunk: int, width: int) -> object:
            tokens, empty = np.zeros((rows, chunk), np.int32), np.zeros(rows, np.int32)
            return self._run_prefill(tokens, empty, empty, np.zeros((rows, width), np.int32))

        def score() -> object:
            x = hidden[self.buckets.rows[0]]
            return self._run_score(np.zeros((_SCORE_TOKENS, x.shape[1]), x.dtype), np.zeros(_SCORE_TOKENS, np.int32))

        def set_slot() -> object:
            row = np.zeros(self.vocab_size, np.int32)
            self._run_set_slot(self._padding_slot, row, row.astype(bool), row.astype(np.float32))
            return self._state

        def copy_out() -> object:
            return self._run_gather(np.zeros(_COPY_PAGES, np.int32))

        def copy_in() -> object:
            blocks = np.zeros((_COPY_PAGES, *self._host.shape[1:]), self._host.dtype)
            self._run_scatter(np.full(_COPY_PAGES, self._num_pages, np.int32), blocks)
            return self.arena

        for d in self.buckets.decode_shapes():
            yield f"decode rows={d.rows} pages={d.width}", partial(decode, d.rows, d.width)
        for rows in self.buckets.rows:
            yield f"sample rows={rows}", partial(sample, rows)
        for p in self.buckets.prefill_shapes():
            yield f"prefill rows={p.rows} tokens={p.chunk} pages={p.width}", partial(prefill, p.rows, p.chunk, p.width)
        yield f"score tokens={_SCORE_TOKENS}", score
        yield "set slot", set_slot
        if len(self._host):
            yield f"copy out pages={_COPY_PAGES}", copy_out
            yield f"copy in pages={_COPY_PAGES}", copy_in


def _runs(copies: Sequence[PageCopy]) -> Iterator[tuple[str, list[PageCopy]]]:
    """Neighbouring copies of one direction, at most as many as one program moves."""
    run: list[PageCopy] = []
    for copy in copies:
        if run and (copy.direction != run[0].direction or len(run) == _COPY_PAGES):
            yield run[0].direction, run
            run = []
        run.append(copy)
    if run:
        yield run[0].direction, run


def _padded_pages(run: Sequence[PageCopy], padding: int) -> np.ndarray:
    pages = np.full(_COPY_PAGES, padding, np.int32)
    pages[: len(run)] = [copy.page for copy in run]
    return pages


def _logprobs_at(logprobs: Logprobs, row: int) -> TokenLogprobs:
    return TokenLogprobs(
        chosen=float(logprobs.chosen[row]),
        rank=int(logprobs.rank[row]),
        top=tuple(zip(logprobs.top_tokens[row].tolist(), logprobs.top[row].tolist(), strict=True)),
    )
