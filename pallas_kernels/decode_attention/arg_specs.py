"""Named workloads of decode attention, from real models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.model_shapes import BASE, LLAMA_8B, MHA_8, MHA_16, MHA_20, QWEN_MOE, SMALL
from pallas_kernels.paged_specs import random_key_bias, random_pages


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One step of a batch.

    Attributes:
      context: keys of the longest sequence; the others have down to `shortest` of it.
      biased: with a bias of half of the keys.
      fp8: pages of 8 bits.
    """

    batch: int
    context: int
    q_heads: int
    kv_heads: int
    head_dim: int
    page_size: int = 64
    shortest: float = 1.0
    window: int | None = None
    biased: bool = False
    fp8: bool = False
    dtype: str = "bfloat16"

    @property
    def options(self) -> dict[str, Any]:
        """Static keyword arguments of `decode_attention`."""
        return {"window": self.window}

    @property
    def _keys(self) -> int:
        """Keys in sight of all sequences, on average."""
        seen = self.context * (1 + self.shortest) / 2
        return int(self.batch * min(seen, self.window or seen))

    @property
    def bytes_moved(self) -> int:
        """Keys and values read; queries and results are not worth counting."""
        bytes_of_key = self.head_dim + 4 if self.fp8 else self.head_dim * jnp.dtype(self.dtype).itemsize
        return 2 * self._keys * self.kv_heads * bytes_of_key

    @property
    def flops(self) -> int:
        return 4 * self._keys * self.q_heads * self.head_dim

    def make(self, key: jax.Array) -> dict[str, Any]:
        """Keyword arguments of `decode_attention`: one arena, whose pages are dealt at random."""
        q_key, pages_key, length_key, bias_key = jax.random.split(key, 4)
        width = -(-self.context // self.page_size)
        lengths = jax.random.uniform(length_key, (self.batch,), minval=self.shortest, maxval=1.0) * self.context
        arguments: dict[str, Any] = {
            "q": jax.random.normal(q_key, (self.batch, self.q_heads, self.head_dim), self.dtype),
            "lengths": jnp.ceil(lengths).astype(jnp.int32),
            **random_pages(
                pages_key,
                seqs=self.batch,
                width=width,
                page_size=self.page_size,
                kv_heads=self.kv_heads,
                head_dim=self.head_dim,
                dtype="float8_e4m3fn" if self.fp8 else self.dtype,
            ),
        }
        if self.fp8:
            scales = jnp.ones((len(arguments["k_pages"]), self.kv_heads, self.page_size), jnp.float32)
            arguments |= {"k_scales": scales, "v_scales": scales}
        if self.biased:
            arguments["key_bias"] = random_key_bias(bias_key, self.batch, width * self.page_size)
        return arguments


SPECS: Mapping[str, Spec] = {
    "llama_3_1_8b_batch_32_context_4k": Spec(batch=32, context=4096, **LLAMA_8B),
    "llama_3_1_8b_batch_128_context_4k": Spec(batch=128, context=4096, **LLAMA_8B),
    "llama_3_1_8b_batch_32_context_4k_biased": Spec(batch=32, context=4096, biased=True, **LLAMA_8B),
    "llama_3_1_8b_batch_32_context_4k_fp8": Spec(batch=32, context=4096, fp8=True, **LLAMA_8B),
    "llama_3_1_8b_batch_64_context_8k_ragged": Spec(batch=64, context=8192, shortest=0.05, **LLAMA_8B),
    "llama_3_1_8b_batch_4_context_64k": Spec(batch=4, context=65536, **LLAMA_8B),
    "llama_3_1_8b_batch_32_context_8k_window_4k": Spec(batch=32, context=8192, window=4096, **LLAMA_8B),
    "qwen3_30b_a3b_batch_32_context_4k": Spec(batch=32, context=4096, **QWEN_MOE),
    "head_dim_256_batch_32_context_4k": Spec(batch=32, context=4096, q_heads=16, kv_heads=8, head_dim=256),
    "mha_8_heads_batch_8_context_4k": Spec(batch=8, context=4096, **MHA_8),
    "mha_16_heads_batch_8_context_4k": Spec(batch=8, context=4096, **MHA_16),
    "mha_20_heads_batch_8_context_4k": Spec(batch=8, context=4096, **MHA_20),
    "base_batch_8_context_1k": Spec(batch=8, context=1024, page_size=16, **BASE),
    "small_batch_8_context_1k": Spec(batch=8, context=1024, page_size=16, **SMALL),
}
