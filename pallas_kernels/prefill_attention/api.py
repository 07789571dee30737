"""Public function of prefill attention: checks and choice of implementation."""

from __future__ import annotations

import math

from jaxtyping import Array, Float, Int32

from pallas_kernels import dispatch
from pallas_kernels.prefill_attention import reference, xla

_IMPLEMENTATIONS = {"xla": xla.prefill_attention, "reference": reference.prefill_attention}


def prefill_attention(
    q: Float[Array, "seqs chunk q_heads head_dim"],
    k_pages: Float[Array, "rows page_size kv_heads head_dim"],
    v_pages: Float[Array, "v_rows page_size kv_heads head_dim"],
    page_table: Int32[Array, "seqs width"],
    starts: Int32[Array, " seqs"],
    counts: Int32[Array, " seqs"],
    *,
    v_page_table: Int32[Array, "seqs width"] | None = None,
    scale: float | None = None,
    window: int | None = None,
    implementation: str = "auto",
) -> Float[Array, "seqs chunk q_heads head_dim"]:
    """Attends causally with a chunk of each sequence to all keys up to each query's own position.

    The keys and values of the chunk itself must be in the pages already.

    Args:
      q: queries; query i of sequence s stands at position `starts[s] + i`; query head h reads key/value head
        `h // (q_heads // kv_heads)`.
      k_pages, v_pages: rows of `page_size` tokens; they may be one array, the arena.
      page_table: row ids of the keys of each sequence, in token order; entries past its length are not looked at, but
        must be valid row ids.
      starts: position of the first query of each sequence, in tokens: the length of its cached prefix.
      counts: number of queries of each sequence that are real; results of the others are zero.
      v_page_table: row ids of the values; the same as those of the keys if left out.
      scale: factor of the scores; `1 / sqrt(head_dim)` if left out.
      window: sliding window: a query at position p sees the keys at positions j with `p - window < j <= p`; all keys up
        to its own if left out. Only differences of positions count, so a table may leave out whole pages before the
        first key in sight if `starts` are counted from the first page that it has.
      implementation: "auto"; "xla" (a page of each sequence at a time, memory `seqs * q_heads * chunk * page_size`
        scores); or "reference" (gathers the pages, memory `seqs * q_heads * chunk * width * page_size` scores).

    Raises:
      ValueError: shapes that don't fit together.
      NotImplementedError: the chosen implementation can't do these arguments.
    """
    seqs, _, q_heads, head_dim = q.shape
    if k_pages.ndim != 4 or k_pages.shape[3] != head_dim or v_pages.shape[1:] != k_pages.shape[1:]:
        raise ValueError(f"pages must be [rows, page_size, kv_heads, {head_dim}]: {k_pages.shape=}, {v_pages.shape=}")
    if q_heads % k_pages.shape[2]:
        raise ValueError(f"{q_heads=} must be a multiple of kv_heads={k_pages.shape[2]}")
    if page_table.shape[0] != seqs or starts.shape != (seqs,) or counts.shape != (seqs,):
        raise ValueError(f"{page_table.shape=}, {starts.shape=} and {counts.shape=} must have {seqs=} rows")
    if window is not None and window < 1:
        raise ValueError(f"{window=} must be at least 1, or None")
    return dispatch.run(
        "prefill_attention",
        _IMPLEMENTATIONS,
        implementation,
        q,
        k_pages,
        v_pages,
        page_table,
        page_table if v_page_table is None else v_page_table,
        starts,
        counts,
        1 / math.sqrt(head_dim) if scale is None else scale,
        window,
    )
