"""Tiny models with Interleaved Head Attention, made from a seed, and their forward pass in plain float64."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from models import ModelConfig
from models.config import IHAConfig
from tests import seeded_models
from tests.models.iha_oracle import collapsed, pseudo_outputs
from tests.seeded_models import SIZES, drawn

# Layers with and without it; windows that end within pages; all masks, rotary forms and collapses that differ in cache.
KINDS = {
    "iha": ((5, 5, None), IHAConfig(pseudo_heads=2, layers=(0, 1))),
    "iha_token": (
        (11, 11, 11),
        IHAConfig(pseudo_heads=3, layers=(0, 1, 2), mask="token", rope="scaled", collapse="per_head"),
    ),
    "iha_full": ((), IHAConfig(pseudo_heads=2, layers=(0, 1, 2))),
}


def config_of(name: str) -> ModelConfig:
    """Configuration of the model called `name` in `KINDS`."""
    windows, iha = KINDS[name]
    return ModelConfig(
        family="jaxdual_iha",
        qk_norm=name == "iha_token",
        layer_windows=windows,
        iha=iha,
        **SIZES,
    )


def write(name: str, folder: Path, seed: int = 7) -> Path:
    """Makes the checkpoint of model `name`: random weights large enough that attention looks at something."""

    def value(key: str, first: np.ndarray, noise: np.ndarray) -> np.ndarray:
        return first + 0.3 * noise if "iha_" in key else drawn(key, noise)

    return seeded_models.write(config_of(name), folder, seed, value)


def reference_logits(folder: Path, config: ModelConfig, tokens: Sequence[int]) -> np.ndarray:
    """Logits `[length, vocab]` of one sequence in float64, straight from the tensors of the file."""
    weights = {key: value.astype(np.float64) for key, value in load_file(folder / "model.safetensors").items()}
    x = weights["model.embed_tokens.weight"][np.asarray(tokens)]
    for layer in range(config.num_layers):
        part = {
            key.removeprefix(f"model.layers.{layer}."): value
            for key, value in weights.items()
            if key.startswith(f"model.layers.{layer}.")
        }
        x = x + _attention(part, config, _norm(x, part["input_layernorm.weight"], config.rms_norm_eps), layer)
        y = _norm(x, part["post_attention_layernorm.weight"], config.rms_norm_eps)
        gate = y @ part["mlp.gate_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ part["mlp.up_proj.weight"].T)) @ part["mlp.down_proj.weight"].T
    return _norm(x, weights["model.norm.weight"], config.rms_norm_eps) @ weights["lm_head.weight"].T


def _attention(part: dict[str, np.ndarray], config: ModelConfig, x: np.ndarray, layer: int) -> np.ndarray:
    q, k, v = (
        (x @ part[f"self_attn.{name}_proj.weight"].T).reshape(len(x), -1, config.head_dim) for name in ("q", "k", "v")
    )
    if config.qk_norm:
        q = _norm(q, part["self_attn.q_norm.weight"], config.rms_norm_eps)
        k = _norm(k, part["self_attn.k_norm.weight"], config.rms_norm_eps)
    iha = config.iha
    assert iha is not None
    if layer in iha.layers:
        alphas = [part[f"self_attn.iha_alpha_{name}"] for name in ("q", "k", "v")]
        form, weights = {"mask": iha.mask, "rope": iha.rope}, part["self_attn.iha_collapse"]
    else:  # one pseudo head that is its own head
        own = np.eye(config.num_heads)[:, :, None]
        shared = np.repeat(np.eye(config.num_kv_heads), config.num_heads // config.num_kv_heads, axis=1)[:, :, None]
        alphas, form, weights = [own, shared, shared], {"mask": "token", "rope": "token"}, own
    out = pseudo_outputs(q, k, v, *alphas, window=config.window_of(layer), theta=config.rope.theta, **form)
    return collapsed(out, weights).reshape(len(x), -1) @ part["self_attn.o_proj.weight"].T


def _norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale
