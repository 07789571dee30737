"""How many neurons each layer keeps, where those go that are missed least."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxdual.pruning.moments import Moments
from jaxdual.pruning.structured.plan import MULTIPLE
from jaxdual.pruning.structured.refit import refit, relative_error, second_moments
from jaxdual.pruning.structured.removal import most_important, neuron_importance

POINTS = 16  # widths of a layer whose error is measured; between them it is interpolated


@dataclass(frozen=True, slots=True)
class ErrorCurve:
    """What a layer loses by its number of neurons.

    Attributes:
      widths: ascending, the last is all of them.
      errors: for each, mean square of the change of the MLP's output behind the refit, relative to the residual stream
        behind the layer; 0 for the last.
    """

    widths: tuple[int, ...]
    errors: tuple[float, ...]

    def at(self, width: int) -> float:
        """The error of any width from the first to the last."""
        return float(np.interp(width, self.widths, self.errors))


def error_curve(
    layer: Any,
    moments: Moments,
    stream: float,
    *,
    shift: bool = False,
) -> ErrorCurve:
    """Measures a dense layer.

    Args:
      layer, moments, shift: as of `neuron_importance`.
      stream: mean square of the norm of the residual stream behind the layer.
    """
    weights = np.asarray(layer.mlp.down.kernel[...], np.float64).T
    size = weights.shape[1]
    importance = neuron_importance(layer, moments, shift=shift)
    products, _ = second_moments(moments)
    output = float(np.sum(weights @ products * weights))
    step = max(size // POINTS // MULTIPLE, 1) * MULTIPLE
    widths = [*range(MULTIPLE, size, step), size]
    errors = []
    for width in widths[:-1]:
        kept = most_important(importance, width)
        after, _ = refit(weights, kept, moments, shift=shift)
        errors.append(relative_error(weights, after, kept, moments, shift=shift) * output / stream)
    return ErrorCurve(tuple(widths), (*errors, 0.0))


def allocate(curves: Mapping[int, ErrorCurve], total: int) -> dict[int, int]:
    """Neurons of each layer, at the least sum of errors that taking `MULTIPLE` at a time from one layer comes to.

    Args:
      curves: by layer.
      total: neurons that stay, of all these layers; a layer keeps `MULTIPLE` at least.

    Raises:
      ValueError: fewer than that.
    """
    if total < MULTIPLE * len(curves):
        raise ValueError(f"{total} neurons are too few for {len(curves)} layers of {MULTIPLE} at least")
    widths = {layer: curve.widths[-1] for layer, curve in curves.items()}
    # Sizes that are no multiples lose what is over as their first step.
    while sum(widths.values()) > total:
        costs = {
            layer: (curves[layer].at(smaller) - curves[layer].at(width)) / (width - smaller)
            for layer, width in widths.items()
            if (smaller := _below(width)) >= MULTIPLE
        }
        layer = min(costs, key=costs.__getitem__)
        widths[layer] = _below(widths[layer])
    return widths


def _below(width: int) -> int:
    return (width - 1) // MULTIPLE * MULTIPLE
