"""How the keys of a batch are dealt to the multiprocessors."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Int32

TILE = 64  # keys of one step of an item


class Plan(NamedTuple):
    """Items of work, those of a sequence one after the other; `tiles` of those beyond the last one are 0."""

    row: jax.Array  # [items]
    tile: jax.Array  # [items], the first of the item
    tiles: jax.Array  # [items]
    first: jax.Array  # [batch], first item of the sequence
    number: jax.Array  # [batch], of its items


def plan(lengths: Int32[Array, " batch"], width: int, window: int | None, slots: int) -> Plan:
    """Cuts the keys in sight into items of at most `ceil(tiles / slots)` tiles, those of a sequence of about one size.

    Args:
      width: keys that a page table has room for.
      slots: items that run side by side; there are fewer than `slots + batch`.
    """
    batch = lengths.shape[0]
    start = jnp.zeros_like(lengths) if window is None else jnp.maximum(lengths - window, 0) // TILE
    tiles = pl.cdiv(lengths, TILE) - start
    share = jnp.maximum(pl.cdiv(jnp.sum(tiles), slots), 1)
    size = pl.cdiv(tiles, jnp.maximum(pl.cdiv(tiles, share), 1))
    count = jnp.where(tiles > 0, pl.cdiv(tiles, jnp.maximum(size, 1)), 0)
    ends = jnp.cumsum(count)
    item = jnp.arange(min(slots + batch, batch * pl.cdiv(width, TILE)), dtype=jnp.int32)
    row = jnp.minimum(jnp.searchsorted(ends, item, side="right").astype(jnp.int32), batch - 1)
    first = ends - count
    skipped = (item - first[row]) * size[row]
    left = jnp.where(item < ends[-1], tiles[row] - skipped, 0)
    return Plan(row, start[row] + skipped, jnp.clip(left, 0, size[row]), first, count)
