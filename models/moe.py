"""Mixture of experts: a softmax router, the top experts of each token, their weighted sum."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from models.config import MoEConfig
from models.layers import Linear, random_weights
from pallas_kernels.grouped_matmul import combine, dispatch, gated_grouped_matmul, grouped_matmul


class Experts(nnx.Module):
    """Gated MLPs side by side: gate and up `[experts, hidden, inner]`, down `[experts, inner, hidden]`."""

    def __init__(self, moe: MoEConfig, hidden: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        count, inner = moe.num_experts, moe.intermediate_size

        def weights(inputs: int, outputs: int) -> nnx.Param:
            return random_weights(rngs, (count, inputs, outputs), dtype)

        self.gate = weights(hidden, inner)
        self.up = weights(hidden, inner)
        self.down = weights(inner, hidden)

    def __call__(
        self, rows: Float[Array, "M D"], group_sizes: Int32[Array, "E"], implementation: str
    ) -> Float[Array, "M D"]:
        """Apply expert `e` to its `group_sizes[e]` rows; rows are sorted by expert."""
        gate, up, down = self.gate[...], self.up[...], self.down[...]
        inner = gated_grouped_matmul(rows, gate, up, group_sizes, implementation=implementation)
        return grouped_matmul(inner, down, group_sizes, implementation=implementation)


class MoE(nnx.Module):
    """Sparse replacement of the MLP. No capacity limit: no token is dropped, and none changes another's result.

    `implementation` is that of `grouped_matmul`: "auto" to serve, "reference" where gradients are wanted.
    """

    def __init__(self, moe: MoEConfig, hidden: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.router = Linear(hidden, moe.num_experts, bias=False, dtype=dtype, rngs=rngs)
        self.experts = Experts(moe, hidden, dtype=dtype, rngs=rngs)
        self.top_k = moe.num_experts_per_tok
        self.normalize = moe.norm_topk_prob
        self.implementation = "auto"

    def route(self, x: Float[Array, "T D"]) -> tuple[Int32[Array, "T k"], Float[Array, "T k"]]:
        """The experts of each token, best first, and their weights: softmax over all experts, in float32 or wider."""
        logits = self.router(x)
        probabilities = jax.nn.softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), axis=-1)
        weights, experts = jax.lax.top_k(probabilities, self.top_k)
        if self.normalize:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        return experts, weights

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """Route, compute each chosen expert, and add up."""
        return self.apply(x, *self.route(x))

    def apply(
        self, x: Float[Array, "T D"], experts: Int32[Array, "T k"], weights: Float[Array, "T k"]
    ) -> Float[Array, "T D"]:
        """The weighted sum of what the chosen experts make of each token."""
        rows, group_sizes, order = dispatch(x, experts, self.experts.gate.shape[0])
        return combine(self.experts(rows, group_sizes, self.implementation), order, weights.astype(x.dtype))
