"""The residual stream of calibration text through one layer, a window of it at a time.

Layers that are alike share their programs: their parameters are arguments.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from jaxdual.pruning.linears import with_inputs
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


@partial(jax.jit, static_argnames=("graph", "window"))
def _with_window(
    graph: Any, window: int | None, moments: dict[str, Moments], state: Any, x: Float[Array, "T D"], rope: Rope
) -> dict[str, Moments]:
    return with_inputs(moments, nnx.merge(graph, state), x, rope, attend_within(window, x.shape[0]))


@partial(jax.jit, static_argnames=("graph", "window"))
def _behind(graph: Any, window: int | None, state: Any, x: Float[Array, "T D"], rope: Rope) -> Float[Array, "T D"]:
    out: Array = nnx.merge(graph, state)(x, rope, attend_within(window, x.shape[0]), None)[0]
    return out
