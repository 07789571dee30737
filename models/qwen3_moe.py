"""Qwen3-MoE: Qwen3 attention, and in all or some layers a mixture of experts in place of the MLP."""

from typing import Any

from flax import nnx
from jax.typing import DTypeLike

from models.config import ModelConfig, MoEConfig
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
from models.moe import MoE
from models.tensors import TensorSource, attention_tensors, mlp_tensors, moe_tensors


def read(reader: ConfigReader) -> ModelConfig:
    """The configuration in `config.json`; raises `ModelError` for what is not supported."""
    window, full_layers = read_switched_window(reader), reader.integer("max_window_layers", 0)
    if window is not None and full_layers and not reader.has("layer_types"):
        raise reader.error("max_window_layers", f"is {full_layers}, which versions of transformers read differently")
    bias = reader.boolean("attention_bias", False)
    common = read_common(reader)
    moe = MoEConfig(
        num_experts=_read_num_experts(reader),
        num_experts_per_tok=reader.integer("num_experts_per_tok"),
        intermediate_size=reader.integer("moe_intermediate_size"),
        norm_topk_prob=reader.boolean("norm_topk_prob", False),
        decoder_sparse_step=reader.integer("decoder_sparse_step", 1),
        mlp_only_layers=reader.integers("mlp_only_layers"),
    )
    windows = read_layer_windows(reader, window)
    return ModelConfig(**common, layer_windows=windows, qkv_bias=bias, o_bias=bias, qk_norm=True, moe=moe)


def _read_num_experts(reader: ConfigReader) -> int:
    """`num_experts` in transformers 4, `num_local_experts` in transformers 5."""
    if not reader.has("num_local_experts"):
        return reader.integer("num_experts")
    count = reader.integer("num_local_experts")
    if reader.integer("num_experts", count) != count:
        raise reader.error("num_experts", f"is {reader.integer('num_experts')}, but num_local_experts is {count}")
    return count


def write(config: ModelConfig) -> dict[str, Any]:
    """The keys of `config.json`; raises ValueError for what they cannot express."""
    require_equal(config, o_bias=config.qkv_bias, qk_norm=True, mlp_bias=False)
    moe = config.moe
    if moe is None:
        raise ValueError("moe is None; a qwen3_moe checkpoint needs a mixture of experts")
    return (
        write_common(config)
        | write_switched_windows(config)
        | {
            "attention_bias": config.qkv_bias,
            "decoder_sparse_step": moe.decoder_sparse_step,
            "mlp_only_layers": list(moe.mlp_only_layers),
            "moe_intermediate_size": moe.intermediate_size,
            "norm_topk_prob": moe.norm_topk_prob,
            "num_experts": moe.num_experts,
            "num_experts_per_tok": moe.num_experts_per_tok,
        }
    )


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
