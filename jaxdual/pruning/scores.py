"""Scores of weights, of which the lowest go: weights `[outputs, inputs]` and moments of their inputs to `[same]`."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jaxdual.pruning.moments import Moments

_RIA_POWER = 0.5


def magnitude(weights: Float[Array, "outputs inputs"], moments: Moments) -> Float32[Array, "outputs inputs"]:
    """Absolute values; they need no calibration."""
    return jnp.abs(weights).astype(jnp.float32)


def wanda(weights: Float[Array, "outputs inputs"], moments: Moments) -> Float32[Array, "outputs inputs"]:
    """Absolute values times the norm of their input over all tokens (Sun et al. 2023)."""
    return jnp.abs(weights).astype(jnp.float32) * jnp.sqrt(moments.squares)


def ria(weights: Float[Array, "outputs inputs"], moments: Moments) -> Float32[Array, "outputs inputs"]:
    """Shares of the sums of their row and column, times a power of the norm of their input (Zhang et al. 2024)."""
    size = jnp.abs(weights).astype(jnp.float32)
    relative = size / _positive(size.sum(1, keepdims=True)) + size / _positive(size.sum(0, keepdims=True))
    return relative * jnp.sqrt(moments.squares) ** _RIA_POWER


def _positive(sums: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    return jnp.where(sums > 0, sums, 1)
