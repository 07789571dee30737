"""Public function of decode attention: checks and choice of implementation."""

from __future__ import annotations

import math

from jaxtyping import Array, Float, Int32

from pallas_kernels import dispatch
from pallas_kernels.decode_attention import mosaic, reference, xla

_IMPLEMENTATIONS = {
    "mosaic": mosaic.decode_attention,
    "xla": xla.decode_attention,
    "reference": reference.decode_attention,
}


def decode_attention(
    q: Float[Array, "batch q_heads head_dim"],
    k_pages: Float[Array, "rows page_size kv_heads head_dim"],
    v_pages: Float[Array, "v_rows page_size kv_heads head_dim"],
    page_table: Int32[Array, "batch width"],
    lengths: Int32[Array, " batch"],
    *,
    v_page_table: Int32[Array, "batch width"] | None = None,
    scale: float | None = None,
    window: int | None = None,
    implementation: str = "auto",
) -> Float[Array, "batch q_heads head_dim"]:
    """Attends with the newest token of each sequence to all its keys, its own included.

    Args:
      q: queries; query head h reads key/value head `h // (q_heads // kv_heads)`.
      k_pages, v_pages: rows of `page_size` tokens; they may be one array, the arena.
      page_table: row ids of the keys of each sequence, in token order; entries past its length are not looked at, but
        must be valid row ids.
      lengths: number of keys of each sequence, in tokens; 0 marks a padding row, whose result is zero.
      v_page_table: row ids of the values; the same as those of the keys if left out.
      scale: factor of the scores; `1 / sqrt(head_dim)` if left out.
      window: sliding window: a query at position p sees the keys at positions j with `p - window < j <= p`; all keys up
        to its own if left out. Only differences of positions count, so a table may leave out whole pages before the
        first key in sight if `lengths` are counted from the first page that it has.
      implementation: "auto"; "mosaic" (split-KV kernel for GPUs of compute capability 9.0: bfloat16 or float16,
        `head_dim` 64 or 128, `page_size` 8, 16, 32 or a multiple of 64, up to 64 query heads a key/value head); "xla"
        (a page of each sequence at a time); or "reference" (gathers the pages: memory `batch * width * page_size` keys
        and values).

    Raises:
      ValueError: shapes that don't fit together.
      NotImplementedError: the chosen implementation can't do these arguments.
    """
    batch, q_heads, head_dim = q.shape
    if k_pages.ndim != 4 or k_pages.shape[3] != head_dim or v_pages.shape[1:] != k_pages.shape[1:]:
        raise ValueError(f"pages must be [rows, page_size, kv_heads, {head_dim}]: {k_pages.shape=}, {v_pages.shape=}")
    if q_heads % k_pages.shape[2]:
        raise ValueError(f"{q_heads=} must be a multiple of kv_heads={k_pages.shape[2]}")
    if page_table.shape[0] != batch or lengths.shape != (batch,):
        raise ValueError(f"{page_table.shape=} and {lengths.shape=} must have {batch=} rows")
    if window is not None and window < 1:
        raise ValueError(f"{window=} must be at least 1, or None")
    return dispatch.run(
        "decode_attention",
        _IMPLEMENTATIONS,
        implementation,
        q,
        k_pages,
        v_pages,
        page_table,
        page_table if v_page_table is None else v_page_table,
        lengths,
        1 / math.sqrt(head_dim) if scale is None else scale,
        window,
    )
