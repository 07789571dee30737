"""What the operations on paged keys and values share: arguments and their checks."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, Shaped

from pallas_kernels.checks import check_array, show

_INT32_MAX = 2**31 - 1
_FLOAT32_MAX = float(jnp.finfo(jnp.float32).max)


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
    check_array("k_pages", k, jnp.floating, ("rows", "page_size", "kv_heads", head_dim))
    check_array("v_pages", v, k.dtype, ("rows", *k.shape[1:]))
    if min(k.shape) < 1 or v.shape[0] < 1:
        raise ValueError(f"pages must not be empty: k_pages {list(k.shape)}, v_pages {list(v.shape)}")
    if q_heads < 1 or q_heads % k.shape[2]:
        raise ValueError(f"{q_heads=} must be a multiple of kv_heads={k.shape[2]}, and not 0")
    check_array("page_table", keys.table, jnp.int32, (seqs, "width"))
    if keys.table.shape[1] < 1:
        raise ValueError(f"page_table must have room for a page: {show(keys.table)}")
    check_array("v_page_table", values.table, jnp.int32, keys.table.shape)
    for name, pages in (("k_scales", keys), ("v_scales", values)):
        if pages.scales is not None:
            check_array(name, pages.scales, jnp.float32, (pages.rows.shape[0], pages.kv_heads, pages.page_size))
        elif pages.rows.dtype.itemsize == 1:
            raise ValueError(f"pages of {pages.rows.dtype} need {name}")


def checked_window(window: Any) -> int | None:
    """A sliding window as a number that a program is made for.

    Raises:
      ValueError: one that shows no key, or is no int of 32 bits.
    """
    if window is None:
        return None
    if isinstance(window, bool) or not isinstance(window, int | np.integer) or not 1 <= window <= _INT32_MAX:
        raise ValueError(f"{window=} must be an int from 1 to {_INT32_MAX}, or None")
    return int(window)


def checked_scale(scale: Any, head_dim: int) -> float:
    """The factor of the scores as a number that a program is made for; `1 / sqrt(head_dim)` for None.

    Raises:
      ValueError: an array, which would be traced, or no finite number.
    """
    if scale is None:
        return 1 / math.sqrt(head_dim)
    is_number = isinstance(scale, int | float | np.integer | np.floating) and not isinstance(scale, bool)
    if not is_number or not abs(scale) <= _FLOAT32_MAX:
        raise ValueError(f"{scale=} must be a finite number of Python or NumPy, or None")
    return float(scale)
