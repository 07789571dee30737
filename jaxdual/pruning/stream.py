"""The residual stream of calibration text through one layer, a window of it at a time.

Layers that are alike share their programs: their parameters are arguments.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxdual.pruning.linears import inputs_of, with_inputs
from jaxdual.pruning.moments import Moments
from models.attention import dense_attend
from models.layers import LayerAttend
from models.rope import Rope


def with_window(
    moments: dict[str, Moments], layer: nnx.Module, window: int | None, x: Float[Array, "T D"], rope: Rope
) -> dict[str, Moments]:
    """Moments of some groups of a layer's matrices with some more tokens.

    Args:
      moments: so far, by group.
      layer: of a decoder.
      window: sliding window of its attention in tokens, or None.
      x: residual stream before it, of one sequence.
      rope: of its positions.
    """
    graph, state = nnx.split(layer)
    found: dict[str, Moments] = _with_window(graph, window, moments, state, x, rope)
    return found


def behind(layer: nnx.Module, window: int | None, x: Float[Array, "T D"], rope: Rope) -> Float[Array, "T D"]:
    """The residual stream behind a layer; arguments as of `with_window`."""
    graph, state = nnx.split(layer)
    out: Array = _behind(graph, window, state, x, rope)
    return out


def attend_within(window: int | None, length: int) -> LayerAttend:
    """Attention of one sequence of `length` tokens over itself, for a layer with this window."""
    return partial(dense_attend(1, length, (window,)), 0)


def run_layer(layer: Any, window: int | None, x: Float[Array, "T D"], rope: Rope) -> Float[Array, "T D"]:
    """The stream behind a layer, traced by the caller, of sequences that are all as long as `rope`, which is of one."""
    length = rope.cos.shape[0]
    batch = x.shape[0] // length
    tiled = rope._replace(cos=jnp.tile(rope.cos, (batch, 1)), sin=jnp.tile(rope.sin, (batch, 1)))
    out: Array = layer(x, tiled, partial(dense_attend(batch, length, (window,)), 0), None)[0]
    return out


def inputs_behind(
    layer: nnx.Module, window: int | None, x: Float[Array, "T D"], rope: Rope
) -> dict[str, Float[Array, "_tokens _inputs"]]:
    """What each group of matrices is multiplied with, of tokens that count for it; arguments as of `with_window`."""
    graph, state = nnx.split(layer)
    found: dict[str, tuple[Array, Array]] = _inputs(graph, window, state, x, rope)
    return {group: inputs[np.asarray(counts) > 0] for group, (inputs, counts) in found.items()}


@partial(jax.jit, static_argnames=("graph", "window"))
def _inputs(
    graph: Any, window: int | None, state: Any, x: Float[Array, "T D"], rope: Rope
) -> dict[str, tuple[Array, Array]]:
    found = inputs_of(nnx.merge(graph, state), x, rope, attend_within(window, x.shape[0]))
    return {group: (inputs, jnp.ones(inputs.shape[0]) if counts is None else counts) for group, inputs, counts in found}


@partial(jax.jit, static_argnames=("graph", "window"))
def _with_window(
    graph: Any, window: int | None, moments: dict[str, Moments], state: Any, x: Float[Array, "T D"], rope: Rope
) -> dict[str, Moments]:
    return with_inputs(moments, nnx.merge(graph, state), x, rope, attend_within(window, x.shape[0]))


@partial(jax.jit, static_argnames=("graph", "window"))
def _behind(graph: Any, window: int | None, state: Any, x: Float[Array, "T D"], rope: Rope) -> Float[Array, "T D"]:
    return run_layer(nnx.merge(graph, state), window, x, rope)
