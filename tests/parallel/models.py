"""Small random models that can be split in many ways."""

from __future__ import annotations

import dataclasses
import functools

import models
from models.config import ModelConfig, MoEConfig, RopeConfig

CONFIGS = {
    "moe": ModelConfig(
        family="qwen3_moe",
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_layers=3,
        num_heads=8,
        num_kv_heads=4,
        head_dim=8,
        rope=RopeConfig(theta=1e4),
        max_position_embeddings=256,
        qk_norm=True,
        moe=MoEConfig(
            num_experts=16,
            num_experts_per_tok=4,
            intermediate_size=24,
            norm_topk_prob=True,
            mlp_only_layers=(1,),
        ),
    ),
}
CONFIGS["dense"] = dataclasses.replace(
    CONFIGS["moe"],
    family="llama",
    vocab_size=95,  # not to be split evenly
    num_layers=2,
    tie_word_embeddings=True,
    qk_norm=False,
    moe=None,
)
CONFIGS["one_expert"] = dataclasses.replace(
    CONFIGS["moe"],
    moe=dataclasses.replace(CONFIGS["moe"].moe, num_experts_per_tok=1),  # type: ignore[type-var]
)
CONFIGS["six"] = dataclasses.replace(
    CONFIGS["moe"],
    moe=dataclasses.replace(CONFIGS["moe"].moe, num_experts=6),  # type: ignore[type-var]
)
CONFIGS["never_sparse"] = dataclasses.replace(
    CONFIGS["moe"],
    moe=dataclasses.replace(CONFIGS["moe"].moe, decoder_sparse_step=9),  # type: ignore[type-var]
)
CONFIGS["pruned"] = dataclasses.replace(
    CONFIGS["dense"], family="jaxdual_pruned", o_bias=True, mlp_bias=True, layer_intermediate_sizes=(48, 16)
)


@functools.cache
def model(name: str) -> models.Decoder:
    return models.init(CONFIGS[name], seed=7)
