"""Sorting tokens by expert and adding the results back up."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32

from pallas_kernels.checks import check_array, show


def dispatch(
    x: Float[Array, "T D"], experts: Int[Array, "T k"], num_experts: int
) -> tuple[Float[Array, "M D"], Int32[Array, " E"], Int32[Array, "M"]]:
    """Copy each token's row once for each of its experts, sorted by expert.

    Args:
      x: `[T, D]` one row a token.
      experts: `[T, k]` the experts of each token, from 0 to `num_experts - 1`; what others give is undefined.
      num_experts: `E`, at least 1.

    Returns:
      Rows `[T * k, D]`, rows per expert `[E]`, and for each row its place `token * k + choice`, for `combine`.

    Raises:
      ValueError: shapes or types that don't fit, or no expert to choose.
    """
    check_array("x", x, jnp.floating, ("T", "D"))
    check_array("experts", experts, jnp.integer, (x.shape[0], "k"))
    if experts.shape[1] < 1 or num_experts < 1:
        raise ValueError(f"each token must have an expert, and of at least 1: {show(experts)}, {num_experts=}")
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    group_sizes = jnp.bincount(flat, length=num_experts).astype(jnp.int32)
    return x[order // experts.shape[1]], group_sizes, order


def combine(rows: Float[Array, "M D"], order: Int32[Array, "M"], weights: Float[Array, "T k"]) -> Float[Array, "T D"]:
    """Undo `dispatch`: the weighted sum of the rows of each token.

    Args:
      rows: `[T * k, D]` in the order of `dispatch`.
      order: third result of `dispatch`.
      weights: `[T, k]` weight of each choice. That it is not `[k, T]` can't be seen from its size: `T` is nowhere else.

    Raises:
      ValueError: types that don't fit, or `weights` does not have one entry a row.
    """
    check_array("rows", rows, jnp.floating, ("M", "D"))
    check_array("order", order, jnp.int32, rows.shape[:1])
    check_array("weights", weights, jnp.floating, ("T", "k"))
    if weights.size != rows.shape[0]:
        raise ValueError(f"weights must have {rows.shape[0]} entries, one a row: {show(weights)}")
    choices = jnp.zeros_like(rows).at[order].set(rows).reshape(*weights.shape, -1)
    total = jnp.sum(choices.astype(jnp.float32) * weights[:, :, None].astype(jnp.float32), axis=1)
    return total.astype(rows.dtype)
