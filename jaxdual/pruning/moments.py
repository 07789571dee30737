"""What calibration text says of the inputs of a matrix."""

from __future__ import annotations

import dataclasses
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32
from scipy.linalg import solve_triangular

DAMPING = 0.01  # of the mean of the Hessian's diagonal, added to it before it is inverted


@partial(jax.tree_util.register_dataclass, data_fields=["tokens", "first", "second"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Moments:
    """Sums over tokens, in float32; what is made of them is made once.

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
        shape = (inputs, inputs) if whole else (inputs,)
        return cls(jnp.float32(0), jnp.zeros(inputs, jnp.float32), jnp.zeros(shape, jnp.float32))

    def with_tokens(self, x: Float[Array, "T inputs"], weight: Float[Array, " T"] | None = None) -> Moments:
        """With more tokens; those of weight 0 don't count."""
        x = x.astype(jnp.float32)
        weighed = x if weight is None else x * weight[:, None]
        tokens = jnp.float32(x.shape[0]) if weight is None else jnp.sum(weight)
        if self.second.ndim == 2:
            second = jnp.einsum("ti,tj->ij", weighed, x, precision=jax.lax.Precision.HIGHEST)
        else:
            second = jnp.sum(weighed * x, axis=0)
        return dataclasses.replace(
            self, tokens=self.tokens + tokens, first=self.first + jnp.sum(weighed, axis=0), second=self.second + second
        )

    @property
    def squares(self) -> Float32[Array, " inputs"]:
        """Sum of the squares of each input."""
        return jnp.diagonal(self.second) if self.second.ndim == 2 else self.second

    @property
    def means(self) -> Float32[Array, " inputs"]:
        """Mean of each input."""
        return self.first / jnp.maximum(self.tokens, 1)

    @cached_property
    def centred(self) -> Moments:
        """Of the inputs less their means.

        Rounding leaves a little of an input that is always the same, which may be below zero; it counts as none.
        """
        if self.second.ndim == 1:
            second = jnp.maximum(self.second - self.first * self.means, 0)
        else:
            second = self.second - jnp.outer(self.first, self.means)
            diagonal = jnp.diagonal(second)
            second = second + jnp.diag(jnp.maximum(diagonal, 0) - diagonal)
        return dataclasses.replace(self, first=jnp.zeros_like(self.first), second=second)

    def divided(self, scale: Float[Array, " inputs"]) -> Moments:
        """Of inputs divided by `scale`."""
        squares = jnp.outer(scale, scale) if self.second.ndim == 2 else scale**2
        return dataclasses.replace(self, first=self.first / scale, second=self.second / squares)

    @property
    def hessian(self) -> Float32[Array, "inputs inputs"]:
        """Mean product of each pair of inputs."""
        return self.second / jnp.maximum(self.tokens, 1)

    def inverse_factor(
        self, damping: float = DAMPING
    ) -> tuple[Float32[Array, "inputs inputs"], Bool[Array, " inputs"]]:
        """Upper Cholesky factor of the inverse of the damped Hessian, and inputs that never were anything but zero.

        An input that is always zero has 1 in the Hessian's diagonal.
        """
        if damping not in self._factors:
            hessian = np.asarray(self.hessian, np.float64)
            dead = np.diagonal(hessian) == 0
            hessian[dead, dead] = 1
            hessian[np.diag_indices_from(hessian)] += damping * np.mean(np.diagonal(hessian))
            # With rows and columns in reverse, the lower factor of a matrix is the inverse of the upper one of its
            # inverse: one factorisation, and nothing is inverted that may be ill-conditioned.
            lower = np.linalg.cholesky(hessian[::-1, ::-1])
            upper = solve_triangular(lower[::-1, ::-1], np.eye(len(hessian)))
            self._factors[damping] = jnp.asarray(upper, jnp.float32), jnp.asarray(dead)
        return self._factors[damping]

    @cached_property
    def _factors(self) -> dict[float, tuple[jax.Array, jax.Array]]:
        return {}
