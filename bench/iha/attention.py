"""Pseudo heads without a causal mask and without positions, as the paper's theory and its trained tasks have them."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from models.iha import collapse, initial_collapse, initial_mixing
from pallas_kernels.pseudo_heads import mix


def attend(
    q: Float[Array, "*B M H e"],
    k: Float[Array, "*B M H e"],
    v: Float[Array, "*B M H d"],
    *,
    linear: bool = False,
    valid: Bool[Array, "*B M"] | None = None,
) -> Float[Array, "*B M H d"]:
    """Attention of all places over all places.

    Args:
      q, k: `[batch, places, heads, width of a query]`.
      v: `[batch, places, heads, head_dim]`.
      linear: weights are the scores themselves, unscaled, in place of their softmax.
      valid: places that are looked at; None for all.
    """
    scores = jnp.einsum("...nhe,...mhe->...hnm", q, k)
    if not linear:
        scores = scores / math.sqrt(q.shape[-1])
        scores = scores if valid is None else jnp.where(valid[..., None, None, :], scores, -jnp.inf)
        scores = jax.nn.softmax(scores, axis=-1)
    elif valid is not None:
        scores = jnp.where(valid[..., None, None, :], scores, 0)
    return jnp.einsum("...hnm,...mhd->...nhd", scores, v)


class Mixing(nnx.Module):
    """Weights that mix heads to pseudo heads and collapse them again.

    Attributes:
      alpha_q, alpha_k, alpha_v: `[heads, heads, P]`: source head, head, pseudo head.
      collapse_weights: `[heads out, heads, P]`.
    """

    def __init__(
        self, alpha_q: np.ndarray, alpha_k: np.ndarray, alpha_v: np.ndarray, collapse_weights: np.ndarray
    ) -> None:
        self.alpha_q, self.alpha_k, self.alpha_v, self.collapse_weights = (
            nnx.Param(jnp.asarray(values)) for values in (alpha_q, alpha_k, alpha_v, collapse_weights)
        )

    @classmethod
    def initial(cls, heads: int, pseudo_heads: int, noise: float, rng: np.random.Generator) -> Mixing:
        """Copies of heads and the mean of their outputs, with noise on all weights.

        Without noise, as neither positions nor a mask tell the copies apart, all of them would stay alike for good.

        Args:
          heads, pseudo_heads: H and P.
          noise: its standard deviation.
          rng: of the noise.
        """
        own = initial_mixing(heads, heads, pseudo_heads)
        mean = initial_collapse(heads, pseudo_heads, "global")
        return cls(*(one + noise * rng.standard_normal(one.shape).astype(np.float32) for one in (own, own, own, mean)))

    def __call__(
        self,
        q: Float[Array, "*B N H e"],
        k: Float[Array, "*B N H e"],
        v: Float[Array, "*B N H d"],
        *,
        linear: bool = False,
        valid: Bool[Array, "*B N"] | None = None,
    ) -> Float[Array, "*B N H d"]:
        """`attend` of the pseudo heads, collapsed to one output of each head."""
        pseudo = self.alpha_q.shape[2]
        rows = [
            _interleaved(mix(x, alpha[...])) for x, alpha in ((q, self.alpha_q), (k, self.alpha_k), (v, self.alpha_v))
        ]
        seen = None if valid is None else jnp.repeat(valid, pseudo, axis=-1)
        out = attend(*rows, linear=linear, valid=seen)
        *_, heads, head_dim = out.shape
        tokens = out.reshape(-1, pseudo, heads, head_dim).swapaxes(1, 2)
        return collapse(tokens, self.collapse_weights[...]).reshape(v.shape)


def _interleaved(mixed: jax.Array) -> jax.Array:
    """`[..., N, H, P, d]` as `[..., N P, H, d]`: token-major, pseudo-minor."""
    *batch, tokens, heads, pseudo, width = mixed.shape
    return mixed.swapaxes(-3, -2).reshape(*batch, tokens * pseudo, heads, width)
