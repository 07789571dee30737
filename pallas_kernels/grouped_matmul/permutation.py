"""Sorting tokens by expert and adding the results back up."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32


def dispatch(
    x: Float[Array, "T D"], experts: Int[Array, "T k"], num_experts: int
) -> tuple[Float[Array, "M D"], Int32[Array, " E"], Int32[Array, "M"]]:
    """Copy each token's row once for each of its experts, sorted by expert.

    Args:
      x: `[T, D]` one row a token.
      experts: `[T, k]` the experts of each token, below `num_experts`.
      num_experts: `E`.

    Returns:
      Rows `[T * k, D]`, rows per expert `[E]`, and for each row its place `token * k + choice`, for `combine`.

    Raises:
      ValueError: `experts` is not one row a token.
    """
    if experts.ndim != 2 or experts.shape[0] != x.shape[0]:
        raise ValueError(f"experts has shape {experts.shape}; [{x.shape[0]}, choices] is expected")
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    group_sizes = jnp.bincount(flat, length=num_experts).astype(jnp.int32)
    return x[order // experts.shape[1]], group_sizes, order


def combine(rows: Float[Array, "M D"], order: Int32[Array, "M"], weights: Float[Array, "T k"]) -> Float[Array, "T D"]:
    """Undo `dispatch`: the weighted sum of the rows of each token.

    Args:
      rows: `[T * k, D]` in the order of `dispatch`.
      order: third result of `dispatch`.
      weights: `[T, k]` weight of each choice.

    Raises:
      ValueError: `weights` does not have one entry a row.
    """
    if weights.ndim != 2 or weights.size != rows.shape[0]:
        raise ValueError(f"weights has shape {weights.shape}; [tokens, choices] with {rows.shape[0]} entries expected")
    choices = jnp.zeros_like(rows).at[order].set(rows).reshape(*weights.shape, -1)
    total = jnp.sum(choices.astype(jnp.float32) * weights[:, :, None].astype(jnp.float32), axis=1)
    return total.astype(rows.dtype)
