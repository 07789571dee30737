"""Public functions of the block moves."""

from __future__ import annotations

from jaxtyping import Array, Float, Int32

from pallas_kernels import dispatch
from pallas_kernels.kv_blocks import reference


def gather_blocks(
    arena: Float[Array, "rows page_size kv_heads head_dim"],
    pages: Int32[Array, " blocks"],
    *,
    rows_per_page: int,
    implementation: str = "auto",
) -> Float[Array, "blocks rows_per_page page_size kv_heads head_dim"]:
    """Copies Full Blocks out of the arena.

    Args:
      arena: page-major rows; page p is the rows `[p * rows_per_page, (p + 1) * rows_per_page)`.
      pages: page ids; an id past the last page gives an undefined block (padding).
      rows_per_page: rows of a page: two (K, V) a layer.
      implementation: "auto" or "xla".

    Raises:
      ValueError: the arena is not a whole number of pages.
    """
    _check(arena.shape[0], rows_per_page)
    return dispatch.run("gather_blocks", {"xla": reference.gather_blocks}, implementation, arena, pages, rows_per_page)


def scatter_blocks(
    arena: Float[Array, "rows page_size kv_heads head_dim"],
    pages: Int32[Array, " blocks"],
    blocks: Float[Array, "blocks rows_per_page page_size kv_heads head_dim"],
    *,
    implementation: str = "auto",
) -> Float[Array, "rows page_size kv_heads head_dim"]:
    """Copies Full Blocks into the arena; in place where the arena is donated.

    Args:
      arena: page-major rows; page p is the rows `[p * rows_per_page, (p + 1) * rows_per_page)`.
      pages: page ids, no two alike; a block whose id is past the last page is dropped (padding).
      blocks: the contents.
      implementation: "auto" or "xla".

    Raises:
      ValueError: the arena is not a whole number of pages.
    """
    _check(arena.shape[0], blocks.shape[1])
    return dispatch.run("scatter_blocks", {"xla": reference.scatter_blocks}, implementation, arena, pages, blocks)


def _check(rows: int, rows_per_page: int) -> None:
    if rows_per_page < 1 or rows % rows_per_page:
        raise ValueError(f"arena of {rows=} is not a whole number of pages of {rows_per_page=}")
