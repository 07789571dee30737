"""Named workloads of Interleaved Head Attention's prefill: heads and pseudo heads that models may have."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.model_shapes import LLAMA_8B, MHA_8, MHA_16, MHA_20, SMALL
from pallas_kernels.paged_specs import random_pages, random_pseudo_heads
from pallas_kernels.pseudo_heads import Mask


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """Chunks of prompts, all of them full.

    Attributes:
      prefix: tokens before each chunk.
      pseudo_heads: of each query head.
    """

    seqs: int
    chunk: int
    prefix: int = 0
    q_heads: int
    kv_heads: int
    head_dim: int
    pseudo_heads: int
    page_size: int = 64
    mask: Mask = "flat"
    window: int | None = None
    dtype: str = "bfloat16"

    @property
    def options(self) -> dict[str, Any]:
        """Static keyword arguments of `iha_prefill`: those of mask and window are in `pseudo`."""
        return {}

    @property
    def bytes_moved(self) -> int:
        """Raw keys and values, read once, queries and results."""
        kv = 2 * (self.prefix + self.chunk) * self.kv_heads
        queries = 2 * self.chunk * self.q_heads * self.pseudo_heads
        return self.seqs * (kv + queries) * self.head_dim * jnp.dtype(self.dtype).itemsize

    @property
    def flops(self) -> int:
        """Of the pseudo keys in sight, and of making each of them once."""
        seen = [self.prefix + i + 1 for i in range(self.chunk)]
        attended = sum(min(n, self.window or n) for n in seen) * self.pseudo_heads
        made = (self.prefix + self.chunk) * self.kv_heads
        return 4 * self.seqs * (attended + made) * self.q_heads * self.pseudo_heads * self.head_dim

    def make(self, key: jax.Array) -> dict[str, Any]:
        """Keyword arguments of `iha_prefill`: one arena, whose pages are dealt at random."""
        q_key, pages_key, pseudo_key = jax.random.split(key, 3)
        shape = (self.seqs, self.chunk, self.q_heads, self.pseudo_heads, self.head_dim)
        return {
            "q": jax.random.normal(q_key, shape, self.dtype),
            "starts": jnp.full((self.seqs,), self.prefix, jnp.int32),
            "counts": jnp.full((self.seqs,), self.chunk, jnp.int32),
            "pseudo": random_pseudo_heads(
                pseudo_key,
                kv_heads=self.kv_heads,
                q_heads=self.q_heads,
                count=self.pseudo_heads,
                head_dim=self.head_dim,
                mask=self.mask,
                window=self.window,
            ),
            **random_pages(
                pages_key,
                seqs=self.seqs,
                width=-(-(self.prefix + self.chunk) // self.page_size),
                page_size=self.page_size,
                kv_heads=self.kv_heads,
                head_dim=self.head_dim,
                dtype=self.dtype,
            ),
        }


SPECS: Mapping[str, Spec] = {
    "mha_8_heads_2_pseudo_2k": Spec(seqs=1, chunk=2048, pseudo_heads=2, **MHA_8),
    "mha_16_heads_4_pseudo_2k": Spec(seqs=1, chunk=2048, pseudo_heads=4, **MHA_16),
    "mha_20_heads_2_pseudo_2k_window_1k": Spec(seqs=1, chunk=2048, pseudo_heads=2, window=1024, **MHA_20),
    "mha_20_heads_2_pseudo_2k_of_whole_tokens": Spec(seqs=1, chunk=2048, pseudo_heads=2, mask="token", **MHA_20),
    "llama_3_1_8b_2_pseudo_512_after_8k": Spec(seqs=2, chunk=512, prefix=8192, pseudo_heads=2, **LLAMA_8B),
    "small_2_pseudo_8_times_256": Spec(seqs=8, chunk=256, pseudo_heads=2, page_size=16, **SMALL),
}
