"""Contents of device pages and host slots, as dictionaries: what the accounting promises, played out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jaxdual.kv.manager import PageCopy

Cell = tuple[int, ...]


class Memory:
    """Each token's place holds the whole token prefix that its keys and values depend on."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.pages: dict[int, list[Cell | None]] = {}
        self.slots: dict[int, list[Cell | None]] = {}

    def execute(self, copies: Iterable[PageCopy]) -> None:
        for copy in copies:
            if copy.direction == "out":
                self.slots[copy.slot] = list(self._page(copy.page))
            else:
                self.pages[copy.page] = list(self.slots[copy.slot])

    def write(self, pages: Sequence[int], position: int, prefix: Cell) -> None:
        assert len(prefix) == position + 1
        self._page(pages[position // self.page_size])[position % self.page_size] = prefix

    def read(self, pages: Sequence[int], position: int) -> Cell | None:
        return self._page(pages[position // self.page_size])[position % self.page_size]

    def check(self, pages: Sequence[int], tokens: Sequence[int], computed: int) -> None:
        """The first `computed` places hold what belongs to `tokens`."""
        for position in range(computed):
            assert self.read(pages, position) == tuple(tokens[: position + 1]), (position, computed)

    def _page(self, page: int) -> list[Cell | None]:
        return self.pages.setdefault(page, [None] * self.page_size)
