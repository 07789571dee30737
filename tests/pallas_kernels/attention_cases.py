"""Paged keys and values of ragged sequences, and attention over them in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Paged:
    """Pages, their tables, and the same keys and values in plain order.

    Attributes:
      k_pages, v_pages: `[rows, page_size, kv_heads, head_dim]`, NaN wherever nothing was written.
      k_table, v_table: `[seqs, width]` row ids, shuffled; those past a sequence's end point to a row of NaN.
      keys, values: of each sequence, `[length, kv_heads, head_dim]`.
    """

    k_pages: np.ndarray
    v_pages: np.ndarray
    k_table: np.ndarray
    v_table: np.ndarray
    keys: list[np.ndarray]
    values: list[np.ndarray]


def paged(
    lengths: Sequence[int], *, page_size: int, kv_heads: int, head_dim: int, width: int, arena: bool, seed: int
) -> Paged:
    """Random contents; `arena` puts keys and values into one array, in neighbouring rows, as the engine does."""
    draw = np.random.default_rng(seed)
    pages = len(lengths) * width + 1
    order = draw.permutation(pages).astype(np.int32)
    unused, order = order[0], order[1:]
    rows = np.full((pages * 2, page_size, kv_heads, head_dim), np.nan, np.float32)
    k_rows, v_rows = (order * 2, order * 2 + 1) if arena else (order, pages + order)
    nowhere = unused * 2 if arena else unused
    k_table = np.full((len(lengths), width), nowhere, np.int32)
    v_table = np.full((len(lengths), width), nowhere, np.int32)
    keys, values = [], []
    for s, length in enumerate(lengths):
        keys.append(draw.standard_normal((length, kv_heads, head_dim)).astype(np.float32))
        values.append(draw.standard_normal((length, kv_heads, head_dim)).astype(np.float32))
        for block in range(-(-length // page_size)):
            k_table[s, block], v_table[s, block] = k_rows[s * width + block], v_rows[s * width + block]
            part = slice(block * page_size, min(length, (block + 1) * page_size))
            rows[k_table[s, block], : part.stop - part.start] = keys[-1][part]
            rows[v_table[s, block], : part.stop - part.start] = values[-1][part]
    if arena:
        return Paged(rows, rows, k_table, v_table, keys, values)
    v_table = np.where(v_table >= pages, v_table - pages, v_table).astype(np.int32)
    return Paged(rows[:pages], rows[pages:], k_table, v_table, keys, values)


def attend(q: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float) -> np.ndarray:
    """One query `[q_heads, head_dim]` over `[length, kv_heads, head_dim]`, in float64."""
    ratio = q.shape[0] // keys.shape[1]
    out = np.zeros(q.shape)
    for head in range(q.shape[0]):
        k = keys[:, head // ratio].astype(np.float64)
        scores = k @ q[head].astype(np.float64) * scale
        weights = np.exp(scores - scores.max())
        out[head] = weights / weights.sum() @ values[:, head // ratio].astype(np.float64)
    return out
