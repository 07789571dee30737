"""Named workloads of the block-sparse product, from real models with half of their blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_matmul.packing import block_bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One projection.

    Attributes:
      rows: tokens of a step.
      inputs, outputs: `K` and `N`.
      size: of a block.
      kept: blocks for each block of outputs.
    """

    rows: int
    inputs: int
    outputs: int
    size: int
    kept: int
    dtype: str = "bfloat16"

    @property
    def options(self) -> dict[str, Any]:
        """Static keyword arguments of `block_sparse_matmul`: none."""
        return {}

    @property
    def bytes_moved(self) -> int:
        """Blocks, their numbers, rows and results."""
        rows = self.rows * (self.inputs + self.outputs) * jnp.dtype(self.dtype).itemsize
        return block_bytes(self.outputs, self.size, self.kept, self.dtype) + rows

    @property
    def flops(self) -> int:
        """Of the blocks that are there."""
        return 2 * self.rows * self.kept * self.size * self.outputs

    def make(self, key: jax.Array) -> dict[str, jax.Array]:
        """Keyword arguments of `block_sparse_matmul`."""
        row_key, block_key, index_key = jax.random.split(key, 3)
        parts = self.outputs // self.size
        scores = jax.random.uniform(index_key, (parts, self.inputs // self.size))
        shape = (parts, self.kept, self.size, self.size)
        return {
            "x": jax.random.normal(row_key, (self.rows, self.inputs), self.dtype),
            "blocks": jnp.divide(jax.random.normal(block_key, shape, self.dtype), (self.kept * self.size) ** 0.5),
            "indices": jnp.sort(jax.lax.top_k(scores, self.kept)[1], axis=1).astype(jnp.int32),
        }


_LLAMA_UP: dict[str, Any] = {"inputs": 4096, "outputs": 14336}  # Llama-3.1-8B, gate or up
_LLAMA_DOWN: dict[str, Any] = {"inputs": 14336, "outputs": 4096}

SPECS: Mapping[str, Spec] = {
    "llama_3_1_8b_up_1_block_64": Spec(rows=1, **_LLAMA_UP, size=64, kept=32),
    "llama_3_1_8b_up_1_block_128": Spec(rows=1, **_LLAMA_UP, size=128, kept=16),
    "llama_3_1_8b_up_64_block_128": Spec(rows=64, **_LLAMA_UP, size=128, kept=16),
    "llama_3_1_8b_up_4k_block_128": Spec(rows=4096, **_LLAMA_UP, size=128, kept=16),
    "llama_3_1_8b_down_1_block_128": Spec(rows=1, **_LLAMA_DOWN, size=128, kept=56),
    "base_up_8_block_64": Spec(rows=8, inputs=256, outputs=704, size=64, kept=2),
}
