"""Named workloads of retrieval scores: layers of real models, with the heads that their profiles have there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.model_shapes import BASE, LLAMA_8B, SMALL
from pallas_kernels.paged_specs import random_pages


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One layer of a step of a batch.

    Attributes:
      heads: query heads with a weight, of every sequence.
      context: keys of the longest sequence; the others have down to `shortest` of it.
      fp8: pages of 8 bits.
    """

    heads: tuple[int, ...]
    batch: int
    context: int
    q_heads: int
    kv_heads: int
    head_dim: int
    page_size: int = 64
    shortest: float = 1.0
    fp8: bool = False
    dtype: str = "bfloat16"

    @property
    def options(self) -> dict[str, Any]:
        """Static keyword arguments of `retrieval_scores`: none."""
        return {}

    @property
    def _keys(self) -> int:
        """Of all sequences, on average."""
        return int(self.batch * self.context * (1 + self.shortest) / 2)

    @property
    def bytes_moved(self) -> int:
        """Keys of the heads that are needed, and a score of every key that a table has room for."""
        needed = len({head * self.kv_heads // self.q_heads for head in self.heads})
        bytes_of_key = self.head_dim + 4 if self.fp8 else self.head_dim * jnp.dtype(self.dtype).itemsize
        return self._keys * needed * bytes_of_key + self.batch * self._width * self.page_size * 4

    @property
    def flops(self) -> int:
        return 2 * self._keys * len(self.heads) * self.head_dim

    @property
    def _width(self) -> int:
        return -(-self.context // self.page_size)

    def make(self, key: jax.Array) -> dict[str, Any]:
        """Keyword arguments of `retrieval_scores`: one arena, whose pages are dealt at random."""
        q_key, pages_key, length_key = jax.random.split(key, 3)
        lengths = jax.random.uniform(length_key, (self.batch,), minval=self.shortest, maxval=1.0) * self.context
        lengths = jnp.ceil(lengths).astype(jnp.int32)
        pages = random_pages(
            pages_key,
            seqs=self.batch,
            width=self._width,
            page_size=self.page_size,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            dtype="float8_e4m3fn" if self.fp8 else self.dtype,
        )
        weights = jnp.zeros(self.q_heads, jnp.float32).at[jnp.array(self.heads)].set(1 / len(self.heads))
        # The expected sum of exponentials: scores are normal with variance 1.
        lse = jnp.log(lengths.astype(jnp.float32)) + 0.5
        arguments: dict[str, Any] = {
            "q": jax.random.normal(q_key, (self.batch, self.q_heads, self.head_dim), self.dtype),
            "k_pages": pages["k_pages"],
            "page_table": pages["page_table"],
            "lengths": lengths,
            "lse": jnp.broadcast_to(lse[:, None], (self.batch, self.q_heads)),
            "weights": jnp.broadcast_to(weights, (self.batch, self.q_heads)),
        }
        if self.fp8:
            arguments["k_scales"] = jnp.ones((len(pages["k_pages"]), self.kv_heads, self.page_size), jnp.float32)
        return arguments


_QWEN_8B_21 = (8, 10, 11, 17, 18, 31)  # in layer 21, which has most: key/value heads 2, 4 and 7 of 8
_QWEN_8B_24 = (13,)
_LLAMA_8B_14 = (1, 3, 20, 22, 31)

SPECS: Mapping[str, Spec] = {
    "qwen3_8b_layer_21_batch_1_context_128k": Spec(heads=_QWEN_8B_21, batch=1, context=131072, **LLAMA_8B),
    "qwen3_8b_layer_24_batch_1_context_128k": Spec(heads=_QWEN_8B_24, batch=1, context=131072, **LLAMA_8B),
    "qwen3_8b_layer_21_batch_16_context_32k": Spec(heads=_QWEN_8B_21, batch=16, context=32768, **LLAMA_8B),
    "qwen3_8b_layer_21_batch_16_context_32k_ragged": Spec(
        heads=_QWEN_8B_21, batch=16, context=32768, shortest=0.05, **LLAMA_8B
    ),
    "qwen3_8b_layer_21_batch_16_context_32k_fp8": Spec(
        heads=_QWEN_8B_21, batch=16, context=32768, fp8=True, **LLAMA_8B
    ),
    "llama_3_1_8b_layer_14_batch_8_context_64k": Spec(heads=_LLAMA_8B_14, batch=8, context=65536, **LLAMA_8B),
    "base_batch_8_context_1k": Spec(heads=(1,), batch=8, context=1024, page_size=16, **BASE),
    "small_batch_8_context_1k": Spec(heads=(0, 3), batch=8, context=1024, page_size=16, **SMALL),
}
