"""The padded shapes that steps run in.

One object pads at run time and lists what to compile before, so that the two can't disagree. Page tables are as wide as
the longest sequence: attention's time follows the pages that are in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxdual.scheduling.plan import Chunk

_ROWS_STEP = 2
_SMALLEST_CHUNK = 32
_CHUNK_STEP = 2
_SHARED_STEP = 4


@dataclass(frozen=True, slots=True)
class PrefillShape:
    """Padded shape of a prefill: `rows` chunks of up to `chunk` tokens."""

    rows: int
    chunk: int

    @property
    def tokens(self) -> int:
        return self.rows * self.chunk


@dataclass(frozen=True, slots=True)
class PrefillBatch:
    """Chunks of each rank that run together, and the shape that each rank's are padded to."""

    shape: PrefillShape
    chunks: tuple[tuple[Chunk, ...], ...]


class Buckets:
    """All shapes of one engine.

    Decode steps and the sampler run in row counts that double up to `max_num_seqs`. Prefills come as one chunk, in
    lengths that double up to `max_chunk`, or as several short ones side by side, in lengths and numbers that grow by
    fours as long as they hold no more tokens together than the longest chunk.

    Args:
      max_num_seqs: sequences that run at once.
      max_chunk: tokens of the longest chunk.

    Attributes:
      rows: row counts of decode steps and of the sampler.
      prefill_shapes: shapes of prefills, smallest first.
    """

    def __init__(self, max_num_seqs: int, max_chunk: int) -> None:
        self.rows = _growing(1, _ROWS_STEP, max_num_seqs)
        shapes = {PrefillShape(1, length) for length in _growing(_SMALLEST_CHUNK, _CHUNK_STEP, max_chunk)}
        for length in _growing(_SMALLEST_CHUNK, _SHARED_STEP, max_chunk):
            for rows in _growing(_SHARED_STEP, _SHARED_STEP, max_num_seqs):
                if rows * length <= max_chunk and rows in self.rows:  # the sampler is compiled for these only
                    shapes.add(PrefillShape(rows, length))
        self.prefill_shapes = tuple(sorted(shapes, key=lambda shape: (shape.tokens, shape.rows)))

    def decode(self, rows: int) -> int:
        """The smallest row count that holds `rows` sequences.

        Raises:
          ValueError: more than `max_num_seqs`.
        """
        for size in self.rows:
            if size >= rows:
                return size
        raise ValueError(f"{rows=} is above the largest bucket {self.rows[-1]}")

    def watched_sizes(self, rows: int) -> tuple[int, ...]:
        """Numbers of watched sequences that decode steps of a bucket are compiled for: they grow by fours up to all."""
        return _growing(1, _SHARED_STEP, rows)

    def watched(self, count: int, rows: int) -> int:
        """The smallest of `watched_sizes(rows)` that holds `count` sequences."""
        return next(size for size in self.watched_sizes(rows) if size >= count)

    @property
    def shortest_shapes(self) -> tuple[PrefillShape, ...]:
        """Shapes of prefills that short chunks run in, in all numbers of them."""
        shortest = self.prefill_shapes[0].chunk
        return tuple(shape for shape in self.prefill_shapes if shape.chunk == shortest)

    def prefill(self, chunks: Sequence[Sequence[Chunk]]) -> list[PrefillBatch]:
        """Groups the chunks of each rank into batches, longest first, so that little is padded."""
        remaining = [sorted(of_rank, key=lambda chunk: len(chunk.tokens), reverse=True) for of_rank in chunks]
        batches = []
        while any(remaining):
            shape = self._best_shape(remaining)
            batches.append(PrefillBatch(shape, tuple(tuple(of_rank[: shape.rows]) for of_rank in remaining)))
            remaining = [of_rank[shape.rows :] for of_rank in remaining]
        return batches

    def _best_shape(self, chunks: Sequence[Sequence[Chunk]]) -> PrefillShape:
        """The shape that pads least for each real token of the first of each rank's chunks, longest first."""
        longest = max(len(of_rank[0].tokens) for of_rank in chunks if of_rank)

        def waste(shape: PrefillShape) -> tuple[float, int]:
            real = sum(len(chunk.tokens) for of_rank in chunks for chunk in of_rank[: shape.rows])
            return shape.tokens / real, -shape.rows

        return min((shape for shape in self.prefill_shapes if shape.chunk >= longest), key=waste)


def _growing(first: int, step: int, last: int) -> tuple[int, ...]:
    sizes = []
    while first < last:
        sizes.append(first)
        first *= step
    return (*sizes, last)
