"""How the rows of the groups are cut into tiles."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Int32

ALIGNMENT = 8  # of the rows that tiles start from, which TMA needs to write the layout that wgmma reads


class Plan(NamedTuple):
    """Tiles of rows in ascending order, each with rows of one group; those from `filled` on mean nothing."""

    group: jax.Array  # [tiles]; the number of groups for rows behind the last group
    start: jax.Array  # [tiles], first row of the tile, which may be of a group before
    first: jax.Array  # [tiles], first row of the group
    end: jax.Array  # [tiles], behind the last row of the group
    filled: jax.Array  # [1]


def plan(group_sizes: Int32[Array, " E"], rows: int, block_m: int) -> Plan:
    """Cuts each group from its first row on, rounded down, and then what is left behind the last one.

    Args:
      rows: of all groups and behind them, at least one.
      block_m: rows of a tile, a multiple of `ALIGNMENT`.
    """
    groups = group_sizes.shape[0]
    ends = jnp.append(jnp.minimum(jnp.cumsum(group_sizes), rows), rows).astype(jnp.int32)
    firsts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    starts = firsts // ALIGNMENT * ALIGNMENT
    tiles = jnp.where(firsts < ends, pl.cdiv(ends - starts, block_m), 0)
    tile_ends = jnp.cumsum(tiles)
    tile = jnp.arange(most_tiles(rows, groups, block_m), dtype=jnp.int32)
    group = jnp.searchsorted(tile_ends, tile, side="right", method="compare_all").astype(jnp.int32)
    group = jnp.minimum(group, groups)
    start = starts[group] + (tile - (tile_ends - tiles)[group]) * block_m
    return Plan(
        group, start, jnp.maximum(start, firsts[group]), jnp.minimum(start + block_m, ends[group]), tile_ends[-1:]
    )


def most_tiles(rows: int, groups: int, block_m: int) -> int:
    """Of any sizes of groups."""
    filled = min(groups + 1, rows)
    return min(rows, (rows + filled * (ALIGNMENT - 1 + block_m - 1)) // block_m)
