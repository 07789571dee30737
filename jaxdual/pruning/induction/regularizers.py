"""Regularizers of learned scales: both look at the largest singular values of scaled weights."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdual.pruning.induction.settings import Regularizer

_STEPS = 3  # of the power iteration, from where the step before ended


def first_vectors(
    weights: Mapping[str, Float[Array, "_stack _outputs _inputs"]],
) -> dict[str, Float[Array, "_stack _inputs"]]:
    """Where the power iteration begins: for each matrix the direction that its columns' norms point to."""
    return {path: _unit(jnp.sqrt(jnp.sum(jnp.square(matrix), axis=1))) for path, matrix in weights.items()}


def regularizer(
    kind: Regularizer,
    weights: Mapping[str, Float[Array, "_stack _outputs _inputs"]],
    vectors: Mapping[str, Float[Array, "_stack _inputs"]],
    alpha: Float[Array, ""],
) -> tuple[Float[Array, ""], dict[str, Float[Array, "_stack _inputs"]]]:
    """Its value, and vectors for the next step.

    Args:
      kind: which one, not "none".
      weights: scaled weights of all matrices.
      vectors: from the step before, or `first_vectors`.
      alpha: of the paper's; see `alpha_of`.
    """
    norms, after = _spectral_norms(weights, vectors)
    if kind == "paper":
        return jnp.exp(-alpha * sum(jnp.sum(norm) for norm in norms.values())), after
    ranks = [
        jnp.mean(jnp.sum(jnp.square(weights[path]), axis=(1, 2)) / jnp.square(norm)) / min(weights[path].shape[1:])
        for path, norm in norms.items()
    ]
    return sum(ranks, jnp.float32(0)) / len(ranks), after


def alpha_of(
    weights: Mapping[str, Float[Array, "_stack _outputs _inputs"]],
    vectors: Mapping[str, Float[Array, "_stack _inputs"]],
) -> Float[Array, ""]:
    """One over the sum of the spectral norms at the start: elsewhere the paper's exponential has no gradient."""
    norms, _ = _spectral_norms(weights, vectors)
    return 1 / sum((jnp.sum(norm) for norm in norms.values()), jnp.float32(0))


def _spectral_norms(
    weights: Mapping[str, Array], vectors: Mapping[str, Array]
) -> tuple[dict[str, Float[Array, " _stack"]], dict[str, Float[Array, "_stack _inputs"]]]:
    norms, after = {}, {}
    for path, matrix in weights.items():
        fixed, right = jax.lax.stop_gradient(matrix), vectors[path]
        for _ in range(_STEPS):
            left = _unit(jnp.einsum("soi,si->so", fixed, right))
            right = _unit(jnp.einsum("soi,so->si", fixed, left))
        norms[path], after[path] = jnp.einsum("so,soi,si->s", left, matrix, right), right
    return norms, after


def _unit(vectors: Float[Array, "stack n"]) -> Float[Array, "stack n"]:
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-30)
