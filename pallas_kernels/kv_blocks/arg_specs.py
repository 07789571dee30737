"""Named workloads of the block moves, from real models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels.kv_blocks.api import gather_blocks, scatter_blocks


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """A move of blocks.

    Attributes:
      direction: out of the arena, or into it.
      blocks: moved.
      rows: of a block: `2 * layers` of a Full Block, 2 of a Layer Block.
      held: blocks of the arena.
      page_size, kv_heads, head_dim: of a row.
      dtype: name of the element type.
    """

    direction: Literal["gather", "scatter"]
    blocks: int
    rows: int
    held: int
    page_size: int = 64
    kv_heads: int
    head_dim: int
    dtype: str = "bfloat16"

    @property
    def function(self) -> Callable[..., jax.Array]:
        """The function of `pallas_kernels.kv_blocks` for this direction."""
        return gather_blocks if self.direction == "gather" else scatter_blocks

    @property
    def options(self) -> dict[str, Any]:
        """Static keyword arguments of `function`."""
        return {"rows_per_block": self.rows} if self.direction == "gather" else {}

    @property
    def bytes_moved(self) -> int:
        """Read and written."""
        row_bytes = self.page_size * self.kv_heads * self.head_dim * jnp.dtype(self.dtype).itemsize
        return 2 * self.blocks * self.rows * row_bytes

    @property
    def flops(self) -> int:
        return 0

    def make(self, key: jax.Array) -> dict[str, jax.Array]:
        """Keyword arguments of `function`, with blocks dealt at random."""
        arena_key, ids_key, blocks_key = jax.random.split(key, 3)
        row = (self.page_size, self.kv_heads, self.head_dim)
        arguments = {
            "arena": self._numbers(arena_key, (self.held * self.rows, *row)),
            "ids": jax.random.permutation(ids_key, self.held)[: self.blocks].astype(jnp.int32),
        }
        if self.direction == "scatter":
            arguments["blocks"] = self._numbers(blocks_key, (self.blocks, self.rows, *row))
        return arguments

    def _numbers(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jax.random.normal(key, shape, jnp.bfloat16).astype(self.dtype)


def _both_ways(name: str, **fields: Any) -> dict[str, Spec]:
    return {
        f"{name}_gather": Spec(direction="gather", **fields),
        f"{name}_scatter": Spec(direction="scatter", **fields),
    }


_LLAMA: dict[str, Any] = {"rows": 64, "held": 256, "kv_heads": 8, "head_dim": 128}

SPECS: Mapping[str, Spec] = {
    **_both_ways("llama_3_1_8b_full_blocks_8", blocks=8, **_LLAMA),
    **_both_ways("llama_3_1_8b_full_blocks_1", blocks=1, **_LLAMA),
    **_both_ways("llama_3_1_8b_full_blocks_8_fp8", blocks=8, dtype="float8_e4m3fn", **_LLAMA),
    **_both_ways("qwen3_8b_full_blocks_8", blocks=8, rows=72, held=256, kv_heads=8, head_dim=128),
    **_both_ways("qwen3_30b_a3b_layer_blocks_256", blocks=256, rows=2, held=48 * 128, kv_heads=4, head_dim=128),
    **_both_ways("base_full_blocks_8", blocks=8, rows=16, held=64, kv_heads=2, head_dim=64),
}
