"""Pieces of shared memory that blocks pass through on their way onto the device and off it."""

from __future__ import annotations

import numpy as np

from jaxdual.kv.slots import SlotPool


class Ring:
    """Equal pieces, lent out one by one; whoever has one alone says what touches it.

    Args:
      memory: of the slab, all of it.
      offset: of the first piece in it, in bytes.
      piece_bytes: of a piece.
      count: of pieces.
    """

    def __init__(self, memory: np.ndarray, *, offset: int, piece_bytes: int, count: int) -> None:
        self._memory, self._offset, self.piece_bytes = memory, offset, piece_bytes
        self._pool = SlotPool(count)

    @property
    def num_lent(self) -> int:
        return self._pool.capacity - self._pool.num_free

    def reset(self) -> None:
        """Nobody touches any piece any more."""
        self._pool = SlotPool(self._pool.capacity)

    def take(self) -> int | None:
        """A piece, or None if all are lent out."""
        return self._pool.take()

    def give_back(self, piece: int) -> None:
        """Nobody touches the piece any more."""
        self._pool.free([piece])

    def offset_of(self, piece: int) -> int:
        """In the slab, in bytes."""
        return self._offset + piece * self.piece_bytes

    def blocks(self, piece: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """A view of the beginning of a piece."""
        return np.ndarray(shape, dtype, buffer=self._memory, offset=self.offset_of(piece))
