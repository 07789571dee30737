"""Contents of device pages and host slots, as dictionaries: what the accounting promises, played out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jaxdual.kv.manager import PageCopy

Cell = tuple[int, ...]


class Memory:
    """Each token's place, in each layer group, holds the whole token prefix that its keys and values depend on.

    Args:
      page_size: tokens a page.
      windows: of the groups.
    """

    def __init__(self, page_size: int, windows: Sequence[int | None] = (None,)) -> None:
        self.page_size = page_size
        self.windows = tuple(windows)
        self.pages: dict[tuple[int, int], list[Cell | None]] = {}
        self.slots: dict[tuple[int, int], list[Cell | None]] = {}

    def execute(self, copies: Iterable[PageCopy]) -> None:
        for copy in copies:
            if copy.direction == "out":
                self.slots[copy.group, copy.slot] = list(self._page(copy.group, copy.page))
            else:
                self.pages[copy.group, copy.page] = list(self.slots[copy.group, copy.slot])

    def write(self, pages: Sequence[int], position: int, prefix: Cell, *, group: int = 0, first: int = 0) -> None:
        """`pages` are those of the blocks from number `first` on."""
        assert len(prefix) == position + 1
        block = position // self.page_size - first
        assert block >= 0
        self._page(group, pages[block])[position % self.page_size] = prefix

    def check(
        self, pages: Sequence[int], tokens: Sequence[int], computed: int, *, group: int = 0, first: int = 0
    ) -> None:
        """What the query at position `computed` sees of the places before it belongs to `tokens`."""
        window = self.windows[group]
        for position in range(0 if window is None else max(0, computed - window + 1), computed):
            block = position // self.page_size - first
            assert block >= 0, (group, position, computed, first)
            found = self._page(group, pages[block])[position % self.page_size]
            assert found == tuple(tokens[: position + 1]), (group, position, computed)

    def _page(self, group: int, page: int) -> list[Cell | None]:
        return self.pages.setdefault((group, page), [None] * self.page_size)
