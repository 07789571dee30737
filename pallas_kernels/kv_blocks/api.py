"""Public functions of the block moves."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, Shaped

from pallas_kernels import dispatch
from pallas_kernels.checks import check_array
from pallas_kernels.kv_blocks import mosaic, reference

# The specification is what XLA runs.
_GATHER_IMPLEMENTATIONS = {
    "mosaic": mosaic.gather_blocks,
    "xla": reference.gather_blocks,
    "reference": reference.gather_blocks,
}
_SCATTER_IMPLEMENTATIONS = {
    "mosaic": mosaic.scatter_blocks,
    "xla": reference.scatter_blocks,
    "reference": reference.scatter_blocks,
}


def gather_blocks(
    arena: Shaped[Array, "rows page_size kv_heads head_dim"],
    ids: Int32[Array, " blocks"],
    *,
    rows_per_block: int,
    implementation: str = "auto",
) -> Shaped[Array, "blocks rows_per_block page_size kv_heads head_dim"]:
    """Copies blocks out of the arena.

    A block is `rows_per_block` rows of a page-major arena, whose page holds two rows (K, V) of each of its layers. A
    Full Block is a page: `rows_per_block` is `2 * layers` and the id is that of the page. A Layer Block is one layer of
    a page: `rows_per_block` is 2 and the id is `page * layers + layer`.

    Args:
      arena: its rows; block i is the rows `[i * rows_per_block, (i + 1) * rows_per_block)`.
      ids: those of an arena of n blocks are 0 to n - 1; any other is padding and gives an undefined block.
      rows_per_block: rows of a block, static.
      implementation: "auto": the first of the following that can; "mosaic": bulk copies on GPUs of compute capability
        9.0 (blocks of a multiple of 16 bytes; no gradient); "xla", which is the "reference", too: differentiable.

    Raises:
      ValueError: shapes or types that don't fit together, an arena that is not a whole number of blocks, or an unknown
        implementation.
      NotImplementedError: the chosen implementation can't do these arguments, or there is none of that name; of "auto"
        none can, and the message says why each can't.
    """
    if isinstance(rows_per_block, bool) or not isinstance(rows_per_block, int | np.integer) or rows_per_block < 1:
        raise ValueError(f"{rows_per_block=} must be an int of at least 1")
    _check(arena, ids, int(rows_per_block))
    return dispatch.run(
        "gather_blocks", _GATHER_IMPLEMENTATIONS, implementation, arena, ids, rows_per_block=int(rows_per_block)
    )


def scatter_blocks(
    arena: Shaped[Array, "rows page_size kv_heads head_dim"],
    ids: Int32[Array, " blocks"],
    blocks: Shaped[Array, "blocks rows_per_block page_size kv_heads head_dim"],
    *,
    implementation: str = "auto",
) -> Shaped[Array, "rows page_size kv_heads head_dim"]:
    """Copies blocks into the arena; in place where the arena is donated.

    Blocks are those of `gather_blocks`: Full Blocks or Layer Blocks by the rows that `blocks` have.

    Args:
      arena: its rows; block i is the rows `[i * rows_per_block, (i + 1) * rows_per_block)`.
      ids: those of an arena of n blocks are 0 to n - 1, no two alike; any other is padding, whose block is dropped.
      blocks: the contents.
      implementation: "auto": the first of the following that can; "mosaic": bulk copies on GPUs of compute capability
        9.0 (blocks of a multiple of 16 bytes and of the arena's type; no gradient); "xla", which is the "reference",
        too: casts from one floating type to another, differentiable.

    Raises:
      ValueError, NotImplementedError: as `gather_blocks`.
    """
    check_array("blocks", blocks, None, ("blocks", "rows_per_block", "page_size", "kv_heads", "head_dim"))
    if blocks.shape[1] < 1:
        raise ValueError(f"rows_per_block={blocks.shape[1]} must be at least 1")
    _check(arena, ids, blocks.shape[1])
    floats = jnp.issubdtype(arena.dtype, jnp.floating) and jnp.issubdtype(blocks.dtype, jnp.floating)
    check_array(
        "blocks", blocks, jnp.floating if floats else arena.dtype, (*ids.shape, blocks.shape[1], *arena.shape[1:])
    )
    return dispatch.run("scatter_blocks", _SCATTER_IMPLEMENTATIONS, implementation, arena, ids, blocks)


def _check(arena: Any, ids: Any, rows_per_block: int) -> None:
    check_array("arena", arena, None, ("rows", "page_size", "kv_heads", "head_dim"))
    check_array("ids", ids, jnp.int32, ("blocks",))
    if arena.shape[0] % rows_per_block:
        raise ValueError(f"arena of rows={arena.shape[0]} is not a whole number of blocks of {rows_per_block=}")
