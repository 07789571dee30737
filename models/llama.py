"""Llama 1 to 3.x: grouped-query attention, gated MLP, optional biases, optionally stretched rotary positions."""

from typing import Any

from flax import nnx
from jax.typing import DTypeLike

from models.config import ModelConfig
from models.config_reader import ConfigReader
from models.hf_keys import read_common, read_layer_windows, require_equal, write_common
from models.layers import MLP, DecoderLayer
from models.tensors import TensorSource, attention_tensors, mlp_tensors


def read(reader: ConfigReader) -> ModelConfig:
    """The configuration in `config.json`; raises `ModelError` for what is not supported."""
    bias = reader.boolean("attention_bias", False)
    return ModelConfig(
        **read_common(reader),
        layer_windows=read_layer_windows(reader, None),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=reader.boolean("mlp_bias", False),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    """The keys of `config.json`; raises ValueError for what they cannot express."""
    require_equal(config, o_bias=config.qkv_bias, qk_norm=False, layer_windows=(), moe=None)
    return write_common(config) | {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}


def build_layer(config: ModelConfig, index: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> DecoderLayer:
    """Decoder layer `index`; all are alike."""
    return DecoderLayer(config, MLP(config, dtype=dtype, rngs=rngs), dtype=dtype, rngs=rngs)


def layer_tensors(config: ModelConfig, index: int) -> dict[str, TensorSource]:
    """Checkpoint tensors of layer `index` by parameter path."""
    return attention_tensors(config, index) | mlp_tensors(config, index)
