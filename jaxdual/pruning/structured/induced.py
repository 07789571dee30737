"""Scales of neurons, learned before neurons go: Sparsity Induction for whole columns of the down projection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jaxdual.pruning.induction.settings import Induction
from jaxdual.pruning.induction.training import Problem, batched, learn_scales
from jaxdual.pruning.linears import MLP_OUT, Linear
from jaxdual.pruning.methods import Method
from jaxdual.pruning.moments import Moments
from jaxdual.pruning.pattern import Pattern
from jaxdual.pruning.scores import norms
from jaxdual.pruning.ways import Example
from models import ModelConfig
from models.rope import Rope

_DOWN = Linear("mlp.down.kernel", MLP_OUT)


def _column_norms(weights: Float[Array, "outputs neurons"]) -> Float32[Array, "outputs neurons"]:
    """The same for all outputs, which then lose the same neurons."""
    return jnp.broadcast_to(jnp.linalg.norm(weights.astype(jnp.float32), axis=0), weights.shape)


# The importance of neurons as a score.
_NEURONS = Method(_column_norms, norms, 1.0)


def learn_neuron_scales(
    layer: Any,
    config: ModelConfig,
    window: int | None,
    moments: Moments,
    keep: int,
    induction: Induction,
    rope: Rope,
    examples: Sequence[Example],
    held_out: Sequence[Example],
) -> Float[Array, " neurons"]:
    """What the importance of each neuron counts; that of the epoch with the least error on held-out text.

    Learned with neurons masked and nothing fitted anew.

    Args:
      layer: with a dense MLP.
      config, window: of the model, and the layer's sliding window.
      moments: of the neurons.
      keep: neurons that stay.
      induction: how scales are learned, in mode "score".
      rope: of one window of text.
      examples, held_out: a window each, to learn from and to choose by.
    """
    neurons = moments.first.shape[0]
    # Half a neuron more, so that no rounding loses one.
    pattern = Pattern(share=(neurons - keep + 0.5) / neurons)
    together = batched(examples, induction.batch)
    problem = Problem(
        config,
        window,
        _NEURONS,
        pattern,
        induction,
        len(together) * induction.epochs,
        ((_DOWN.path, _DOWN.kind),),
    )
    first = {_DOWN.kind: jnp.ones((1, neurons))}
    return learn_scales(layer, problem, [_DOWN], {MLP_OUT: moments}, first, rope, together, held_out)[_DOWN.kind][0]
