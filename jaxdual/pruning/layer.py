"""Pruning of one layer, in the several ways that are then chosen from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxdual.pruning.induction.absorb import Scales, absorb, input_scales
from jaxdual.pruning.induction.settings import Induction
from jaxdual.pruning.layer_state import write_layer
from jaxdual.pruning.linears import Linear
from jaxdual.pruning.methods import METHODS, Method, Update, prune_matrix
from jaxdual.pruning.moments import Moments
from jaxdual.pruning.pattern import Pattern
from models import ModelConfig
from models.shapes import parameters_of

# Of the calibration text, below which an expert is pruned by the size of its weights.
LEAST_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Plan:
    """How a model is pruned.

    Attributes:
      method, pattern: which weights go.
      update: what is done behind the method.
      induction: how scales are learned first; None for none.
      shift: outputs may get biases that make up for the means of what they lose.
    """

    method: Method
    pattern: Pattern
    update: Update | None = None
    induction: Induction | None = None
    shift: bool = False

    @property
    def whole(self) -> bool:
        """Whether all products of inputs are needed."""
        return self.method.whole or (self.update is not None and self.update.whole)


@dataclass(frozen=True, slots=True)
class PrunedMatrix:
    """What became of a matrix.

    Attributes:
      name: in its layer.
      removed, weights: how many were left out of how many.
      tokens: of the calibration text that went through it.
      error: mean square of the change of its outputs on the calibration text, relative to that of the outputs.
    """

    name: str
    removed: int
    weights: int
    tokens: int
    error: float


def prune_layer(
    layer: nnx.Module,
    config: ModelConfig,
    linears: Sequence[Linear],
    moments: Mapping[str, Moments],
    plan: Plan,
    *,
    scales: Scales | None = None,
    shift: bool = False,
) -> list[PrunedMatrix]:
    """Prunes a layer in place.

    Args:
      layer: as it was trained.
      config: of the model.
      linears: all of the layer.
      moments: of their inputs.
      plan: how.
      scales: learned ones, of the plan's mode; None for none.
      shift: whether outputs are shifted by the means of what they lose; experts' are not.
    """
    found: dict[str, Array] = {}
    if scales is not None and plan.induction is not None:
        if plan.induction.mode == "fold":
            write_layer(layer, absorb(config, parameters_of(layer), scales))
            divided = input_scales(config, scales)
            moments = {
                one.group: moments[one.group].divided(divided[one.kind][_place(one, divided)])
                if one.kind in divided
                else moments[one.group]
                for one in linears
            }
        else:
            found = {one.group: scales[one.kind][_place(one, scales)] for one in linears}
    pruned = []
    for one in linears:
        before = one.read(layer)
        seen = moments[one.group].centred if shift and one.expert is None else moments[one.group]
        # Nothing is known of an expert that hardly a token went to, so its smallest weights go.
        known = one.expert is None or float(seen.tokens) >= LEAST_TOKENS
        method, update = (plan.method, plan.update) if known else (METHODS["magnitude"], None)
        after, kept = prune_matrix(before, seen, method, plan.pattern, update=update, scale=found.get(one.group))
        one.write(layer, after)
        if shift and one.expert is None:
            one.shift(layer, (before - after) @ moments[one.group].means)
        removed, tokens = int(jnp.sum(~kept)), int(seen.tokens)
        pruned.append(PrunedMatrix(one.name, removed, kept.size, tokens, _error(before, after, seen)))
    return pruned


def _place(linear: Linear, scales: Mapping[str, Array]) -> int:
    """Where the scales of a matrix lie in their stack."""
    return linear.expert if linear.expert is not None and scales[linear.kind].shape[0] > 1 else 0


def _error(before: Float[Array, "outputs inputs"], after: Float[Array, "outputs inputs"], moments: Moments) -> float:
    """With the squares of inputs alone, as if they were independent."""

    def mean_square(weights: Any) -> Array:
        wide = weights.astype(jnp.float32)
        if moments.second.ndim == 1:
            return jnp.sum(wide**2 * moments.second)
        return jnp.sum((wide @ moments.second) * wide)

    return float(mean_square(after.astype(jnp.float32) - before) / jnp.maximum(mean_square(before), 1e-30))
