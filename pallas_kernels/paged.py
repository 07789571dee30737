"""What the operations on paged keys and values share: arguments and their checks."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, Shaped


class Pages(NamedTuple):
    """Keys or values of sequences in pages.

    Attributes:
      rows: `[rows, page_size, kv_heads, head_dim]`.
      table: `[seqs, width]` row ids of each sequence in token order.
      scales: `[rows, kv_heads, page_size]` factors of the tokens of 8-bit rows; None where rows hold the numbers.
    """

    rows: Shaped[Array, "rows page_size kv_heads head_dim"]
    table: Int32[Array, "seqs width"]
    scales: Float32[Array, "rows kv_heads page_size"] | None = None

    @property
    def page_size(self) -> int:
        return int(self.rows.shape[1])

    @property
    def kv_heads(self) -> int:
        return int(self.rows.shape[2])

    @property
    def keys(self) -> int:
        """Tokens that a table has room for."""
        return self.table.shape[1] * self.page_size


def check_pages(keys: Pages, values: Pages, seqs: int, q_heads: int, head_dim: int) -> None:
    """Raises `ValueError` for keys and values that don't fit each other or the queries."""
    k, v = keys.rows, values.rows
    if k.ndim != 4 or k.shape[3] != head_dim or v.shape[1:] != k.shape[1:] or v.dtype != k.dtype:
        raise ValueError(
            f"pages must be [rows, page_size, kv_heads, {head_dim}] of one type: "
            f"k_pages {k.dtype}{list(k.shape)}, v_pages {v.dtype}{list(v.shape)}"
        )
    if min(k.shape) < 1 or v.shape[0] < 1:
        raise ValueError(f"pages must not be empty: k_pages {list(k.shape)}, v_pages {list(v.shape)}")
    if q_heads % k.shape[2]:
        raise ValueError(f"{q_heads=} must be a multiple of kv_heads={k.shape[2]}")
    for name, table in (("page_table", keys.table), ("v_page_table", values.table)):
        if table.ndim != 2 or table.shape[0] != seqs or table.shape != keys.table.shape or table.dtype != jnp.int32:
            raise ValueError(f"{name} must be int32[{seqs}, {keys.table.shape[-1]}]: {table.dtype}{list(table.shape)}")
    for name, pages in (("k_scales", keys), ("v_scales", values)):
        shape = (pages.rows.shape[0], pages.kv_heads, pages.page_size)
        scales = pages.scales
        if scales is None and pages.rows.dtype.itemsize == 1:
            raise ValueError(f"pages of {pages.rows.dtype} need {name}")
        if scales is not None and (scales.shape != shape or scales.dtype != jnp.float32):
            raise ValueError(f"{name} must be float32{list(shape)}: {scales.dtype}{list(scales.shape)}")


def check_window(window: int | None) -> None:
    """Raises `ValueError` for a sliding window that shows no key."""
    if window is not None and window < 1:
        raise ValueError(f"{window=} must be at least 1, or None")
