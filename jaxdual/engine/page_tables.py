"""Page tables of the sequences that run, on the host."""

from __future__ import annotations

import numpy as np

from jaxdual.engine.paged import GroupTable
from jaxdual.kv.layout import most_blocks
from jaxdual.kv.manager import GroupPages, TableChange


class PageTables:
    """Page tables of all slots of all ranks in one layer group, as the plans' changes left them.

    Args:
      memory: of the group.
      slots: rows; those that are padding's stay zero.
      page_size: tokens a page.
      max_pages: pages of the longest sequence.
      max_chunk: tokens of the longest chunk.
    """

    def __init__(self, memory: GroupPages, slots: int, page_size: int, max_pages: int, max_chunk: int) -> None:
        self._window = memory.window
        self._page_size = page_size
        self._pages = np.zeros((slots, most_blocks(memory.window, max_chunk, page_size, max_pages)), np.int32)
        self._first = np.zeros(slots, np.int32)

    @property
    def width(self) -> int:
        """Pages of a table."""
        return int(self._pages.shape[1])

    def change(self, slot: int, change: TableChange) -> None:
        self._pages[slot, change.start : change.start + len(change.pages)] = change.pages
        self._first[slot] = change.first * self._page_size

    def of(self, slots: np.ndarray, chunk: int) -> GroupTable:
        """Tables of `slots` for `chunk` queries each."""
        width = most_blocks(self._window, chunk, self._page_size, self._pages.shape[1])
        # Fancy indices copy: the device may still read a step's tables when the next one changes these.
        return GroupTable(self._pages[slots, :width], None if self._window is None else self._first[slots])
