"""One bidirectional layer with learned positions, of plain or Interleaved Head Attention: what the tasks train."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from bench.iha.attention import Mixing, attend
from models.layers import Linear, RMSNorm

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


class Encoder(nnx.Module):
    """Embedding, attention, an MLP with GELU, each behind a norm and beside the residual stream, and a head."""

    def __init__(self, config: EncoderConfig, seed: int) -> None:
        rngs = nnx.Rngs(seed)
        dtype, width = jnp.float32, config.width

        def linear(inputs: int, outputs: int) -> Linear:
            layer = Linear(inputs, outputs, bias=True, dtype=dtype, rngs=rngs)
            layer.kernel[...] = jax.random.normal(rngs.params(), (inputs, outputs), dtype) * inputs**-0.5
            return layer

        self.symbols = nnx.Param(jax.random.normal(rngs.params(), (config.symbols, width), dtype))
        self.positions = nnx.Param(jax.random.normal(rngs.params(), (config.positions, width), dtype))
        self.q, self.k, self.v, self.o = (linear(width, width) for _ in range(4))
        self.up, self.down = linear(width, config.inner), linear(config.inner, width)
        self.head = linear(width, config.outputs)
        self.attention_norm, self.mlp_norm, self.head_norm = (RMSNorm(width, eps=_EPS, dtype=dtype) for _ in range(3))
        rng = np.random.default_rng(seed)
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
        x = self.symbols[...][symbols] + self.positions[: symbols.shape[1]]
        normed = self.attention_norm(x)
        q, k, v = (one(normed).reshape(*symbols.shape, self.heads, -1) for one in (self.q, self.k, self.v))
        out = attend(q, k, v, valid=valid) if self.mixing is None else self.mixing(q, k, v, valid=valid)
        x = x + self.o(out.reshape(x.shape))
        x = x + self.down(jax.nn.gelu(self.up(self.mlp_norm(x))))
        return self.head(self.head_norm(x))
