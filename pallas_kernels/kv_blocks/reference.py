"""Block moves in plain XLA."""

from __future__ import annotations

from jaxtyping import Array, Int32, Shaped


def gather_blocks(
    arena: Shaped[Array, "rows page_size kv_heads head_dim"], ids: Int32[Array, " blocks"], *, rows_per_block: int
) -> Shaped[Array, "blocks rows_per_block page_size kv_heads head_dim"]:
    """See `api.gather_blocks`; padding gives some block of the arena."""
    return arena.reshape(-1, rows_per_block, *arena.shape[1:])[ids]


def scatter_blocks(
    arena: Shaped[Array, "rows page_size kv_heads head_dim"],
    ids: Int32[Array, " blocks"],
    blocks: Shaped[Array, "blocks rows_per_block page_size kv_heads head_dim"],
) -> Shaped[Array, "rows page_size kv_heads head_dim"]:
    """See `api.scatter_blocks`."""
    by_block = arena.reshape(-1, blocks.shape[1], *arena.shape[1:])
    placed = by_block.at[ids].set(blocks.astype(arena.dtype), mode="drop", wrap_negative_indices=False)
    return placed.reshape(arena.shape)
