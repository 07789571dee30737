"""UniAttnS: all attention logits of a model divided by one temperature, by a copy of its weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax.numpy as jnp

from models import load, save

_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")


def scaled_copy(source: Path, out: Path, temperature: float, dtype: str = "auto") -> Path:
    """A model folder whose attention logits are those of `source`, divided by `temperature`.

    Logits are linear in queries, and rotations keep scales: the weights that queries come from are divided, those of
    their norm where the model has one. Weights are stored in the type that they are computed in.

    Args:
      source: a model folder.
      out: made; gets weights, configuration, tokenizer and what else there is.
      temperature: above 0.
      dtype: as for `models.load`.

    Returns:
      `out`.

    Raises:
      ValueError: a temperature out of range.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be above 0")
    model = load(source, dtype=dtype)
    for layer in model.layers:
        attention = layer.attention
        weights = [attention.q.kernel, attention.q.bias] if attention.q_norm is None else [attention.q_norm.scale]
        for one in weights:
            if one is not None:
                one[...] = one[...] / temperature
    out.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.endswith(_WEIGHT_SUFFIXES):
            shutil.copyfile(file, out / file.name)
    save(model, out, dtype=jnp.dtype(model.embedding[...].dtype).name)
    return out
