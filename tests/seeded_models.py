"""What the small models that tests make from a seed have in common: sizes, and how their weights are drawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

import models
from models import ModelConfig, RopeConfig

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "rope": RopeConfig(theta=10000.0),
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_ids": (2,),
}


def drawn(name: str, noise: np.ndarray) -> np.ndarray:
    """A parameter of normal noise, large enough that attention looks at something; norms are around one."""
    return 1.0 + 0.2 * noise if "norm" in name else 0.25 * noise


def write(
    config: ModelConfig,
    folder: Path,
    seed: int,
    value: Callable[[str, np.ndarray, np.ndarray], np.ndarray] = lambda key, first, noise: drawn(key, noise),
) -> Path:
    """Makes a checkpoint of random weights.

    Args:
      value: of a tensor, by its key, from the one of a new model and noise of its shape.
    """
    models.save(models.init(config), folder, dtype="float32")
    file, draw = folder / "model.safetensors", np.random.default_rng(seed)
    tensors = {
        key: value(key, first, draw.standard_normal(first.shape)).astype(np.float32)
        for key, first in sorted(load_file(file).items())
    }
    save_file(tensors, file, metadata={"format": "pt"})
    return folder
