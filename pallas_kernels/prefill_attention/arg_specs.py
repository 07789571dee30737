"""Named workloads of prefill attention, from real models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.model_shapes import BASE, LLAMA_8B, QWEN_MOE, SMALL
from pallas_kernels.paged_specs import random_key_bias, random_pages


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """Chunks of prompts, all of them full.

    Attributes:
      prefix: keys before each chunk.
      biased: with a bias of half of the keys.
    """

    seqs: int
    chunk: int
    prefix: int = 0
    q_heads: int
    kv_heads: int
    head_dim: int
    page_size: int = 64
    window: int | None = None
    biased: bool = False
    dtype: str = "bfloat16"

    @property
    def options(self) -> dict[str, Any]:
        """Static keyword arguments of `prefill_attention`."""
        return {"window": self.window}

    @property
    def bytes_moved(self) -> int:
        """Keys and values, read once, queries and results."""
        kv = 2 * (self.prefix + self.chunk) * self.kv_heads
        return self.seqs * (kv + 2 * self.chunk * self.q_heads) * self.head_dim * jnp.dtype(self.dtype).itemsize

    @property
    def flops(self) -> int:
        """Of the keys in sight alone."""
        seen = [self.prefix + i + 1 for i in range(self.chunk)]
        return 4 * self.seqs * sum(min(n, self.window or n) for n in seen) * self.q_heads * self.head_dim

    def make(self, key: jax.Array) -> dict[str, Any]:
        """Keyword arguments of `prefill_attention`: one arena, whose pages are dealt at random."""
        q_key, pages_key, bias_key = jax.random.split(key, 3)
        width = -(-(self.prefix + self.chunk) // self.page_size)
        arguments: dict[str, Any] = {
            "q": jax.random.normal(q_key, (self.seqs, self.chunk, self.q_heads, self.head_dim), self.dtype),
            "starts": jnp.full((self.seqs,), self.prefix, jnp.int32),
            "counts": jnp.full((self.seqs,), self.chunk, jnp.int32),
            **random_pages(
                pages_key,
                seqs=self.seqs,
                width=width,
                page_size=self.page_size,
                kv_heads=self.kv_heads,
                head_dim=self.head_dim,
                dtype=self.dtype,
            ),
        }
        if self.biased:
            arguments["key_bias"] = random_key_bias(bias_key, self.seqs, width * self.page_size)
        return arguments


SPECS: Mapping[str, Spec] = {
    "llama_3_1_8b_4k": Spec(seqs=1, chunk=4096, **LLAMA_8B),
    "llama_3_1_8b_8_times_2k": Spec(seqs=8, chunk=2048, **LLAMA_8B),
    "llama_3_1_8b_512_after_32k": Spec(seqs=2, chunk=512, prefix=32768, **LLAMA_8B),
    "llama_3_1_8b_4k_biased": Spec(seqs=1, chunk=4096, biased=True, **LLAMA_8B),
    "llama_3_1_8b_8k_window_4k": Spec(seqs=1, chunk=8192, window=4096, **LLAMA_8B),
    "qwen3_30b_a3b_4k": Spec(seqs=1, chunk=4096, **QWEN_MOE),
    "base_8_times_256": Spec(seqs=8, chunk=256, page_size=16, **BASE),
    "small_8_times_256": Spec(seqs=8, chunk=256, page_size=16, **SMALL),
}
