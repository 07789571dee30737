"""Scores of weights, of which the lowest go: a part for each weight, times a part for each input."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jaxdual.pruning.moments import Moments

_RIA_POWER = 0.5


def size(weights: Float[Array, "outputs inputs"]) -> Float32[Array, "outputs inputs"]:
    """Absolute values."""
    return jnp.abs(weights).astype(jnp.float32)


def relative_size(weights: Float[Array, "outputs inputs"]) -> Float32[Array, "outputs inputs"]:
    """Shares of the sums of absolute values in their row and column (RIA, Zhang et al. 2024)."""
    sizes = size(weights)
    return sizes / _positive(sizes.sum(1, keepdims=True)) + sizes / _positive(sizes.sum(0, keepdims=True))


def ones(moments: Moments) -> Float32[Array, " inputs"]:
    """All inputs alike: they need no calibration."""
    return jnp.ones(moments.first.shape)


def norms(moments: Moments) -> Float32[Array, " inputs"]:
    """Norm of each input over all tokens (Wanda, Sun et al. 2023)."""
    return jnp.sqrt(moments.squares)


def norm_roots(moments: Moments) -> Float32[Array, " inputs"]:
    """Square root of that norm (RIA)."""
    return norms(moments) ** _RIA_POWER


def surgeon(moments: Moments) -> Float32[Array, " inputs"]:
    """`1 / U_jj` of the upper Cholesky factor of the inverse Hessian: roots of what SparseGPT multiplies `w^2` with."""
    factor, dead = moments.inverse_factor()
    return jnp.where(dead, 0.0, 1 / jnp.diagonal(factor))


def _positive(sums: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    return jnp.where(sums > 0, sums, 1)
