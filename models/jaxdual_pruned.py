"""jaxdual_pruned: a pruned decoder of another family, whose format can't express it.

Its dense MLPs may have a width each, and its projections may be packed. Whether there are biases is one choice for
queries, keys and values, one for the attention's output and one for MLPs, and norms of queries and keys are another.
"""

from dataclasses import asdict
from typing import Any

from flax import nnx
from jax.typing import DTypeLike

from models import qwen3_moe
from models.config import ModelConfig
from models.config_reader import ConfigReader
from models.hf_keys import (
    read_common,
    read_layer_windows,
    read_moe,
    read_window,
    require_equal,
    write_common,
    write_moe,
    write_windows,
)
from models.layers import MLP, DecoderLayer
from models.packed import pack_projections, packed_tensors
from models.packed_config import PackedConfig
from models.tensors import TensorSource


def read(reader: ConfigReader) -> ModelConfig:
    """The configuration in `config.json`; raises `ModelError` for what is not supported."""
    has_experts = reader.has("num_experts") or reader.has("num_local_experts")
    return ModelConfig(
        **read_common(reader),
        layer_windows=read_layer_windows(reader, read_window(reader, None)),
        layer_intermediate_sizes=reader.integers("layer_intermediate_sizes"),
        qkv_bias=reader.boolean("qkv_bias", False),
        o_bias=reader.boolean("o_bias", False),
        mlp_bias=reader.boolean("mlp_bias", False),
        qk_norm=reader.boolean("qk_norm", False),
        moe=read_moe(reader) if has_experts else None,
        packed=_read_packed(reader),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    """The keys of `config.json`; raises ValueError for what they cannot express."""
    require_equal(config, iha=None)
    keys = write_common(config, uneven=True) | write_windows(config)
    keys |= {name: getattr(config, name) for name in ("qkv_bias", "o_bias", "mlp_bias", "qk_norm")}
    if config.layer_intermediate_sizes:
        keys["layer_intermediate_sizes"] = list(config.layer_intermediate_sizes)
    if config.packed is not None:
        keys |= {f"packed_{name}": value for name, value in asdict(config.packed).items() if value}
    return keys if config.moe is None else keys | write_moe(config.moe)


def build_layer(config: ModelConfig, index: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> DecoderLayer:
    """Decoder layer `index`, sparse, or dense and of its own width."""
    if config.is_sparse(index):
        layer = qwen3_moe.build_layer(config, index, dtype=dtype, rngs=rngs)
    else:
        mlp = MLP(config, dtype=dtype, rngs=rngs, inner=config.intermediate_size_of(index))
        layer = DecoderLayer(config, mlp, dtype=dtype, rngs=rngs)
    pack_projections(config, index, layer, dtype=dtype, rngs=rngs)
    return layer


def layer_tensors(config: ModelConfig, index: int) -> dict[str, TensorSource]:
    """Checkpoint tensors of layer `index` by parameter path: those of Qwen3-MoE, and biases."""
    return packed_tensors(config, index, qwen3_moe.layer_tensors(config, index))


def _read_packed(reader: ConfigReader) -> PackedConfig | None:
    names = ("packed_keep", "packed_of", "packed_block", "packed_share")
    if not any(reader.has(name) for name in names):
        return None
    return PackedConfig(
        keep=reader.integer("packed_keep", 0),
        of=reader.integer("packed_of", 0),
        block=reader.integer("packed_block", 0),
        share=reader.number("packed_share", 0.0),
    )
