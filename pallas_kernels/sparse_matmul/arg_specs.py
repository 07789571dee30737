"""Named workloads of the product with packed weights, from real models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.sparse_matmul.packing import WORD, packed_bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One projection of a decode step.

    Attributes:
      rows: sequences.
      inputs, outputs: `K` and `N`.
      keep, of: the pattern N:M.
    """

    rows: int
    inputs: int
    outputs: int
    keep: int = 2
    of: int = 4
    dtype: str = "bfloat16"

    @property
    def options(self) -> dict[str, Any]:
        """Static keyword arguments of `sparse_matmul`."""
        return {"of": self.of}

    @property
    def bytes_moved(self) -> int:
        """Packed weights, rows and results."""
        rows = self.rows * (self.inputs + self.outputs) * jnp.dtype(self.dtype).itemsize
        return packed_bytes(self.inputs, self.outputs, self.keep, self.of, self.dtype) + rows

    @property
    def flops(self) -> int:
        """Of the dense product, which is what is computed."""
        return 2 * self.rows * self.inputs * self.outputs

    @property
    def planes(self) -> int:
        """Values of each word of the mask."""
        return WORD * self.keep // self.of

    def make(self, key: jax.Array) -> dict[str, jax.Array]:
        """Keyword arguments of `sparse_matmul`."""
        row_key, value_key, mask_key = jax.random.split(key, 3)
        words = self.inputs // WORD
        scores = jax.random.uniform(mask_key, (WORD // self.of, self.of, self.outputs, words))
        kept = jnp.argsort(jnp.argsort(scores, axis=1), axis=1) < self.keep
        bits = kept.reshape(WORD, self.outputs, words).astype(jnp.uint16)
        places = jnp.arange(WORD, dtype=jnp.uint16)[:, None, None]
        values = jax.random.normal(value_key, (self.planes, self.outputs, words), self.dtype)
        return {
            "x": jax.random.normal(row_key, (self.rows, self.inputs), self.dtype),
            "values": jnp.divide(values, (self.inputs * self.keep / self.of) ** 0.5),
            "mask": jnp.sum(bits << places, axis=0, dtype=jnp.uint16),
        }


_LLAMA_UP: dict[str, Any] = {"inputs": 4096, "outputs": 14336}  # Llama-3.1-8B, gate or up
_LLAMA_DOWN: dict[str, Any] = {"inputs": 14336, "outputs": 4096}
_LLAMA_Q: dict[str, Any] = {"inputs": 4096, "outputs": 4096}  # and o
_4_OF_8: dict[str, Any] = {"keep": 4, "of": 8}

SPECS: Mapping[str, Spec] = {
    "llama_3_1_8b_up_1": Spec(rows=1, **_LLAMA_UP),
    "llama_3_1_8b_up_16": Spec(rows=16, **_LLAMA_UP),
    "llama_3_1_8b_up_64": Spec(rows=64, **_LLAMA_UP),
    "llama_3_1_8b_up_1_4_of_8": Spec(rows=1, **_LLAMA_UP, **_4_OF_8),
    "llama_3_1_8b_up_64_4_of_8": Spec(rows=64, **_LLAMA_UP, **_4_OF_8),
    "llama_3_1_8b_down_1": Spec(rows=1, **_LLAMA_DOWN),
    "llama_3_1_8b_down_16": Spec(rows=16, **_LLAMA_DOWN),
    "llama_3_1_8b_q_1": Spec(rows=1, **_LLAMA_Q),
    "base_up_8": Spec(rows=8, inputs=256, outputs=704),
}
