"""Which weights take up a scale, so that a layer stays the same function: pairs of a producer and a consumer.

The consumer's columns are multiplied, the producer's rows divided. Table of pairs: OmniQuant and AWQ, with grouped
heads, rotary pairs, query and key norms, biases and experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdual.pruning.linears import ATTENTION, ATTENTION_OUT, MLP, MLP_OUT
from models import ModelConfig

type Parameters = dict[str, Array]
type Scales = Mapping[str, Float[Array, "_stack _size"]]

# Pairs, by what the scale lives on. Those that belong to a group of inputs have its name.
QUERIES = "queries"


def scale_sizes(config: ModelConfig, parameters: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Shapes `(stack, size)` of the scales that a layer takes; the stack is that of experts, or 1.

    Keys: `ATTENTION` and `MLP`, the outputs of the norms; `ATTENTION_OUT`, values; `QUERIES`, rotary pairs of query and
    key channels; `MLP_OUT`, hidden channels of the MLP. Models with norms of queries and keys, which would undo such a
    scale, have no `QUERIES`.
    """
    hidden = parameters["attention_norm.scale"].shape[0]
    sizes = {
        ATTENTION: (1, hidden),
        ATTENTION_OUT: (1, parameters["attention.v.kernel"].shape[1]),
        MLP: (1, hidden),
        MLP_OUT: _hidden_channels(parameters),
    }
    if not config.qk_norm:
        sizes[QUERIES] = (1, parameters["attention.k.kernel"].shape[1] // 2)
    return sizes


def _hidden_channels(parameters: Mapping[str, Any]) -> tuple[int, int]:
    if "mlp.down.kernel" in parameters:
        return 1, parameters["mlp.down.kernel"].shape[0]
    experts, channels, _ = parameters["mlp.experts.down"].shape
    return experts, channels


def absorb(config: ModelConfig, parameters: Mapping[str, Any], scales: Scales) -> Parameters:
    """The parameters of a layer with scales in them; its function is the same.

    Args:
      config: of the model.
      parameters: of the layer, by path (`parameters_of`).
      scales: positive, of the shapes of `scale_sizes`; those that are left out are one.

    Returns:
      All parameters, by path.

    Raises:
      ValueError: a scale that the model can't take.
    """
    out = dict(parameters)

    def multiply(path: str, factor: Array) -> None:
        if path in out:
            out[path] = out[path] * factor

    if unknown := set(scales) - {ATTENTION, ATTENTION_OUT, MLP, MLP_OUT} - ({QUERIES} if not config.qk_norm else set()):
        raise ValueError(f"scales {sorted(unknown)}: a layer of the family {config.family} can't take them")
    if ATTENTION in scales:
        scale = scales[ATTENTION][0]
        multiply("attention_norm.scale", 1 / scale)
        for name in ("q", "k", "v"):
            multiply(f"attention.{name}.kernel", scale[:, None])
    if QUERIES in scales:
        keys, queries = _of_rotary_pairs(config, scales[QUERIES][0])
        for name, factor in (("q", queries), ("k", 1 / keys)):
            multiply(f"attention.{name}.kernel", factor)
            multiply(f"attention.{name}.bias", factor)
    if ATTENTION_OUT in scales:
        values = scales[ATTENTION_OUT][0]
        multiply("attention.v.kernel", 1 / values)
        multiply("attention.v.bias", 1 / values)
        multiply("attention.o.kernel", of_query_heads(config, values)[:, None])
    if MLP in scales:
        scale = scales[MLP][0]
        multiply("mlp_norm.scale", 1 / scale)
        for path in ("mlp.gate.kernel", "mlp.up.kernel", "mlp.router.kernel", "mlp.experts.gate", "mlp.experts.up"):
            multiply(path, scale[:, None])
    if MLP_OUT in scales:
        channels = scales[MLP_OUT]
        multiply("mlp.up.kernel", 1 / channels[0])
        multiply("mlp.up.bias", 1 / channels[0])
        multiply("mlp.down.kernel", channels[0][:, None])
        multiply("mlp.experts.up", 1 / channels[:, None, :])
        multiply("mlp.experts.down", channels[:, :, None])
    return out


def input_scales(config: ModelConfig, scales: Scales) -> dict[str, Float[Array, "_stack _inputs"]]:
    """What `absorb` divides the inputs of each group of matrices by."""
    found = {group: scales[group] for group in (ATTENTION, MLP, MLP_OUT) if group in scales}
    if ATTENTION_OUT in scales:
        found[ATTENTION_OUT] = of_query_heads(config, scales[ATTENTION_OUT][0])[None]
    return found


def of_query_heads(config: ModelConfig, values: Float[Array, " kv"]) -> Float[Array, " heads"]:
    """Channels of values as those of the attention's output: each head once for every query head of its group."""
    heads = values.reshape(config.num_kv_heads, 1, config.head_dim)
    return jnp.repeat(heads, config.num_heads // config.num_kv_heads, axis=1).reshape(-1)


def _of_rotary_pairs(config: ModelConfig, pairs: Float[Array, " half"]) -> tuple[Array, Array]:
    """Scales of key channels and of query channels: both halves of a rotated pair have one."""
    halves = pairs.reshape(config.num_kv_heads, config.head_dim // 2)
    keys = jnp.concatenate([halves, halves], axis=1).reshape(-1)
    return keys, of_query_heads(config, keys)
