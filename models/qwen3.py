"""Qwen3: like Llama, with an RMS norm over each head of q and k; the head width is a key of its own."""

from typing import Any

from flax import nnx
from jax.typing import DTypeLike

from models.config import ModelConfig
from models.config_reader import ConfigReader
from models.hf_keys import (
    read_common,
    read_layer_windows,
    read_switched_window,
    require_equal,
    write_common,
    write_switched_windows,
)
from models.layers import MLP, DecoderLayer
from models.tensors import TensorSource, attention_tensors, mlp_tensors

DEFAULT_HEAD_DIM = 128
DEFAULT_MAX_WINDOW_LAYERS = 28


def read(reader: ConfigReader) -> ModelConfig:
    """The configuration in `config.json`; raises `ModelError` for what is not supported."""
    full_layers = reader.integer("max_window_layers", DEFAULT_MAX_WINDOW_LAYERS)
    bias = reader.boolean("attention_bias", False)
    return ModelConfig(
        **read_common(reader, default_head_dim=DEFAULT_HEAD_DIM),
        layer_windows=read_layer_windows(reader, read_switched_window(reader), full_layers),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
    )


def write(config: ModelConfig) -> dict[str, Any]:
    """The keys of `config.json`; raises ValueError for what they cannot express."""
    require_equal(config, o_bias=config.qkv_bias, qk_norm=True, mlp_bias=False, moe=None)
    return write_common(config) | write_switched_windows(config) | {"attention_bias": config.qkv_bias}


def build_layer(config: ModelConfig, index: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> DecoderLayer:
    """Decoder layer `index`; all are alike."""
    return DecoderLayer(config, MLP(config, dtype=dtype, rngs=rngs), dtype=dtype, rngs=rngs)


def layer_tensors(config: ModelConfig, index: int) -> dict[str, TensorSource]:
    """Checkpoint tensors of layer `index` by parameter path."""
    return attention_tensors(config, index) | mlp_tensors(config, index)
