"""The device side of a layerwise prefill: arena, programs, and the blocks that go in and out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, Shaped

from jaxdual.engine.buckets import Buckets, PrefillBatch, PrefillShape
from jaxdual.engine.layerwise.programs import LayerPrograms, Rope
from jaxdual.engine.layerwise.stages import Stages
from jaxdual.engine.paged import Arena, GroupTable
from jaxdual.engine.slot_sampler import SampleBatch, SampleRow, SlotSampler
from jaxdual.engine.steps import Programs
from jaxdual.engine.warm_up import timed
from jaxdual.kv.layout import KVLayout
from jaxdual.kv.slots import IntegrityError
from models import Decoder
from pallas_kernels.kv_blocks import scatter_blocks

# Blocks moved by one program: a few kinds of program, and little padding.
MOVE_SIZES = (4, 32)


@dataclass(slots=True, eq=False)
class Stream:
    """The residual stream of a batch between two layers.

    Attributes:
      batch: whose tokens they are.
      x, rope: see `LayerPrograms`.
      starts, counts: first position and real tokens of each row.
      pages: `[rows, width]` pages of each row's sequence.
    """

    batch: PrefillBatch
    x: jax.Array
    rope: Rope
    starts: np.ndarray
    counts: np.ndarray
    pages: np.ndarray


def _land(
    arena: Arena, ids: Int32[Array, " blocks"], blocks: Shaped[Array, "blocks rows page_size kv_heads head_dim"]
) -> tuple[Arena, Int32[Array, " one"]]:
    """The arena with blocks in their places, and something to wait for: the arena itself is donated further."""
    return scatter_blocks(arena, ids, blocks), ids[:1]


class LayerRunner:
    """Dispatch returns at once; the device works in dispatch order.

    Args:
      model: to run.
      layout: of one layer group with full attention.
      num_blocks: Full Blocks that the arena has room for; in stages it holds more pages of fewer layers.
      max_model_len: tokens of the longest sequence.
      max_num_seqs: sequences that run at once.
      buckets: padded shapes.

    Attributes:
      stages: in which layers run; see `use`.
      num_pages: of the arena, in those.
      sampler: of the tokens that prompts end in.
    """

    def __init__(
        self,
        model: Decoder,
        layout: KVLayout,
        *,
        num_blocks: int,
        max_model_len: int,
        max_num_seqs: int,
        buckets: Buckets,
        stages: Stages,
    ) -> None:
        self.layout, self.buckets = layout, buckets
        self._model = model
        self._width = layout.pages_for(max_model_len)
        programs = Programs(model, layout)
        (device,) = programs.leaves[0].devices()
        self.sampler = SlotSampler(programs, max_num_seqs, model.config.vocab_size)
        self._gather = programs.gather
        self._scatter = jax.jit(_land, donate_argnums=0)
        self._arena: jax.Array = jax.device_put(jnp.zeros(layout.arena_shape(num_blocks), layout.dtype), device)
        self._address = self._arena.unsafe_buffer_pointer()
        self.use(stages)

    def use(self, stages: Stages) -> None:
        """Has the next pass run in other stages; nothing may be under way."""
        self.stages = stages
        self.num_pages = self._arena.shape[0] // stages.rows_per_page
        self._programs = LayerPrograms(self._model, page_size=self.layout.page_size, slots=stages.layer_slots)
        self.block_shape = (stages.rows_per_block, *self.layout.block_shape()[1:])

    def begin(self, batch: PrefillBatch, pages: Mapping[int, Sequence[int]]) -> Stream:
        """Starts a batch.

        Args:
          pages: of each sequence, in the order of its tokens.
        """
        shape = batch.shape
        tokens = np.zeros((shape.rows, shape.chunk), np.int32)
        starts, counts = np.zeros(shape.rows, np.int32), np.zeros(shape.rows, np.int32)
        table = np.zeros((shape.rows, self._width), np.int32)
        for row, chunk in enumerate(batch.chunks[0]):
            tokens[row, : len(chunk.tokens)] = chunk.tokens
            starts[row], counts[row] = chunk.start, len(chunk.tokens)
            table[row, : len(pages[chunk.seq_id])] = pages[chunk.seq_id]
        return self._begin(batch, tokens, starts, counts, table)

    def run(self, stage: int, streams: Sequence[Stream]) -> None:
        """Runs the layers of a stage, whose earlier keys and values are in the arena."""
        for layer in self.stages.layers_of(stage):
            for stream in streams:
                self._run_layer(layer, stream)

    def sample(self, stream: Stream) -> SampleBatch | None:
        """Samples the tokens that follow the prompts which end in a batch, after the last layer; None if none does."""
        rows = [
            SampleRow(row, chunk.seq_id, 0, chunk.slot, chunk.output_index)
            for row, chunk in enumerate(stream.batch.chunks[0])
            if chunk.samples
        ]
        return self.sampler.sample(self._programs.end(stream.x, stream.counts), rows) if rows else None

    def land(self, stage: int, pages: Sequence[int], blocks: np.ndarray) -> jax.Array:
        """Starts to copy blocks of a stage onto the device.

        Args:
          pages: at most the largest of `MOVE_SIZES`.
          blocks: `[move_size(len(pages)), *block_shape]`, which must not change until the result is there.
        """
        landed: jax.Array
        self._arena, landed = self._scatter(self._arena, self._ids(stage, pages), blocks)
        return landed

    def take(self, stage: int, pages: Sequence[int]) -> jax.Array:
        """Starts to copy blocks of a stage off the device, as they are after what has been dispatched so far: the first
        ones of the result.
        """
        blocks: jax.Array = self._gather(
            self._arena, self._ids(stage, pages), rows_per_block=self.stages.rows_per_block
        )
        return blocks

    def layer_seconds(self, shape: PrefillShape, cached: int) -> float:
        """Measures one layer on all tokens of a shape, each row of it behind `cached` tokens; nothing else may be under
        way.
        """
        tokens = np.zeros((shape.rows, shape.chunk), np.int32)
        starts, counts = np.full(shape.rows, cached, np.int32), np.full(shape.rows, shape.chunk, np.int32)
        # Rows write the same pages: what they hold does not matter here.
        pages = np.tile(np.arange(self._width, dtype=np.int32) % self.num_pages, (shape.rows, 1))
        stream = self._begin(PrefillBatch(shape, ((),)), tokens, starts, counts, pages)
        jax.block_until_ready(stream.x)
        start = time.perf_counter()
        self._run_layer(0, stream)
        jax.block_until_ready(stream.x)
        return time.perf_counter() - start

    def check_arena(self) -> None:
        """Raises `IntegrityError` if the arena is not the buffer that it was at the start."""
        address = self._arena.unsafe_buffer_pointer()
        if address != self._address:
            raise IntegrityError(f"the arena moved from {self._address:#x} to {address:#x}")

    def warm_ups(self) -> Iterator[tuple[str, Callable[[], float]]]:
        """See `Runner.warm_ups`."""
        return timed(self._warm_up_runs())

    def _warm_up_runs(self) -> Iterator[tuple[str, Callable[[], object]]]:
        hidden: dict[int, jax.Array] = {}

        def prefill(shape: PrefillShape) -> object:
            stream = self.begin(PrefillBatch(shape, ((),)), {})
            for layer in self._programs.one_of_each_kind:
                self._run_layer(layer, stream)
            hidden[shape.rows] = self._programs.end(stream.x, stream.counts)
            return hidden[shape.rows]

        def land(size: int) -> object:
            return self.land(0, [self.num_pages] * size, np.zeros((size, *self.block_shape), self.layout.dtype))

        def take(size: int) -> object:
            return self.take(0, [self.num_pages] * size)

        for shape in self.buckets.prefill_shapes:
            yield f"prefill a layer rows={shape.rows} tokens={shape.chunk}", partial(prefill, shape)
        rows = sorted({shape.rows for shape in self.buckets.prefill_shapes})
        yield from self.sampler.warm_ups(hidden.__getitem__, rows)
        for size in MOVE_SIZES:
            yield f"blocks in {size}", partial(land, size)
            yield f"blocks out {size}", partial(take, size)

    # Programs: each is called in one place, so that warm-up and passes can't differ.

    def _begin(
        self, batch: PrefillBatch, tokens: np.ndarray, starts: np.ndarray, counts: np.ndarray, table: np.ndarray
    ) -> Stream:
        x, rope = self._programs.begin(self._programs.embedding, tokens, starts)
        return Stream(batch, x, rope, starts, counts, table)

    def _run_layer(self, layer: int, stream: Stream) -> None:
        self._arena, stream.x = self._programs.layer(
            layer, stream.x, self._arena, stream.rope, stream.starts, stream.counts, GroupTable(stream.pages)
        )

    def _ids(self, stage: int, pages: Sequence[int]) -> np.ndarray:
        """Blocks of one program, and behind them some that the arena doesn't have: these are not moved."""
        beyond = self._arena.shape[0] // self.stages.rows_per_block
        ids = np.full(move_size(len(pages)), beyond, np.int32)
        ids[: len(pages)] = [self.stages.block_id(page, stage) for page in pages]
        return ids


def is_ready(array: jax.Array) -> bool:
    """Whether looking at an array takes no waiting."""
    return bool(array.is_ready())  # type: ignore[attr-defined]  # every array has it, and the abstract class does not


def move_size(blocks: int) -> int:
    """The padded number of blocks that a program moves.

    Raises:
      ValueError: more than the largest.
    """
    for size in MOVE_SIZES:
        if blocks <= size:
            return size
    raise ValueError(f"{blocks=} must be at most {MOVE_SIZES[-1]}")
