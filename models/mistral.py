"""Mistral: like Llama without biases, with a sliding window in all layers, in those of `layer_types`, or in none."""

from typing import Any

from flax import nnx
from jax.typing import DTypeLike

from models.config import ModelConfig
from models.config_reader import ConfigReader
from models.hf_keys import (
    DEFAULT_WINDOW,
    read_common,
    read_layer_windows,
    read_window,
    require_equal,
    write_common,
    write_windows,
)
from models.layers import MLP, DecoderLayer
from models.tensors import TensorSource, attention_tensors, mlp_tensors

DEFAULT_KV_HEADS = 8


def read(reader: ConfigReader) -> ModelConfig:
    """The configuration in `config.json`; raises `ModelError` for what is not supported."""
    return ModelConfig(
        **read_common(reader, default_kv_heads=DEFAULT_KV_HEADS),
        layer_windows=read_layer_windows(reader, read_window(reader, DEFAULT_WINDOW)),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    """The keys of `config.json`; raises ValueError for what they cannot express."""
    require_equal(config, qkv_bias=False, o_bias=False, mlp_bias=False, qk_norm=False, moe=None)
    return write_common(config) | write_windows(config)


def build_layer(config: ModelConfig, index: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> DecoderLayer:
    """Decoder layer `index`; all are alike but for their window, which is the caller's `attend` to apply."""
    return DecoderLayer(config, MLP(config, dtype=dtype, rngs=rngs), dtype=dtype, rngs=rngs)


def layer_tensors(config: ModelConfig, index: int) -> dict[str, TensorSource]:
    """Checkpoint tensors of layer `index` by parameter path."""
    return attention_tensors(config, index) | mlp_tensors(config, index)
