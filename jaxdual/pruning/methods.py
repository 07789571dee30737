"""The pruners: which weights of one matrix go, and what becomes of those that stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from jaxdual.pruning import scores
from jaxdual.pruning.admm import admm
from jaxdual.pruning.dsnot import dsnot
from jaxdual.pruning.moments import Moments
from jaxdual.pruning.pattern import Pattern, Scope
from jaxdual.pruning.sparsegpt import BLOCK, sparsegpt


@dataclass(frozen=True, slots=True)
class Method:
    """A pruner.

    Attributes:
      of_weights: part `[outputs, inputs]` of a score.
      of_inputs: part `[inputs]` that it is multiplied with.
      power: that part of an input which is divided by s is divided by `s ** power`.
      scope: what a share of the weights is taken of.
      whole: it needs all products of inputs.
      sweeps: scores are taken anew as the weights to the left change (SparseGPT).
    """

    of_weights: Callable[[Array], Array]
    of_inputs: Callable[[Moments], Array]
    power: float
    scope: Scope = "row"
    whole: bool = False
    sweeps: bool = False

    def score(self, weights: Float[Array, "outputs inputs"], moments: Moments) -> Float32[Array, "outputs inputs"]:
        """Of all weights as they are."""
        return self.of_weights(weights) * self.of_inputs(moments)

    @property
    def columns(self) -> int | None:
        """Inputs that are compared with each other; None for all."""
        return BLOCK if self.sweeps else None


METHODS = {
    "magnitude": Method(scores.size, scores.ones, 0.0, "matrix"),
    "wanda": Method(scores.size, scores.norms, 1.0),
    "ria": Method(scores.relative_size, scores.norm_roots, 0.5),
    "sparsegpt": Method(scores.size, scores.surgeon, 1.0, "matrix", whole=True, sweeps=True),
}


@dataclass(frozen=True, slots=True)
class Update:
    """What is done behind a pruner, from the weights before it and those that it left.

    Attributes:
      run: `(before, kept, moments, pattern)` to new weights, and which stay.
      whole: it needs all products of inputs.
      swaps: single weights change places.
    """

    run: Callable[[Array, Array, Moments, Pattern], tuple[Array, Array]]
    whole: bool = False
    swaps: bool = False


UPDATES = {"dsnot": Update(dsnot, swaps=True), "admm": Update(admm, whole=True)}


def prune_matrix(
    weights: Float[Array, "outputs inputs"],
    moments: Moments,
    method: Method,
    pattern: Pattern,
    *,
    update: Update | None = None,
    scale: Float32[Array, " inputs"] | None = None,
) -> tuple[Float32[Array, "outputs inputs"], Bool[Array, "outputs inputs"]]:
    """New weights of a matrix, and which of them stayed.

    Args:
      weights: of the trained model.
      moments: of its inputs.
      method, pattern, update: how, what, and what is done behind it.
      scale: what the score of each input's weights counts; None for one each.
    """
    if method.sweeps:
        after, kept = sparsegpt(weights, moments, pattern, scale=scale)
    else:
        score = method.score(weights, moments)
        kept = pattern.kept(score if scale is None else score * scale, method.scope)
        after = jnp.where(kept, weights, 0).astype(jnp.float32)
    return (after, kept) if update is None else update.run(weights, kept, moments, pattern)
