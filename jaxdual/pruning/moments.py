"""What calibration text says of the inputs of a matrix."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32


class Moments(NamedTuple):
    """Sums over tokens, in float32.

    Attributes:
      tokens: how many.
      first: `[inputs]` sum of the inputs.
      second: `[inputs, inputs]` sum of their products, or `[inputs]` of their squares.
    """

    tokens: Float32[Array, ""]
    first: Float32[Array, " inputs"]
    second: Float32[Array, "*shape"]

    @classmethod
    def none(cls, inputs: int, *, whole: bool) -> Moments:
        """Of no tokens yet; with all products where `whole`."""
        return cls(jnp.float32(0), jnp.zeros(inputs), jnp.zeros((inputs, inputs) if whole else inputs))

    def with_tokens(self, x: Float[Array, "T inputs"], weight: Float[Array, " T"] | None = None) -> Moments:
        """With more tokens; those of weight 0 don't count."""
        x = x.astype(jnp.float32)
        weighed = x if weight is None else x * weight[:, None]
        tokens = jnp.float32(x.shape[0]) if weight is None else jnp.sum(weight)
        if self.second.ndim == 2:
            second = jnp.einsum("ti,tj->ij", weighed, x, precision=jax.lax.Precision.HIGHEST)
        else:
            second = jnp.sum(weighed * x, axis=0)
        return self._replace(
            tokens=self.tokens + tokens, first=self.first + jnp.sum(weighed, axis=0), second=self.second + second
        )

    @property
    def squares(self) -> Float32[Array, " inputs"]:
        """Sum of the squares of each input."""
        return jnp.diagonal(self.second) if self.second.ndim == 2 else self.second

    @property
    def means(self) -> Float32[Array, " inputs"]:
        """Mean of each input."""
        return self.first / jnp.maximum(self.tokens, 1)

    @property
    def centred(self) -> Moments:
        """Of the inputs less their means."""
        products = jnp.outer(self.first, self.means) if self.second.ndim == 2 else self.first * self.means
        return self._replace(first=jnp.zeros_like(self.first), second=self.second - products)

    def divided(self, scale: Float[Array, " inputs"]) -> Moments:
        """Of inputs divided by `scale`."""
        squares = jnp.outer(scale, scale) if self.second.ndim == 2 else scale**2
        return self._replace(first=self.first / scale, second=self.second / squares)

    @property
    def hessian(self) -> Float32[Array, "inputs inputs"]:
        """Mean product of each pair of inputs."""
        return self.second / jnp.maximum(self.tokens, 1)
