"""jaxdual_iha: a Qwen3-style decoder whose layers have Interleaved Head Attention as a schedule says."""

from typing import Any

from flax import nnx
from jax.typing import DTypeLike

from models.config import IHAConfig, ModelConfig
from models.config_reader import ConfigReader
from models.hf_keys import read_common, read_layer_windows, read_window, require_equal, write_common, write_windows
from models.iha import InterleavedAttention
from models.layers import MLP, DecoderLayer
from models.tensors import TensorSource, attention_tensors, mlp_tensors


def read(reader: ConfigReader) -> ModelConfig:
    """The configuration in `config.json`; raises `ModelError` for what is not supported."""
    layers = reader.raw("iha_layers", None)
    bias = reader.boolean("attention_bias", False)
    return ModelConfig(
        **read_common(reader),
        layer_windows=read_layer_windows(reader, read_window(reader, None)),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=reader.boolean("qk_norm", False),
        iha=IHAConfig(
            pseudo_heads=reader.integer("iha_pseudo_heads"),
            layers=tuple(range(reader.integer("num_hidden_layers")))
            if layers is None
            else reader.integers("iha_layers"),
            mask=reader.text("iha_mask", "flat"),  # type: ignore[arg-type]  # checked there
            rope=reader.text("iha_rope", "virtual"),
            collapse=reader.text("iha_collapse", "global"),
        ),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    """The keys of `config.json`; raises ValueError for what they cannot express."""
    require_equal(config, o_bias=config.qkv_bias, mlp_bias=False, moe=None)
    iha = config.iha
    if iha is None:
        raise ValueError("iha is None; a jaxdual_iha checkpoint has Interleaved Head Attention in some layers")
    return (
        write_common(config)
        | write_windows(config)
        | {
            "attention_bias": config.qkv_bias,
            "qk_norm": config.qk_norm,
            "iha_pseudo_heads": iha.pseudo_heads,
            "iha_layers": list(iha.layers),
            "iha_mask": iha.mask,
            "iha_rope": iha.rope,
            "iha_collapse": iha.collapse,
        }
    )


def build_layer(config: ModelConfig, index: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> DecoderLayer:
    """Decoder layer `index`."""
    attention = InterleavedAttention(config, index, dtype=dtype, rngs=rngs) if config.has_iha(index) else None
    return DecoderLayer(config, MLP(config, dtype=dtype, rngs=rngs), dtype=dtype, rngs=rngs, attention=attention)


def layer_tensors(config: ModelConfig, index: int) -> dict[str, TensorSource]:
    """Checkpoint tensors of layer `index` by parameter path."""
    sources = attention_tensors(config, index) | mlp_tensors(config, index)
    if config.has_iha(index):
        for name, stored in (
            ("alpha_q", "iha_alpha_q"),
            ("alpha_k", "iha_alpha_k"),
            ("alpha_v", "iha_alpha_v"),
            ("collapse_weights", "iha_collapse"),
        ):
            sources[f"attention.{name}"] = TensorSource((f"model.layers.{index}.self_attn.{stored}",), wide=True)
    return sources
