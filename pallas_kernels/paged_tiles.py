"""Parts of the Mosaic kernels that read keys and values from pages, a tile of tokens at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import key_bias

LOG2E = math.log2(math.e)


class Tiling:
    """Tiles of `size` tokens over pages of `page_size`: a part of one page, or several pages.

    Args:
      size: tokens of a tile.
      page_size: a divisor or a multiple of `size`.
      width: pages of a table.
    """

    def __init__(self, size: int, page_size: int, width: int) -> None:
        self._size, self._page_size, self._width = size, page_size, width
        self._piece = min(size, page_size)
        self.pieces = size // self._piece  # copies that a tile takes

    @staticmethod
    def fits(size: int, page_size: int) -> bool:
        """Whether tiles and pages line up, and a piece has the eight rows that a tile in shared memory is made of."""
        return page_size >= 8 and (size % page_size == 0 or page_size % size == 0)

    def rows(self, table: Any, seq: Any, tile: Any) -> list[Any]:
        """Row ids of the pieces of a tile. It may end beyond the table; what is loaded for that is some other page."""
        if self.pieces == 1:
            return [table[seq, jnp.minimum(tile * self._size // self._page_size, self._width - 1)]]
        return [table[seq, jnp.minimum(tile * self.pieces + i, self._width - 1)] for i in range(self.pieces)]

    def load(
        self, tile: Any, rows: Sequence[Any], smem: Any, ready: Any, pages: Any, at: Sequence[Any], token_axis: int
    ) -> None:
        """Starts the copies of a tile, which arrive at `ready` one by one.

        Args:
          tile: its index in the sequence.
          rows: of `rows`.
          smem: `[size, ...]`.
          ready: a barrier.
          pages: `[rows, ...]` in device memory.
          at: index of the other axes of `pages`, of which `token_axis` is put in.
          token_axis: position of the axis of tokens among the axes behind the first.
        """
        offset = tile * self._size % self._page_size if self._page_size > self._size else 0
        index = [*at]
        index.insert(token_axis, pl.ds(offset, self._piece))
        for i, row in enumerate(rows):
            plgpu.copy_gmem_to_smem(pages.at[row, *index], smem.at[pl.ds(i * self._piece, self._piece)], ready)


def bias_log2(bits: Any, value: Any, seq: Any, tile: Any, column: Any) -> Any:
    """Bias of the scores of a tile in units of log2.

    Args:
      bits: reference to those of a `KeyBias`.
      value: of the sequence.
      tile: index of the tile of the sequence.
      column: `[rows, tile size]` number of each key in the tile.
    """
    words = column.shape[1] // key_bias.WORD
    last = bits.shape[1] - 1
    word = jnp.zeros(column.shape, jnp.uint32)
    for i in range(words):
        one = bits[seq, jnp.minimum(tile * words + i, last)]
        word = jnp.where(column >= i * key_bias.WORD, one, word)
    chosen = (word >> (column % key_bias.WORD).astype(jnp.uint32)) & 1
    return jnp.where(chosen == 1, value * LOG2E, 0)


def spread(vector: Any, shape: tuple[int, int], axis: int) -> Any:
    """A vector along `axis` of `shape`, repeated along the other."""
    return jax.lax.broadcast_in_dim(vector, shape, [axis])
