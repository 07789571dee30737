"""Small models whose projections follow a pattern, dense with zeros and packed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import models
from jaxdual.pruning.pack import packed_form, packed_model
from jaxdual.pruning.pattern import Pattern
from models import Decoder
from models.packed_config import projections
from models.shapes import parameters_of, with_parameters
from tests.pruned_models import KINDS as PRUNED
from tests.pruned_models import random_model

# Packed models by name: what is packed, and the pattern. Of the mixture's sparse layer the experts stay dense.
KINDS = {
    "packed_2_4": ("pruned", "2:4"),
    "packed_4_8": ("pruned_moe", "4:8"),
    "packed_blocks": ("pruned_window", "0.5@16"),
}


def dense(name: str, seed: int = 7) -> Decoder:
    """The model with zeros where the pattern has none."""
    kind, text = KINDS[name]
    config = dataclasses.replace(PRUNED[kind], intermediate_size=48, layer_intermediate_sizes=(16, 48, 32))
    model, pattern = random_model(config, seed), Pattern.parse(text)
    parameters = parameters_of(model)
    for layer in range(config.num_layers):
        for path in projections(config, layer):
            kernel = parameters[f"layers.{layer}.{path}.kernel"]
            kept = pattern.kept(jnp.abs(kernel.T), "row").T
            parameters[f"layers.{layer}.{path}.kernel"] = jnp.where(kept, kernel, 0)
    return with_parameters(config, parameters)


def packed(name: str, seed: int = 7) -> Decoder:
    """The same model packed."""
    return packed_model(dense(name, seed), packed_form(KINDS[name][1]))


def write(name: str, folder: Path) -> Path:
    """Makes the checkpoint of packed model `name`."""
    models.save(packed(name), folder, dtype="float32")
    return folder


def projection_bytes(model: Decoder) -> int:
    """Of the weights of projections, packed or not."""
    ends = tuple(f"{path}." for path in projections(model.config, model.config.num_layers - 1))
    return sum(
        value.nbytes
        for path, value in parameters_of(model).items()
        if any(end in path for end in ends) and not path.endswith(".bias") and "experts" not in path
    )


def tokens(seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(96, size=(2, 40))
