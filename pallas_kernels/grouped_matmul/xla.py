"""A loop over blocks of rows that lie in one group: work in proportion to the rows, not to rows times groups.

`jax.lax.ragged_dot` is the obvious form, but on CPU it multiplies every row with every matrix.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

MAX_BLOCK_ROWS = 128


def grouped_matmul(
    lhs: Float[Array, "M K"], rhs: Float[Array, "E K N"], group_sizes: Int32[Array, " E"]
) -> Float[Array, "M N"]:
    """Blocks in ascending order, as many as are filled; see `api.grouped_matmul`."""
    rows, groups = lhs.shape[0], rhs.shape[0]
    if rows == 0 or groups == 0:
        return jnp.zeros((rows, rhs.shape[2]), lhs.dtype)
    block = block_rows(rows, groups)
    precision = jax.lax.Precision.HIGHEST if lhs.dtype == jnp.float32 else None
    ends = jnp.cumsum(group_sizes)
    blocks = -(-group_sizes // block)
    block_ends = jnp.cumsum(blocks)
    # The last block may reach past the last row: without room, dynamic_slice would move it back.
    padded = jnp.pad(lhs, ((0, block), (0, 0)))

    def body(index: Int32[Array, ""], out: Float[Array, "P N"]) -> Float[Array, "P N"]:
        group = jnp.searchsorted(block_ends, index, side="right")
        start = ends[group] - group_sizes[group] + (index - (block_ends[group] - blocks[group])) * block
        tile = jax.lax.dynamic_slice_in_dim(padded, start, block)
        weights = jax.lax.dynamic_index_in_dim(rhs, group, keepdims=False)
        product = jnp.dot(tile, weights, precision=precision)
        # Rows of the tile beyond the group belong to later blocks, which overwrite them, or to nobody.
        inside = start + jnp.arange(block) < ends[group]
        product = jnp.where(inside[:, None], product, 0)
        return jax.lax.dynamic_update_slice_in_dim(out, product, start, axis=0)

    out = jnp.zeros((rows + block, rhs.shape[2]), lhs.dtype)
    filled: jax.Array = jax.lax.fori_loop(0, block_ends[-1], body, out)
    return filled[:rows]


def block_rows(rows: int, groups: int) -> int:
    """Rows of one block: about an even share of a group, a power of two, at most `MAX_BLOCK_ROWS`."""
    share = -(-rows // groups)
    return min(MAX_BLOCK_ROWS, 1 << (share - 1).bit_length())
