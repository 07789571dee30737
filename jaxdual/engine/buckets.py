"""The padded shapes that steps run in.

One object pads at run time and lists what to compile before, so that the two can't disagree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jaxdual.scheduling.batch import Chunk

_ROWS_STEP = 4
_SMALLEST_WIDTH = 8
_WIDTH_STEP = 4
_MOST_WIDTHS = 3
_SMALLEST_CHUNK = 32
_CHUNK_STEP = 4


@dataclass(frozen=True, slots=True)
class DecodeShape:
    """Padded shape of a decode step: `rows` sequences of up to `width` pages."""

    rows: int
    width: int


@dataclass(frozen=True, slots=True)
class PrefillShape:
    """Padded shape of a prefill: `rows` chunks of up to `chunk` tokens, of sequences of up to `width` pages."""

    rows: int
    chunk: int
    width: int

    @property
    def tokens(self) -> int:
        return self.rows * self.chunk


@dataclass(frozen=True, slots=True)
class PrefillBatch:
    """Chunks that run together, and the shape that they are padded to."""

    shape: PrefillShape
    chunks: tuple[Chunk, ...]


class Buckets:
    """All shapes of one engine.

    Row counts grow to `max_num_seqs`, page-table widths by fours to `max_pages`. Prefills come as one chunk of a few
    lengths, or as several short ones side by side that hold as many tokens together as the longest chunk.

    Args:
      max_num_seqs: sequences that run at once.
      max_pages: entries of the longest page table: pages of the longest sequence, or fewer if all layers look through
        windows.
      max_chunk: tokens of the longest chunk.
      page_size: tokens a page.
    """

    def __init__(self, max_num_seqs: int, max_pages: int, max_chunk: int, page_size: int) -> None:
        self.rows = _growing(1, _ROWS_STEP, max_num_seqs)
        widths = [max_pages]
        while widths[0] > _SMALLEST_WIDTH and len(widths) < _MOST_WIDTHS:
            widths.insert(0, -(-widths[0] // _WIDTH_STEP))
        self.widths = tuple(widths)
        self._page_size = page_size
        lengths = _growing(_SMALLEST_CHUNK, _CHUNK_STEP, max_chunk)
        pairs = {(1, length) for length in lengths}
        pairs |= {(self._row_bucket(max_chunk // length), length) for length in lengths}
        self._prefill_pairs = sorted(pairs, key=lambda pair: (pair[0] * pair[1], pair[0]))

    def decode(self, rows: int, pages: int) -> DecodeShape:
        """The smallest shape for `rows` sequences, the longest of `pages` pages (at most `max_pages` count)."""
        return DecodeShape(_at_least(self.rows, rows), _at_least(self.widths, min(pages, self.widths[-1])))

    def prefill(self, chunks: Sequence[Chunk]) -> list[PrefillBatch]:
        """Groups chunks into batches, longest first, so that little is padded."""
        remaining = sorted(chunks, key=lambda chunk: len(chunk.tokens), reverse=True)
        batches = []
        while remaining:
            rows, length = self._best_pair(remaining)
            group = tuple(remaining[:rows])
            remaining = remaining[rows:]
            batches.append(PrefillBatch(PrefillShape(rows, length, self._prefill_width(length, group)), group))
        return batches

    def decode_shapes(self) -> Iterator[DecodeShape]:
        """Every shape that `decode` can return."""
        for rows in self.rows:
            for width in self.widths:
                yield DecodeShape(rows, width)

    def prefill_shapes(self) -> Iterator[PrefillShape]:
        """Every shape that `prefill` can return."""
        for rows, length in self._prefill_pairs:
            for width in self._prefill_widths(length):
                yield PrefillShape(rows, length, width)

    def _row_bucket(self, rows: int) -> int:
        """The largest row count of at most `rows`."""
        return max([count for count in self.rows if count <= rows], default=1)

    def _best_pair(self, chunks: Sequence[Chunk]) -> tuple[int, int]:
        """The shape that spends the fewest padded tokens for each real one on the first of `chunks`, longest first."""
        longest = len(chunks[0].tokens)
        fitting = [pair for pair in self._prefill_pairs if pair[1] >= longest]

        def waste(pair: tuple[int, int]) -> tuple[float, int]:
            rows, length = pair
            return rows * length / sum(len(chunk.tokens) for chunk in chunks[:rows]), -rows

        return min(fitting, key=waste)

    def _prefill_widths(self, length: int) -> tuple[int, ...]:
        """Widths that hold a whole chunk of `length` tokens; at least the largest."""
        return tuple(width for width in self.widths[:-1] if width * self._page_size >= length) + self.widths[-1:]

    def _prefill_width(self, length: int, chunks: Sequence[Chunk]) -> int:
        end = max(chunk.start + len(chunk.tokens) for chunk in chunks)
        return _at_least(self._prefill_widths(length), min(-(-end // self._page_size), self.widths[-1]))


def _growing(first: int, step: int, last: int) -> tuple[int, ...]:
    sizes = []
    while first < last:
        sizes.append(first)
        first *= step
    return (*sizes, last)


def _at_least(sizes: Sequence[int], wanted: int) -> int:
    for size in sizes:
        if size >= wanted:
            return size
    raise ValueError(f"{wanted=} is above the largest bucket {sizes[-1]}")
