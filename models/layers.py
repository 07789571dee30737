"""Layers that the families share: projection, norm, attention around a caller's cache, MLP, decoder layer.

Every array has tokens as its leading axis: rows of different sequences lie side by side, and only the caller's
`attend` knows which row belongs to which sequence.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from models.config import ModelConfig
from models.rope import Rope, rotate
from pallas_kernels.pseudo_heads import PseudoHeads

# Attention of one layer over the caller's cache: (q [T Hq d], k [T Hkv d], v [T Hkv d], cache) -> (out [T Hq d], cache)
# A layer with pseudo heads hands its `PseudoHeads` behind the cache; q and out are then [T Hq P d].
type LayerAttend = Callable[..., tuple[jax.Array, Any]]
# The same for any layer, its index (from 0) first.
type Attend = Callable[..., tuple[jax.Array, Any]]
# MLP of one layer as the caller computes it: (mlp, x [T D]) -> out [T D]
type LayerMix = Callable[[nnx.Module, jax.Array], jax.Array]
# The same for any layer, its index (from 0) first.
type Mix = Callable[[int, nnx.Module, jax.Array], jax.Array]

INIT_STDDEV = 0.02


@partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    return INIT_STDDEV * jax.random.normal(key, shape, dtype)


def random_weights(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: DTypeLike) -> nnx.Param:
    """A parameter with normal values of standard deviation `INIT_STDDEV`; equal shapes share one compiled program."""
    return nnx.Param(_normal(rngs.params(), shape, jnp.dtype(dtype)))


def matmul_precision(dtype: DTypeLike) -> jax.lax.Precision | None:
    """Full float32 products for float32 inputs (accelerators would round them to TF32), the default otherwise."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


class Linear(nnx.Module):
    """Projection `x @ kernel + bias`, kernel stored `[in, out]`."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.kernel = random_weights(rngs, (inputs, outputs), dtype)
        self.bias = nnx.Param(jnp.zeros((outputs,), dtype)) if bias else None

    def __call__(self, x: Float[Array, "T inputs"]) -> Float[Array, "T outputs"]:
        """Project every row."""
        out: jax.Array = jnp.dot(x, self.kernel[...], precision=matmul_precision(x.dtype))
        return out if self.bias is None else out + self.bias[...]


class RMSNorm(nnx.Module):
    """Root mean square norm over the last axis, in float32 or wider."""

    def __init__(self, width: int, *, eps: float, dtype: DTypeLike) -> None:
        self.scale = nnx.Param(jnp.ones((width,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*rows width"]) -> Float[Array, "*rows width"]:
        """Normalise every row; the result has the type of `x`."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        normalized: jax.Array = self.scale[...] * wide.astype(x.dtype)
        return normalized


class Attention(nnx.Module):
    """Projections of grouped-query attention; the attention itself is the caller's."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        hidden, head_dim = config.hidden_size, config.head_dim
        queries, keys = config.num_heads * head_dim, config.num_kv_heads * head_dim
        self.q = Linear(hidden, queries, bias=config.qkv_bias, dtype=dtype, rngs=rngs)
        self.k = Linear(hidden, keys, bias=config.qkv_bias, dtype=dtype, rngs=rngs)
        self.v = Linear(hidden, keys, bias=config.qkv_bias, dtype=dtype, rngs=rngs)
        self.o = Linear(queries, hidden, bias=config.o_bias, dtype=dtype, rngs=rngs)
        self.q_norm = RMSNorm(head_dim, eps=config.rms_norm_eps, dtype=dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(head_dim, eps=config.rms_norm_eps, dtype=dtype) if config.qk_norm else None
        self.head_dim = head_dim

    def project(
        self, x: Float[Array, "T D"], rope: Rope
    ) -> tuple[Float[Array, "T Hq d"], Float[Array, "T Hkv d"], Float[Array, "T Hkv d"]]:
        """Rotated queries, rotated keys, and values of every token."""
        q, k, v = self._heads(x)
        return rotate(q, rope), rotate(k, rope), v

    def pseudo_heads(self) -> PseudoHeads | None:
        """What the attention makes pseudo keys and values of, in a layer that has them."""
        return None

    def output(self, out: Float[Array, "T Hq d"]) -> Float[Array, "T D"]:
        """What the attention adds to the residual stream."""
        return self.o(out.reshape(out.shape[0], -1))

    def _heads(self, x: Float[Array, "T D"]) -> tuple[jax.Array, jax.Array, jax.Array]:
        q, k, v = (linear(x).reshape(x.shape[0], -1, self.head_dim) for linear in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v


class MLP(nnx.Module):
    """Gated MLP: `down(silu(gate(x)) * up(x))`, of width `inner`; None is the configuration's."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs, inner: int | None = None) -> None:
        hidden, bias = config.hidden_size, config.mlp_bias
        inner = config.intermediate_size if inner is None else inner
        self.gate = Linear(hidden, inner, bias=bias, dtype=dtype, rngs=rngs)
        self.up = Linear(hidden, inner, bias=bias, dtype=dtype, rngs=rngs)
        self.down = Linear(inner, hidden, bias=bias, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """Apply to every token."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class DecoderLayer(nnx.Module):
    """Pre-norm residual layer: attention, then an MLP of any kind.

    It does not know its index, so layers of equal shape share one compiled program; in a program of all layers its two
    halves are traced once.
    """

    def __init__(
        self,
        config: ModelConfig,
        mlp: nnx.Module,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        attention: Attention | None = None,
    ) -> None:
        self.attention_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.attention = Attention(config, dtype=dtype, rngs=rngs) if attention is None else attention
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.mlp = mlp

    def __call__(
        self, x: Float[Array, "T D"], rope: Rope, attend: LayerAttend, cache: Any, mix: LayerMix | None = None
    ) -> tuple[Float[Array, "T D"], Any]:
        """The residual stream after this layer, and the cache that `attend` returned.

        Without `mix`, the layer applies its MLP itself.
        """
        q, k, v = _before_attention(self, x, rope)
        pseudo = self.attention.pseudo_heads()
        out, cache = attend(q, k, v, cache) if pseudo is None else attend(q, k, v, cache, pseudo)
        if mix is None:
            return _after_attention(self, x, out), cache
        x, normed = _between(self, x, out)
        return x + mix(self.mlp, normed), cache


# Jitted within whatever jits the model, which costs nothing there: tracing is most of the time that a program takes to
# come out of the compilation cache.


@jax.jit
def _before_attention(
    layer: DecoderLayer, x: Float[Array, "T D"], rope: Rope
) -> tuple[Float[Array, "T Hq *P d"], Float[Array, "T Hkv d"], Float[Array, "T Hkv d"]]:
    return layer.attention.project(layer.attention_norm(x), rope)


@jax.jit
def _after_attention(
    layer: DecoderLayer, x: Float[Array, "T D"], out: Float[Array, "T Hq *P d"]
) -> Float[Array, "T D"]:
    x, normed = _between(layer, x, out)
    mixed: jax.Array = x + layer.mlp(normed)
    return mixed


@jax.jit
def _between(
    layer: DecoderLayer, x: Float[Array, "T D"], out: Float[Array, "T Hq *P d"]
) -> tuple[Float[Array, "T D"], Float[Array, "T D"]]:
    """The residual stream after the attention, and what the MLP makes of it."""
    x = x + layer.attention.output(out)
    return x, layer.mlp_norm(x)
