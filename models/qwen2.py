"""Qwen2 and 2.5: like Llama, with biases on q, k and v only; sliding windows in the last layers if turned on."""

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

DEFAULT_KV_HEADS = 32
DEFAULT_MAX_WINDOW_LAYERS = 28


def read(reader: ConfigReader) -> ModelConfig:
    """The configuration in `config.json`; raises `ModelError` for what is not supported."""
    full_layers = reader.integer("max_window_layers", DEFAULT_MAX_WINDOW_LAYERS)
    return ModelConfig(
        **read_common(reader, default_kv_heads=DEFAULT_KV_HEADS),
        layer_windows=read_layer_windows(reader, read_switched_window(reader), full_layers),
        qkv_bias=True,
    )


def write(config: ModelConfig) -> dict[str, Any]:
    """The keys of `config.json`; raises ValueError for what they cannot express."""
    require_equal(config, qkv_bias=True, o_bias=False, mlp_bias=False, qk_norm=False, moe=None)
    return write_common(config) | write_switched_windows(config)


def build_layer(config: ModelConfig, index: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> DecoderLayer:
    """Decoder layer `index`; all are alike."""
    return DecoderLayer(config, MLP(config, dtype=dtype, rngs=rngs), dtype=dtype, rngs=rngs)


def layer_tensors(config: ModelConfig, index: int) -> dict[str, TensorSource]:
    """Checkpoint tensors of layer `index` by parameter path."""
    return attention_tensors(config, index) | mlp_tensors(config, index)
