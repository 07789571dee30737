"""Block moves in plain XLA."""

from __future__ import annotations

from jaxtyping import Array, Float, Int32


def gather_blocks(
    arena: Float[Array, "rows page_size kv_heads head_dim"], pages: Int32[Array, " blocks"], rows_per_page: int
) -> Float[Array, "blocks rows_per_page page_size kv_heads head_dim"]:
    """See `api.gather_blocks`."""
    return arena.reshape(-1, rows_per_page, *arena.shape[1:])[pages]


def scatter_blocks(
    arena: Float[Array, "rows page_size kv_heads head_dim"],
    pages: Int32[Array, " blocks"],
    blocks: Float[Array, "blocks rows_per_page page_size kv_heads head_dim"],
) -> Float[Array, "rows page_size kv_heads head_dim"]:
    """See `api.scatter_blocks`."""
    by_page = arena.reshape(-1, blocks.shape[1], *arena.shape[1:])
    return by_page.at[pages].set(blocks.astype(arena.dtype), mode="drop").reshape(arena.shape)
