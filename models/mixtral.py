"""Mixtral: Mistral attention, and in every layer a mixture of experts whose chosen weights sum to one."""

from typing import Any

from flax import nnx
from jax.typing import DTypeLike

from models.config import ModelConfig, MoEConfig
from models.config_reader import ConfigReader
from models.hf_keys import (
    read_common,
    read_layer_windows,
    read_window,
    require_equal,
    write_common,
    write_windows,
)
from models.layers import DecoderLayer
from models.moe import MoE
from models.tensors import TensorSource, attention_tensors, moe_tensors

DEFAULT_KV_HEADS = 8
DEFAULT_THETA = 1e6
DEFAULT_EPS = 1e-5
DEFAULT_EXPERTS = 8
DEFAULT_EXPERTS_PER_TOKEN = 2
EXPERT_NAMES = {"gate": "w1", "up": "w3", "down": "w2"}


def read(reader: ConfigReader) -> ModelConfig:
    """The configuration in `config.json`; raises `ModelError` for what is not supported."""
    common = read_common(
        reader, default_kv_heads=DEFAULT_KV_HEADS, default_theta=DEFAULT_THETA, default_eps=DEFAULT_EPS
    )
    moe = MoEConfig(
        num_experts=reader.integer("num_local_experts", DEFAULT_EXPERTS),
        num_experts_per_tok=reader.integer("num_experts_per_tok", DEFAULT_EXPERTS_PER_TOKEN),
        intermediate_size=common["intermediate_size"],
        norm_topk_prob=True,
    )
    return ModelConfig(**common, layer_windows=read_layer_windows(reader, read_window(reader, None)), moe=moe)


def write(config: ModelConfig) -> dict[str, Any]:
    """The keys of `config.json`; raises ValueError for what they cannot express."""
    moe = config.moe
    if moe is None:
        raise ValueError("moe is None; a mixtral checkpoint needs a mixture of experts")
    expected = MoEConfig(
        num_experts=moe.num_experts,
        num_experts_per_tok=moe.num_experts_per_tok,
        intermediate_size=config.intermediate_size,
        norm_topk_prob=True,
    )
    require_equal(config, qkv_bias=False, o_bias=False, mlp_bias=False, qk_norm=False, moe=expected)
    return (
        write_common(config)
        | write_windows(config)
        | {"num_local_experts": moe.num_experts, "num_experts_per_tok": moe.num_experts_per_tok}
    )


def build_layer(config: ModelConfig, index: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> DecoderLayer:
    """Decoder layer `index`; all are sparse."""
    if config.moe is None:
        raise ValueError("moe is None; a mixtral model needs a mixture of experts")
    return DecoderLayer(config, MoE(config.moe, config.hidden_size, dtype=dtype, rngs=rngs), dtype=dtype, rngs=rngs)


def layer_tensors(config: ModelConfig, index: int) -> dict[str, TensorSource]:
    """Checkpoint tensors of layer `index` by parameter path."""
    if config.moe is None:
        raise ValueError("moe is None; a mixtral checkpoint needs a mixture of experts")
    return attention_tensors(config, index) | moe_tensors(
        config.moe, f"model.layers.{index}.block_sparse_moe", EXPERT_NAMES
    )
