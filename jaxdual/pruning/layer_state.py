"""Parameters of a decoder layer by path, whatever their shapes become."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from models.shapes import parameters_of


def write_layer(layer: nnx.Module, parameters: Mapping[str, ArrayLike]) -> None:
    """Puts parameters in place, in the type of the layer; those that it doesn't have yet, biases, are added."""
    dtype = next(iter(parameters_of(layer).values())).dtype
    for path, value in parameters.items():
        *parts, last = path.split(".")
        owner: Any = layer
        for part in parts:
            owner = getattr(owner, part)
        # A bias that wasn't there is a static None until it is told to be data.
        setattr(owner, last, nnx.data(nnx.Param(jnp.asarray(value, dtype))))
