"""Named workloads of the grouped matrix product, from real models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul.api import gated_grouped_matmul, grouped_matmul


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One product of the experts of a layer: with gate and up in one, or with down.

    Attributes:
      tokens: each with a row for every one of its `top_k` experts, drawn at random.
      inputs, outputs: `K` and `N`.
      gated: two matrices an expert, gate and up.
    """

    tokens: int
    top_k: int
    experts: int
    inputs: int
    outputs: int
    gated: bool
    dtype: str = "bfloat16"

    @property
    def function(self) -> Callable[..., jax.Array]:
        """`grouped_matmul` or `gated_grouped_matmul`."""
        return gated_grouped_matmul if self.gated else grouped_matmul

    @property
    def options(self) -> dict[str, Any]:
        """Static keyword arguments of `function`: none."""
        return {}

    @property
    def rows(self) -> int:
        return self.tokens * self.top_k

    @property
    def bytes_moved(self) -> int:
        """Rows, results, and the matrices of as many experts as are drawn on average, once."""
        drawn = self.experts * (1 - (1 - self.top_k / self.experts) ** self.tokens)
        matrices = round(drawn * (1 + self.gated) * self.inputs * self.outputs)
        return (matrices + self.rows * (self.inputs + self.outputs)) * jnp.dtype(self.dtype).itemsize

    @property
    def flops(self) -> int:
        return 2 * (1 + self.gated) * self.rows * self.inputs * self.outputs

    def make(self, key: jax.Array) -> dict[str, jax.Array]:
        """Keyword arguments of `function`."""
        row_key, matrix_key, up_key, choice_key = jax.random.split(key, 4)
        scores = jax.random.uniform(choice_key, (self.tokens, self.experts))
        chosen = jax.lax.top_k(scores, self.top_k)[1]

        def matrices(key: jax.Array) -> jax.Array:
            shape = (self.experts, self.inputs, self.outputs)
            return jnp.divide(jax.random.normal(key, shape, self.dtype), self.inputs**0.5)

        arguments = {
            "lhs": jax.random.normal(row_key, (self.rows, self.inputs), self.dtype),
            "gate" if self.gated else "rhs": matrices(matrix_key),
            "group_sizes": jnp.bincount(chosen.reshape(-1), length=self.experts).astype(jnp.int32),
        }
        if self.gated:
            arguments["up"] = matrices(up_key)
        return arguments


_QWEN: dict[str, Any] = {"top_k": 8, "experts": 128}  # Qwen3-30B-A3B
_QWEN_GATED: dict[str, Any] = {**_QWEN, "inputs": 2048, "outputs": 768, "gated": True}
_QWEN_DOWN: dict[str, Any] = {**_QWEN, "inputs": 768, "outputs": 2048, "gated": False}
_SHIPPED: dict[str, Any] = {"top_k": 2, "experts": 8}

SPECS: Mapping[str, Spec] = {
    "qwen3_30b_a3b_gated_32": Spec(tokens=32, **_QWEN_GATED),
    "qwen3_30b_a3b_down_32": Spec(tokens=32, **_QWEN_DOWN),
    "qwen3_30b_a3b_gated_256": Spec(tokens=256, **_QWEN_GATED),
    "qwen3_30b_a3b_down_256": Spec(tokens=256, **_QWEN_DOWN),
    "qwen3_30b_a3b_gated_8k": Spec(tokens=8192, **_QWEN_GATED),
    "qwen3_30b_a3b_down_8k": Spec(tokens=8192, **_QWEN_DOWN),
    "moe_gated_8": Spec(tokens=8, inputs=192, outputs=160, gated=True, **_SHIPPED),
    "moe_down_8": Spec(tokens=8, inputs=160, outputs=192, gated=False, **_SHIPPED),
    "moe_gated_1k": Spec(tokens=1024, inputs=192, outputs=160, gated=True, **_SHIPPED),
    "moe_down_1k": Spec(tokens=1024, inputs=160, outputs=192, gated=False, **_SHIPPED),
}
