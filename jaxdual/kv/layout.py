"""Where the keys and values of a token lie: layer groups, pages, rows, blocks and their sizes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Self

ROWS_PER_LAYER = 2  # one of keys, one of values


def first_block(window: int | None, position: int, page_size: int) -> int:
    """Number of the first block that a query at `position`, or a later one, sees through `window`."""
    return 0 if window is None else max(0, position - window + 1) // page_size


def most_blocks(window: int | None, queries: int, page_size: int, longest: int) -> int:
    """Blocks that `queries` neighbouring queries of a sequence see at most, their own included.

    Args:
      window: sliding window in tokens, or None.
      queries: tokens of a chunk; 1 for a decode step.
      page_size: tokens a block.
      longest: blocks of the longest sequence.
    """
    if window is None:
        return longest
    # Worst where the first of these tokens is the last one of its block.
    return min(longest, (window - 1 + queries + page_size - 2) // page_size + 1)


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers that keep keys and values of the same tokens, and so share an arena, a page table and a freeing rule.

    Attributes:
      layers: their numbers, in order.
      window: tokens that a query may need, its own included: the sliding window, or a little more; None for layers that
        attend to everything.
      every_head: each query head needs all key-value heads, so that devices which share a model's heads keep them all.
    """

    layers: tuple[int, ...]
    window: int | None = None
    every_head: bool = False

    @property
    def rows_per_page(self) -> int:
        return len(self.layers) * ROWS_PER_LAYER


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Page-major layout of the KV memory of one model.

    Each layer group has an arena of its own. A page of it holds `page_size` tokens of every layer of the group: the
    arena is `[num_pages * rows_per_page, page_size, kv_heads, head_dim]`; row `(page * layers + index) * 2` holds the
    keys of the group's layer number `index`, the next one its values. So the Full Block of a page is one contiguous run
    of rows, and a Layer Block a contiguous slice of it.

    Attributes:
      groups: those with full attention first, if there are any, then by window; every layer is in one of them.
      kv_heads, head_dim: of the model.
      page_size: tokens a page.
      dtype: name of the element type, such as "float32" or "bfloat16".
      itemsize: bytes of an element.
    """

    groups: tuple[LayerGroup, ...]
    kv_heads: int
    head_dim: int
    page_size: int
    dtype: str
    itemsize: int

    @classmethod
    def of_layers(
        cls,
        windows: Sequence[int | None],
        *,
        kv_heads: int,
        head_dim: int,
        page_size: int,
        dtype: str,
        itemsize: int,
        every_head: Collection[int] = (),
    ) -> Self:
        """The layout of a model whose layer `i` has the window `windows[i]`, and needs every head if it is named."""
        kinds = [(window or 0, i in every_head) for i, window in enumerate(windows)]
        groups = tuple(
            LayerGroup(tuple(i for i, one in enumerate(kinds) if one == kind), kind[0] or None, kind[1])
            for kind in sorted(set(kinds))
        )
        return cls(groups, kv_heads, head_dim, page_size, dtype, itemsize)

    @property
    def num_layers(self) -> int:
        return sum(len(group.layers) for group in self.groups)

    def place_of(self, layer: int) -> tuple[int, int]:
        """Number of the group of layer `layer`, and the layer's index in it."""
        for number, group in enumerate(self.groups):
            if layer in group.layers:
                return number, group.layers.index(layer)
        raise ValueError(f"{layer=} is not one of the {self.num_layers} layers")

    def full_block_bytes(self, group: int = 0) -> int:
        """Bytes of a page in all layers of a group."""
        return self.groups[group].rows_per_page * self.page_size * self.kv_heads * self.head_dim * self.itemsize

    def device_block_bytes(self, group: int, tensor_devices: int) -> int:
        """Of those bytes, what each of the devices has that share the model's heads."""
        return self.full_block_bytes(group) // (1 if self.groups[group].every_head else tensor_devices)

    def arena_shape(self, num_pages: int, group: int = 0) -> tuple[int, int, int, int]:
        return (num_pages * self.groups[group].rows_per_page, self.page_size, self.kv_heads, self.head_dim)

    def block_shape(self, group: int = 0) -> tuple[int, int, int, int]:
        return (self.groups[group].rows_per_page, self.page_size, self.kv_heads, self.head_dim)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def fingerprint(self) -> bytes:
        """What a block's bytes depend on besides the model and the tokens."""
        groups = tuple((group.layers, group.window) for group in self.groups)
        return repr((groups, self.kv_heads, self.head_dim, self.page_size, self.dtype)).encode()
