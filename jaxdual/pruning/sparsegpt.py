"""SparseGPT (Frantar and Alistarh 2023): weights go column by column, and those to the right make up for it."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from jaxdual.pruning.moments import DAMPING, Moments
from jaxdual.pruning.pattern import Pattern

BLOCK = 128  # columns whose errors are passed on together, and whose weights are compared


def sparsegpt(
    weights: Float[Array, "outputs inputs"],
    moments: Moments,
    pattern: Pattern,
    *,
    scale: Float32[Array, " inputs"] | None = None,
    block: int = BLOCK,
    damping: float = DAMPING,
) -> tuple[Float32[Array, "outputs inputs"], Bool[Array, "outputs inputs"]]:
    """New weights, and which of them stayed.

    Args:
      weights: of one matrix.
      moments: of its inputs, with all products.
      pattern: with N of M, which ones go is chosen anew at every M-th column, from weights that have changed already; a
        share is taken of all rows of a block.
      scale: what the saliency of each input's weights counts, squared; None for one each.
      block: columns; of a pattern N:M a multiple of M is taken.
      damping: see `moments.DAMPING`.
    """
    inputs = weights.shape[1]
    factor, dead = moments.inverse_factor(damping)
    scales = jnp.ones(inputs) if scale is None else scale
    rest = jnp.where(dead[None, :], 0.0, weights.astype(jnp.float32))
    if pattern.share is None:
        block = max(block // pattern.of, 1) * pattern.of
    done, masks = [], []
    for start in range(0, inputs, block):
        part = slice(start, min(start + block, inputs))
        changed, errors, kept = _sweep(rest[:, part], factor[part, part], scales[part], pattern)
        rest = rest.at[:, part.stop :].add(
            -jnp.matmul(errors, factor[part, part.stop :], precision=jax.lax.Precision.HIGHEST)
        )
        done.append(changed)
        masks.append(kept)
    return jnp.concatenate(done, axis=1), jnp.concatenate(masks, axis=1)


@partial(jax.jit, static_argnames="pattern")
def _sweep(
    weights: Float32[Array, "outputs columns"],
    factor: Float32[Array, "columns columns"],
    scales: Float32[Array, " columns"],
    pattern: Pattern,
) -> tuple[Float32[Array, "outputs columns"], Float32[Array, "outputs columns"], Bool[Array, "outputs columns"]]:
    """Weights of a block, the errors that the columns behind it make up for, and which weights stayed."""
    of_columns = scales**2 / jnp.diagonal(factor) ** 2
    width = weights.shape[1]
    kept = jnp.ones(weights.shape, bool)
    if pattern.share is not None:
        kept = pattern.kept(weights**2 * of_columns, "matrix")

    def column(j: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        weights, errors, kept = state
        if pattern.share is None:

            def choose(kept: Array) -> Array:
                part = jax.lax.dynamic_slice_in_dim(weights, j, pattern.of, axis=1)
                saliency = part**2 * jax.lax.dynamic_slice_in_dim(of_columns, j, pattern.of)
                return jax.lax.dynamic_update_slice_in_dim(kept, pattern.kept(saliency, "row"), j, axis=1)

            kept = jax.lax.cond(j % pattern.of == 0, choose, lambda kept: kept, kept)
        now = weights[:, j]
        error = jnp.where(kept[:, j], 0.0, now) / factor[j, j]
        # Columns to the left have their final values: the factor is zero there.
        weights = weights - error[:, None] * factor[j][None, :]
        weights = weights.at[:, j].set(jnp.where(kept[:, j], now, 0.0))
        return weights, errors.at[:, j].set(error), kept

    swept: tuple[Array, Array, Array] = jax.lax.fori_loop(0, width, column, (weights, jnp.zeros_like(weights), kept))
    return swept
