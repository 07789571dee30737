"""Tiny models with sliding windows, made from a seed, and their forward pass in plain float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from models import ModelConfig
from tests import seeded_models
from tests.seeded_models import SIZES

WINDOW = 20
KINDS: dict[str, tuple[int | None, ...]] = {
    "mistral": (WINDOW, WINDOW, WINDOW),
    "mistral_mixed": (WINDOW, None, WINDOW),
    "mistral_full": (),
}


def config_of(name: str) -> ModelConfig:
    """Configuration of the model called `name` in `KINDS`."""
    return ModelConfig(
        family="mistral",
        layer_windows=KINDS[name],
        **SIZES,
    )


def write(name: str, folder: Path, seed: int = 7) -> Path:
    """Makes the checkpoint of model `name`: random weights large enough that attention looks at something."""
    return seeded_models.write(config_of(name), folder, seed)


def reference_logits(folder: Path, config: ModelConfig, tokens: Sequence[int]) -> np.ndarray:
    """Logits `[length, vocab]` of one sequence in float64, straight from the tensors of the file.

    Attention is written as a loop over queries that looks at keys `p - window + 1 .. p`, as transformers defines it.
    """
    weights = {key: value.astype(np.float64) for key, value in load_file(folder / "model.safetensors").items()}
    x = weights["model.embed_tokens.weight"][np.asarray(tokens)]
    windows = config.layer_windows or (None,) * config.num_layers
    for layer, window in enumerate(windows):
        part = {
            key.removeprefix(f"model.layers.{layer}."): value
            for key, value in weights.items()
            if key.startswith(f"model.layers.{layer}.")
        }
        x = x + _attention(part, config, _norm(x, part["input_layernorm.weight"], config.rms_norm_eps), window)
        y = _norm(x, part["post_attention_layernorm.weight"], config.rms_norm_eps)
        gate = y @ part["mlp.gate_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ part["mlp.up_proj.weight"].T)) @ part["mlp.down_proj.weight"].T
    return _norm(x, weights["model.norm.weight"], config.rms_norm_eps) @ weights["lm_head.weight"].T


def _norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def _attention(part: Mapping[str, np.ndarray], config: ModelConfig, x: np.ndarray, window: int | None) -> np.ndarray:
    length, dim = len(x), config.head_dim
    q, k, v = (
        (x @ part[f"self_attn.{name}_proj.weight"].T).reshape(length, heads, dim)
        for name, heads in (("q", config.num_heads), ("k", config.num_kv_heads), ("v", config.num_kv_heads))
    )
    angles = np.arange(length)[:, None] / config.rope.theta ** (np.arange(0, dim, 2) / dim)[None, :]
    turn = np.exp(1j * angles)[:, None, :]
    q, k = (_rotate(y, turn) for y in (q, k))
    out = np.zeros_like(q)
    for position in range(length):
        first = 0 if window is None else max(0, position - window + 1)
        for head in range(config.num_heads):
            group = head // (config.num_heads // config.num_kv_heads)
            scores = k[first : position + 1, group] @ q[position, head] / np.sqrt(dim)
            shares = np.exp(scores - scores.max())
            out[position, head] = shares / shares.sum() @ v[first : position + 1, group]
    return out.reshape(length, -1) @ part["self_attn.o_proj.weight"].T


def _rotate(x: np.ndarray, turn: np.ndarray) -> np.ndarray:
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate([turned.real, turned.imag], axis=-1)
