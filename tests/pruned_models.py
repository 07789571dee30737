"""Small models of the family jaxdual_pruned, made from a seed, and the same ones without uneven widths."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import models
from models import Decoder, ModelConfig, MoEConfig
from models.shapes import parameters_of, with_parameters
from tests.seeded_models import SIZES, drawn

_SIZES = ModelConfig(
    family="jaxdual_pruned",
    layer_intermediate_sizes=(16, 48, 8),
    **SIZES,
)
KINDS = {
    "pruned": dataclasses.replace(_SIZES, o_bias=True, mlp_bias=True, qk_norm=True),
    "pruned_window": dataclasses.replace(_SIZES, qkv_bias=True, tie_word_embeddings=True, layer_windows=(20, None, 20)),
    "pruned_moe": dataclasses.replace(
        _SIZES,
        mlp_bias=True,
        moe=MoEConfig(
            num_experts=5, num_experts_per_tok=2, intermediate_size=24, norm_topk_prob=True, mlp_only_layers=(0, 2)
        ),
    ),
}


def write(name: str, folder: Path, seed: int = 7) -> Path:
    """Makes the checkpoint of model `name`: random weights large enough that attention looks at something."""
    models.save(random_model(KINDS[name], seed), folder, dtype="float32")
    return folder


def random_model(config: ModelConfig, seed: int = 7) -> Decoder:
    """A model whose biases and norms are random as well."""
    draw = np.random.default_rng(seed)
    parameters = {}
    for path, value in sorted(parameters_of(models.init(config)).items()):
        noise = draw.standard_normal(value.shape)
        parameters[path] = jnp.asarray(drawn(path, noise), jnp.float32)
    return with_parameters(config, parameters)


def with_even_widths(model: Decoder) -> Decoder:
    """The same function with neurons of zeros in the narrower layers."""
    config = dataclasses.replace(model.config, layer_intermediate_sizes=())
    wanted = parameters_of(models.init(config))

    def padded(path: str, value: jax.Array) -> jax.Array:
        return jnp.pad(value, [(0, more - has) for more, has in zip(wanted[path].shape, value.shape, strict=True)])

    return with_parameters(config, {path: padded(path, value) for path, value in parameters_of(model).items()})
