"""Best values of the weights that stay, by the alternating direction method of multipliers (Boža 2024)."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32

from jaxdual.pruning.moments import Moments
from jaxdual.pruning.pattern import Pattern

_ITERATIONS, _RHO = 20, 1.0
# Of the mean of the normalised Hessian's diagonal, added to it.
_DAMPING = 0.01


def admm(
    weights: Float[Array, "outputs inputs"],
    kept: Bool[Array, "outputs inputs"],
    moments: Moments,
    pattern: Pattern,
    *,
    iterations: int = _ITERATIONS,
) -> tuple[Float32[Array, "outputs inputs"], Bool[Array, "outputs inputs"]]:
    """New weights for a given choice, and the choice.

    With the Hessian H scaled to a diagonal of ones, W0 the weights scaled alike, and rho 1: `Z = kept (W + U)`,
    `U += W - Z`, `W = (H + rho)^-1 (H W0 + rho (Z - U))`.

    Args:
      weights: before anything was pruned.
      kept: which of them stay.
      moments: of the inputs, with all products.
      pattern: unused; the choice has it.
      iterations: steps; more come closer to least squares over the weights that stay.
    """
    del pattern
    hessian = np.asarray(moments.hessian, np.float64)
    norms = np.sqrt(np.diagonal(hessian))
    norms = np.where(norms > 0, norms, 1.0)
    hessian = hessian / np.outer(norms, norms) + _DAMPING * np.eye(len(norms))
    inverse = np.linalg.inv(hessian + _RHO * np.eye(len(norms)))
    scaled = np.asarray(weights, np.float64) * norms
    found = _iterate(
        jnp.asarray(scaled, jnp.float32),
        kept,
        jnp.asarray(scaled @ hessian @ inverse, jnp.float32),
        jnp.asarray(inverse, jnp.float32),
        iterations,
    )
    return found / jnp.asarray(norms, jnp.float32), kept


@partial(jax.jit, static_argnames="iterations")
def _iterate(
    weights: Float32[Array, "outputs inputs"],
    kept: Bool[Array, "outputs inputs"],
    target: Float32[Array, "outputs inputs"],
    inverse: Float32[Array, "inputs inputs"],
    iterations: int,
) -> Float32[Array, "outputs inputs"]:
    def step(_: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        now, dual = state
        sparse = jnp.where(kept, now + dual, 0.0)
        dual = dual + now - sparse
        moved = jnp.matmul(_RHO * (sparse - dual), inverse, precision=jax.lax.Precision.HIGHEST)
        return target + moved, dual

    now, dual = jax.lax.fori_loop(0, iterations, step, (weights * kept, jnp.zeros_like(weights)))
    return jnp.where(kept, now + dual, 0.0)
