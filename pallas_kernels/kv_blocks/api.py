"""Public functions of the block moves."""

from __future__ import annotations

from jaxtyping import Array, Int32, Shaped

from pallas_kernels import dispatch
from pallas_kernels.kv_blocks import mosaic, reference


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
      ids: at least 0; an id past the last block gives an undefined block (padding).
      rows_per_block: rows of a block.
      implementation: "auto": the first of the following that can; "mosaic": bulk copies on GPUs of compute capability
        9.0 (blocks of a multiple of 16 bytes); "xla".

    Raises:
      ValueError: the arena is not a whole number of blocks, or no implementation of that name.
      NotImplementedError: the chosen implementation can't do these arguments.
    """
    _check(arena.shape[0], rows_per_block)
    implementations = {"mosaic": mosaic.gather_blocks, "xla": reference.gather_blocks}
    return dispatch.run("gather_blocks", implementations, implementation, arena, ids, rows_per_block)


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
      ids: at least 0, no two alike; a block whose id is past the last block is dropped (padding).
      blocks: the contents.
      implementation: "auto": the first of the following that can; "mosaic": bulk copies on GPUs of compute capability
        9.0 (blocks of a multiple of 16 bytes and of the arena's type); "xla": casts to the arena's type.

    Raises:
      ValueError: the arena is not a whole number of blocks, or no implementation of that name.
      NotImplementedError: the chosen implementation can't do these arguments.
    """
    _check(arena.shape[0], blocks.shape[1])
    implementations = {"mosaic": mosaic.scatter_blocks, "xla": reference.scatter_blocks}
    return dispatch.run("scatter_blocks", implementations, implementation, arena, ids, blocks)


def _check(rows: int, rows_per_block: int) -> None:
    if rows_per_block < 1 or rows % rows_per_block:
        raise ValueError(f"arena of {rows=} is not a whole number of blocks of {rows_per_block=}")
