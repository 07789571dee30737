"""Mixture of experts as it is trained: balanced, differentiable, and with a capacity limit.

Serving computes every chosen expert (`models.moe`). Training computes at most a fixed number of rows an expert, so that
all experts are one batched product; the balancing loss keeps the rows beyond it few.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from models import Decoder
from models.moe import MoE

CAPACITY = 1.5


class BalancedMoE(nnx.Module):
    """Stands in for a `MoE` within one traced step, and keeps its balancing loss in ``loss``."""

    def __init__(self, moe: MoE) -> None:
        self.moe = moe
        self.loss = nnx.data(jnp.zeros(()))

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """Route, compute the rows within capacity, and add up; `self.loss` is set."""
        moe = self.moe
        experts, weights = moe.route(x)
        self.loss = balance_loss(jax.nn.softmax(moe.router(x), axis=-1), experts)
        count = moe.experts.gate.shape[0]
        capacity = math.ceil(CAPACITY * experts.size / count)
        flat = experts.reshape(-1)
        chosen = jax.nn.one_hot(flat, count, dtype=jnp.int32)
        place = jnp.take_along_axis(jnp.cumsum(chosen, axis=0), flat[:, None], axis=1)[:, 0] - 1
        # Row `count * capacity` takes what does not fit.
        slot = jnp.where(place < capacity, flat * capacity + place, count * capacity)
        token = jnp.arange(flat.size) // moe.top_k
        sources = jnp.zeros(count * capacity + 1, jnp.int32).at[slot].set(token)[:-1]
        rows = x[sources].reshape(count, capacity, -1)
        hidden = jax.nn.silu(jnp.einsum("ecd,edf->ecf", rows, moe.experts.gate[...]))
        hidden = hidden * jnp.einsum("ecd,edf->ecf", rows, moe.experts.up[...])
        out = jnp.einsum("ecf,efd->ecd", hidden, moe.experts.down[...]).reshape(count * capacity, -1)
        out = jnp.concatenate([out, jnp.zeros((1, out.shape[1]), out.dtype)])
        return jnp.einsum("tkd,tk->td", out[slot].reshape(*experts.shape, -1), weights)


def balance_loss(probabilities: Float[Array, "T E"], experts: Int32[Array, "T k"]) -> Float32[Array, ""]:
    """Load-balancing loss, 1 when balanced: experts * sum over experts of (share of choices * mean probability).

    Equation 4 of Switch Transformers (Fedus et al. 2021), for k choices a token.
    """
    count = probabilities.shape[1]
    share = jnp.mean(jax.nn.one_hot(experts, count), axis=(0, 1))
    return count * jnp.sum(share * probabilities.mean(axis=0))


def replace_experts(model: Decoder) -> list[BalancedMoE]:
    """Puts a `BalancedMoE` around every `MoE` of ``model``, in place; returns them in layer order."""
    replaced = []
    for layer in model.layers:
        if isinstance(layer.mlp, MoE):
            layer.mlp = BalancedMoE(layer.mlp)
            replaced.append(layer.mlp)
    return replaced
