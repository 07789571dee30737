"""Rotary position embedding (Su et al., 2021) and its stretched forms: linear, llama3, YaRN (Peng et al., 2023)."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Float64, Int

from models.config import RopeConfig

# Digits of a position, and how many make up any number of 31 bits.
_BASE, _DIGITS = 256, 4


class Rope(NamedTuple):
    """Cosine and sine of the angles of some tokens.

    Attributes:
      cos, sin: `[T, head_dim / 2]` float32.
      virtual: the same at the tokens' places in the virtual sequence of their pseudo heads; None for models without.
    """

    cos: Float[Array, "T half"]
    sin: Float[Array, "T half"]
    virtual: "Rope | None" = None


def frequencies(config: RopeConfig, head_dim: int) -> Float32[np.ndarray, "half"]:
    """`exact_frequencies`, rounded once."""
    return exact_frequencies(config, head_dim).astype(np.float32)


def exact_frequencies(config: RopeConfig, head_dim: int) -> Float64[np.ndarray, "half"]:
    """Angle per position of each rotated pair, in radians.

    Args:
      config: which form, and its settings.
      head_dim: width of a head; `head_dim / 2` pairs.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    plain = config.theta**-exponents
    if config.type == "default":
        return plain
    if config.type == "linear":
        return plain / config.factor
    original = config.original_max_position_embeddings or 0
    kept: np.ndarray
    if config.type == "llama3":
        # Turns that a pair makes over the original context: few turns are stretched, many are kept.
        turns = original * plain / (2 * math.pi)
        kept = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    else:
        low = _pair_with_turns(config, head_dim, original, config.beta_fast)
        high = _pair_with_turns(config, head_dim, original, config.beta_slow)
        if config.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        # A ramp of no width would divide by zero.
        kept = 1.0 - (np.arange(head_dim // 2) - low) / (high - low if high != low else 0.001)
    share = np.clip(kept, 0.0, 1.0)
    mixed: np.ndarray = plain * share + plain / config.factor * (1.0 - share)
    return mixed


def _pair_with_turns(config: RopeConfig, head_dim: int, original: int, turns: float) -> float:
    """Index (not rounded) of the pair that makes `turns` turns over the original context."""
    return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.theta))


def attention_factor(config: RopeConfig) -> float:
    """Factor on cos and sin; it differs from 1 for YaRN only (section 3.4 of the paper: `0.1 ln(s) + 1`)."""
    if config.type != "yarn":
        return 1.0
    if config.attention_factor is not None:
        return config.attention_factor
    return 0.1 * math.log(config.factor) + 1.0


def rope_table(config: RopeConfig, head_dim: int, positions: Int[Array, "T"]) -> Rope:
    """Cosine and sine of every pair's angle at the given positions.

    Args:
      config: rotary settings.
      head_dim: width of a head.
      positions: `[T]`, from 0.

    Returns:
      Cosine and sine, the attention factor included.
    """
    angles = positions.astype(jnp.float32)[:, None] * frequencies(config, head_dim)[None, :]
    factor = attention_factor(config)
    return Rope(jnp.cos(angles) * factor, jnp.sin(angles) * factor)


def exact_rope_table(config: RopeConfig, head_dim: int, positions: Int[Array, "T"]) -> Rope:
    """`rope_table` for long ranges of positions, from tables that were made in float64.

    A float32 product of position and frequency is off by 0.005 rad at position 160,000; here an angle is the sum of
    those of the position's digits, each exact to float32.
    """
    factor = attention_factor(config)
    composed: Rope | None = None
    for digit in range(_DIGITS):
        table = angles_at(config, head_dim, np.arange(_BASE) * _BASE**digit)
        at = positions // _BASE**digit % _BASE
        part = Rope(table.cos[at], table.sin[at])
        composed = part if composed is None else turned(composed, part)
    assert composed is not None
    return Rope(composed.cos * factor, composed.sin * factor)


def angles_at(config: RopeConfig, head_dim: int, positions: Sequence[float] | np.ndarray) -> Rope:
    """Cosine and sine `[positions, head_dim / 2]` float32 at positions known now, without the attention factor."""
    angles = np.asarray(positions, np.float64)[:, None] * exact_frequencies(config, head_dim)
    return Rope(jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32))


def turned(rope: Rope, by: Rope) -> Rope:
    """Tables of the sums of angles; their shapes broadcast."""
    return Rope(rope.cos * by.cos - rope.sin * by.sin, rope.sin * by.cos + rope.cos * by.sin)


def rotate(x: Float[Array, "T H d"], rope: Rope) -> Float[Array, "T H d"]:
    """Rotate each pair `(x[i], x[i + d/2])` of every head by its angle, in float32 or wider.

    Args:
      x: `[T, heads, head_dim]`.
      rope: cos and sin from `rope_table`, each `[T, head_dim / 2]`.
    """
    cos, sin = (table[:, None, :] for table in rope[:2])
    first, second = jnp.split(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 2, axis=-1)
    rotated: jax.Array = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
