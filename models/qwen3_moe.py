"""Qwen3-MoE: Qwen3 attention, and in all or some layers a mixture of experts in place of the MLP."""

from typing import Any

from flax import nnx
from jax.typing import DTypeLike

from models.config import ModelConfig
from models.config_reader import ConfigReader
from models.hf_keys import (
    read_common,
    read_layer_windows,
    read_moe,
    read_switched_window,
    require_equal,
    write_common,
    write_moe,
    write_switched_windows,
)
from models.layers import MLP, DecoderLayer
from models.moe import MoE
from models.tensors import TensorSource, attention_tensors, mlp_tensors, moe_tensors


def read(reader: ConfigReader) -> ModelConfig:
    """The configuration in `config.json`; raises `ModelError` for what is not supported."""
    window, full_layers = read_switched_window(reader), reader.integer("max_window_layers", 0)
    if window is not None and full_layers and not reader.has("layer_types"):
        raise reader.error("max_window_layers", f"is {full_layers}, which versions of transformers read differently")
    bias = reader.boolean("attention_bias", False)
    common, moe = read_common(reader), read_moe(reader)
    windows = read_layer_windows(reader, window)
    return ModelConfig(**common, layer_windows=windows, qkv_bias=bias, o_bias=bias, qk_norm=True, moe=moe)


def write(config: ModelConfig) -> dict[str, Any]:
    """The keys of `config.json`; raises ValueError for what they cannot express."""
    require_equal(config, o_bias=config.qkv_bias, qk_norm=True, mlp_bias=False)
    if config.moe is None:
        raise ValueError("moe is None; a qwen3_moe checkpoint needs a mixture of experts")
    keys = write_common(config) | write_switched_windows(config) | write_moe(config.moe)
    return keys | {"attention_bias": config.qkv_bias}


def build_layer(config: ModelConfig, index: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> DecoderLayer:
    """Decoder layer `index`, sparse or dense as the configuration says."""
    mlp: nnx.Module
    if config.moe is not None and config.is_sparse(index):
        mlp = MoE(config.moe, config.hidden_size, dtype=dtype, rngs=rngs)
    else:
        mlp = MLP(config, dtype=dtype, rngs=rngs)
    return DecoderLayer(config, mlp, dtype=dtype, rngs=rngs)


def layer_tensors(config: ModelConfig, index: int) -> dict[str, TensorSource]:
    """Checkpoint tensors of layer `index` by parameter path; experts are stored one by one."""
    if config.moe is None or not config.is_sparse(index):
        return attention_tensors(config, index) | mlp_tensors(config, index)
    names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    return attention_tensors(config, index) | moe_tensors(config.moe, f"model.layers.{index}.mlp", names)
