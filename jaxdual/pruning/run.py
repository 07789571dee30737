"""Pruning of a whole model, layer by layer: each is looked at behind those that were pruned before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int32

from jaxdual.pruning import scores
from jaxdual.pruning.linears import Linear, linears_of, with_inputs
from jaxdual.pruning.moments import Moments
from jaxdual.pruning.pattern import Pattern, Scope
from jaxdual.pruning.sparsegpt import sparsegpt
from models import Decoder
from models.attention import dense_attend
from models.layers import LayerAttend
from models.rope import Rope


@dataclass(frozen=True, slots=True)
class Method:
    """A pruner.

    Attributes:
      score: of weights, of which the lowest go; None for a method that chooses as it goes.
      scope: what a share of the weights is taken of.
      whole: it needs all products of inputs.
    """

    score: Callable[[Array, Moments], Array] | None
    scope: Scope = "row"
    whole: bool = False


METHODS = {
    "magnitude": Method(scores.magnitude, "matrix"),
    "wanda": Method(scores.wanda),
    "ria": Method(scores.ria),
    "sparsegpt": Method(None, whole=True),
}


@dataclass(frozen=True, slots=True)
class PrunedMatrix:
    """What became of a matrix.

    Attributes:
      layer, name: which one.
      removed, weights: how many of how many.
      error: mean square of the change of its outputs on the calibration text, relative to that of the outputs.
    """

    layer: int
    name: str
    removed: int
    weights: int
    error: float


def check(model: Decoder, pattern: Pattern) -> None:
    """Raises `ValueError` if a model can't be pruned so, before any work is done."""
    for index, layer in enumerate(model.layers):
        for linear in linears_of(model.config, index):
            pattern.check(f"{linear.name} of layer {index}", linear.read(layer).shape[1])


def prune_model(
    model: Decoder,
    windows: Int32[np.ndarray, "N L"],
    method: Method,
    pattern: Pattern,
    *,
    first: int = 0,
    done: Callable[[int, Sequence[PrunedMatrix]], None] = lambda layer, matrices: None,
) -> None:
    """Prunes all layers of a model in place.

    Beside the model, the moments of one layer and the residual stream of the text are held.

    Args:
      model: its embedding, head, norms and biases stay as they are.
      windows: calibration text, rows of tokens.
      method, pattern: how, and what.
      first: layers before it are pruned already.
      done: is told of each layer.

    Raises:
      ValueError: a model or a pattern that doesn't fit.
    """
    check(model, pattern)
    streams = [model.embed(jnp.asarray(window)) for window in windows]
    rope = model.rope(jnp.arange(windows.shape[1]))
    for index, layer in enumerate(model.layers):
        linears, window = linears_of(model.config, index), model.config.window_of(index)
        if index >= first:
            graph, state = nnx.split(layer)
            moments = {one.group: Moments.none(one.read(layer).shape[1], whole=method.whole) for one in linears}
            for x in streams:
                moments = _with_inputs(graph, window, state, moments, x, rope)
            done(index, [_prune(layer, index, one, moments[one.group], method, pattern) for one in linears])
        graph, state = nnx.split(layer)
        streams = [_forward(graph, window, state, x, rope) for x in streams]


# Layers that are alike share their programs.


@partial(jax.jit, static_argnames=("graph", "window"))
def _with_inputs(
    graph: Any, window: int | None, state: Any, moments: dict[str, Moments], x: Float[Array, "T D"], rope: Rope
) -> dict[str, Moments]:
    return with_inputs(moments, nnx.merge(graph, state), x, rope, _attend(window, x.shape[0]))


@partial(jax.jit, static_argnames=("graph", "window"))
def _forward(graph: Any, window: int | None, state: Any, x: Float[Array, "T D"], rope: Rope) -> Float[Array, "T D"]:
    out: Array = nnx.merge(graph, state)(x, rope, _attend(window, x.shape[0]), None)[0]
    return out


def _attend(window: int | None, length: int) -> LayerAttend:
    return partial(dense_attend(1, length, (window,)), 0)


def _prune(
    layer: nnx.Module, index: int, linear: Linear, moments: Moments, method: Method, pattern: Pattern
) -> PrunedMatrix:
    before = linear.read(layer)
    after, kept = prune_matrix(before, moments, method, pattern)
    linear.write(layer, after)
    return PrunedMatrix(index, linear.name, int(jnp.sum(~kept)), kept.size, _error(before, after, moments))


def prune_matrix(
    weights: Float[Array, "outputs inputs"], moments: Moments, method: Method, pattern: Pattern
) -> tuple[Float32[Array, "outputs inputs"], Bool[Array, "outputs inputs"]]:
    """New weights of a matrix, and which of them stayed."""
    if method.score is None:
        return sparsegpt(weights, moments, pattern)
    kept = pattern.kept(method.score(weights, moments), method.scope)
    return jnp.where(kept, weights, 0).astype(jnp.float32), kept


def _error(before: Array, after: Array, moments: Moments) -> float:
    """With the squares of inputs alone, as if they were independent."""

    def mean_square(weights: Array) -> Array:
        wide = weights.astype(jnp.float32)
        if moments.second.ndim == 1:
            return jnp.sum(wide**2 * moments.second)
        return jnp.sum((wide @ moments.second) * wide)

    return float(mean_square(after.astype(jnp.float32) - before) / jnp.maximum(mean_square(before), 1e-30))
