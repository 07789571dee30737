"""One bidirectional layer with learned positions, of plain or Interleaved Head Attention: what the tasks train."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from bench.iha.attention import Mixing, attend
from models.layers import RMSNorm

NOISE = 0.1  # of mixing weights at the start
_EPS = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """Shape of an `Encoder`.

    Args:
      symbols, positions: of the input.
      outputs: numbers for each token.
      width: of the residual stream; `heads * head_dim`.
      inner: of the MLP.
      heads: H.
      pseudo_heads: P; 0 for plain attention.
    """

    symbols: int
    positions: int
    outputs: int
    width: int
    inner: int
    heads: int
    pseudo_heads: int = 0

    @property
    def name(self) -> str:
        return f"IHA H={self.heads} P={self.pseudo_heads}" if self.pseudo_heads else f"MHA H={self.heads}"


class Affine(nnx.Module):
    """`x @ kernel + bias`, with normal weights that keep the size of what they are given."""

    def __init__(self, inputs: int, outputs: int, rng: np.random.Generator) -> None:
        self.kernel = _normal(rng, (inputs, outputs), inputs**-0.5)
        self.bias = nnx.Param(jnp.zeros(outputs))

    def __call__(self, x: Float[Array, "*rows inputs"]) -> Float[Array, "*rows outputs"]:
        return x @ self.kernel[...] + self.bias[...]


class Encoder(nnx.Module):
    """Embedding, attention, an MLP with GELU, each behind a norm and beside the residual stream, and a head."""

    def __init__(self, config: EncoderConfig, seed: int) -> None:
        rng = np.random.default_rng(seed)
        width = config.width
        self.symbols = _normal(rng, (config.symbols, width), 1.0)
        self.positions = _normal(rng, (config.positions, width), 1.0)
        self.q, self.k, self.v, self.o = (Affine(width, width, rng) for _ in range(4))
        self.up, self.down = Affine(width, config.inner, rng), Affine(config.inner, width, rng)
        self.head = Affine(width, config.outputs, rng)
        self.attention_norm, self.mlp_norm, self.head_norm = (
            RMSNorm(width, eps=_EPS, dtype=jnp.float32) for _ in range(3)
        )
        self.mixing = Mixing.initial(config.heads, config.pseudo_heads, NOISE, rng) if config.pseudo_heads else None
        self.heads = config.heads

    def __call__(
        self, symbols: Int[Array, "B N"], valid: Bool[Array, "B N"] | None = None
    ) -> Float[Array, "B N outputs"]:
        """Outputs of each token.

        Args:
          symbols: of the input.
          valid: tokens that are no padding; None for all.
        """
        batch, tokens = symbols.shape
        x = self.symbols[...][symbols] + self.positions[:tokens]
        normed = self.attention_norm(x)
        q, k, v = (one(normed).reshape(batch, tokens, self.heads, -1) for one in (self.q, self.k, self.v))
        out = attend(q, k, v, valid=valid) if self.mixing is None else self.mixing(q, k, v, valid=valid)
        x = x + self.o(out.reshape(x.shape))
        x = x + self.down(jax.nn.gelu(self.up(self.mlp_norm(x))))
        return self.head(self.head_norm(x))


def _normal(rng: np.random.Generator, shape: tuple[int, ...], spread: float) -> nnx.Param:
    return nnx.Param(jnp.asarray(spread * rng.standard_normal(shape), jnp.float32))
