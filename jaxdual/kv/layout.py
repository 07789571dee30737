"""Where the keys and values of a token lie: pages, rows, blocks and their sizes."""

from __future__ import annotations

from dataclasses import dataclass

ROWS_PER_LAYER = 2  # one of keys, one of values


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Page-major layout of the KV memory of one model.

    A page holds `page_size` tokens of every layer. The arena is `[num_pages * rows_per_page, page_size, kv_heads,
    head_dim]`; row `(page * num_layers + layer) * 2` holds keys, the next one values. So the Full Block of a page is
    one contiguous run of rows, and a Layer Block a contiguous slice of it.

    Attributes:
      num_layers, kv_heads, head_dim: of the model.
      page_size: tokens a page.
      dtype: name of the element type, such as "float32" or "bfloat16".
      itemsize: bytes of an element.
    """

    num_layers: int
    kv_heads: int
    head_dim: int
    page_size: int
    dtype: str
    itemsize: int

    @property
    def rows_per_page(self) -> int:
        return self.num_layers * ROWS_PER_LAYER

    @property
    def bytes_per_token(self) -> int:
        return self.rows_per_page * self.kv_heads * self.head_dim * self.itemsize

    @property
    def full_block_bytes(self) -> int:
        """Bytes of a page in all layers."""
        return self.bytes_per_token * self.page_size

    def arena_shape(self, num_pages: int) -> tuple[int, int, int, int]:
        return (num_pages * self.rows_per_page, self.page_size, self.kv_heads, self.head_dim)

    def block_shape(self) -> tuple[int, int, int, int]:
        return (self.rows_per_page, self.page_size, self.kv_heads, self.head_dim)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def fingerprint(self) -> bytes:
        """What a block's bytes depend on besides the model and the tokens."""
        return repr((self.num_layers, self.kv_heads, self.head_dim, self.page_size, self.dtype)).encode()
