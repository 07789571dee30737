"""Scales to begin with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxdual.pruning.induction.absorb import scale_sizes
from jaxdual.pruning.induction.settings import Induction, Start
from jaxdual.pruning.linears import ATTENTION_OUT, Linear
from jaxdual.pruning.moments import Moments
from models import ModelConfig
from models.shapes import parameters_of

_RMS_POWER = 0.5  # of the root mean square: half-way from magnitudes to Wanda's scores
_PAPER_MOST = 8.0
_LEAST = 1e-12


def first_scales(
    layer: nnx.Module,
    config: ModelConfig,
    linears: Sequence[Linear],
    moments: Mapping[str, Moments],
    settings: Induction,
    samples: Mapping[str, Float[Array, "T inputs"]],
) -> dict[str, Float[Array, "_stack _size"]]:
    """Scales of the inputs of each kind of group, or in mode "fold" those that a layer takes up.

    Args:
      layer, config: of the model.
      linears, moments: of the layer.
      settings: with `start` chosen.
      samples: inputs of each group at some tokens; looked at by the start "paper" only.
    """
    groups: dict[str, list[str]] = {}
    for one in linears:
        of_kind = groups.setdefault(one.kind, [])
        if one.group not in of_kind:
            of_kind.append(one.group)
    start = settings.start or "ones"
    levels = {
        kind: jnp.stack([_levels(start, moments[group], samples.get(group)) for group in of_kind])
        for kind, of_kind in groups.items()
    }
    if settings.mode == "score":
        return levels
    return {
        key: _shared(levels[key], shape, config.head_dim if key == ATTENTION_OUT else None)
        if key in levels
        else jnp.ones(shape)
        for key, shape in scale_sizes(config, parameters_of(layer)).items()
    }


def _levels(start: Start, moments: Moments, sample: Float[Array, "T inputs"] | None) -> Float[Array, " inputs"]:
    if start == "ones" or (sample is not None and not len(sample)):
        return jnp.ones(moments.first.shape)
    if start == "rms":
        means = moments.squares / jnp.maximum(moments.tokens, 1)
        return _over_geometric_mean(jnp.maximum(means, _LEAST) ** (_RMS_POWER / 2))
    if sample is None:
        raise ValueError("the start 'paper' needs samples of inputs")
    off = jnp.square(jnp.median(sample, axis=0) - jnp.mean(sample, axis=0))
    return jnp.clip(_over_geometric_mean(jnp.maximum(off, _LEAST)), 1 / _PAPER_MOST, _PAPER_MOST)


def _over_geometric_mean(levels: Float[Array, " inputs"]) -> Float[Array, " inputs"]:
    return levels / jnp.exp(jnp.mean(jnp.log(levels)))


def _shared(
    levels: Float[Array, "groups inputs"], shape: tuple[int, int], head_dim: int | None
) -> Float[Array, "_stack _size"]:
    """Geometric means over the groups and query heads that one scale is for."""
    logs = jnp.log(levels)
    if shape[0] == 1:
        logs = jnp.mean(logs, axis=0, keepdims=True)
    if head_dim is not None:
        logs = jnp.mean(logs.reshape(shape[1] // head_dim, -1, head_dim), axis=1).reshape(1, -1)
    return jnp.exp(logs)
