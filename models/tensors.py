"""Where parameters lie in a checkpoint of the Hugging Face layout: the names that the families share."""

from collections.abc import Mapping
from dataclasses import dataclass

from models.config import ModelConfig, MoEConfig


@dataclass(frozen=True, slots=True)
class TensorSource:
    """The checkpoint tensors that make up one parameter.

    Args:
      names: one tensor, or one for each index of the parameter's leading axis if `stacked`.
      transpose: a tensor holds `[out, in]`, the parameter `[in, out]`.
      stacked: the parameter is a stack of tensors (experts).
      wide: stored in float32, whatever the type of the others.
      integers: type of a tensor of integers; empty for floating-point numbers.
    """

    names: tuple[str, ...]
    transpose: bool = False
    stacked: bool = False
    wide: bool = False
    integers: str = ""


def model_tensors(config: ModelConfig) -> dict[str, TensorSource]:
    """Parameters outside the layers."""
    sources = {
        "embedding": TensorSource(("model.embed_tokens.weight",)),
        "norm.scale": TensorSource(("model.norm.weight",)),
    }
    if not config.tie_word_embeddings:
        sources["lm_head.kernel"] = TensorSource(("lm_head.weight",), transpose=True)
    return sources


def linear_tensors(path: str, name: str, *, bias: bool) -> dict[str, TensorSource]:
    """Parameters of the projection at `path`, stored as `name`.weight and `name`.bias."""
    sources = {f"{path}.kernel": TensorSource((f"{name}.weight",), transpose=True)}
    if bias:
        sources[f"{path}.bias"] = TensorSource((f"{name}.bias",))
    return sources


def attention_tensors(config: ModelConfig, index: int) -> dict[str, TensorSource]:
    """Parameters of the attention and the two norms of layer `index`."""
    prefix = f"model.layers.{index}"
    sources = {
        "attention_norm.scale": TensorSource((f"{prefix}.input_layernorm.weight",)),
        "mlp_norm.scale": TensorSource((f"{prefix}.post_attention_layernorm.weight",)),
    }
    for name in ("q", "k", "v"):
        sources |= linear_tensors(f"attention.{name}", f"{prefix}.self_attn.{name}_proj", bias=config.qkv_bias)
    sources |= linear_tensors("attention.o", f"{prefix}.self_attn.o_proj", bias=config.o_bias)
    if config.qk_norm:
        sources["attention.q_norm.scale"] = TensorSource((f"{prefix}.self_attn.q_norm.weight",))
        sources["attention.k_norm.scale"] = TensorSource((f"{prefix}.self_attn.k_norm.weight",))
    return sources


def mlp_tensors(config: ModelConfig, index: int) -> dict[str, TensorSource]:
    """Parameters of the dense MLP of layer `index`."""
    sources: dict[str, TensorSource] = {}
    for name in ("gate", "up", "down"):
        sources |= linear_tensors(f"mlp.{name}", f"model.layers.{index}.mlp.{name}_proj", bias=config.mlp_bias)
    return sources


def moe_tensors(moe: MoEConfig, prefix: str, names: Mapping[str, str]) -> dict[str, TensorSource]:
    """Parameters of a mixture of experts stored under `prefix`, experts one by one.

    Args:
      moe: how many experts.
      prefix: of the router ("gate") and the experts.
      names: how the checkpoint calls "gate", "up" and "down" of an expert.
    """
    experts = {
        f"mlp.experts.{name}": TensorSource(
            tuple(f"{prefix}.experts.{expert}.{stored}.weight" for expert in range(moe.num_experts)),
            transpose=True,
            stacked=True,
        )
        for name, stored in names.items()
    }
    return linear_tensors("mlp.router", f"{prefix}.gate", bias=False) | experts
