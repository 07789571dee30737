"""Named workloads of Interleaved Head Attention's decode: heads and pseudo heads that models may have.

Beside those of `decode_attention` named "mha_…", plain attention of as many heads over the same keys.
"""

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
    """One step of a batch.

    Attributes:
      context: tokens of the longest sequence; the others have down to `shortest` of it.
      pseudo_heads: of each query head.
    """

    batch: int
    context: int
    q_heads: int
    kv_heads: int
    head_dim: int
    pseudo_heads: int
    page_size: int = 64
    shortest: float = 1.0
    mask: Mask = "flat"
    window: int | None = None
    dtype: str = "bfloat16"

    @property
    def options(self) -> dict[str, Any]:
        """Static keyword arguments of `iha_decode`: those of mask and window are in `pseudo`."""
        return {}

    @property
    def _keys(self) -> int:
        """Tokens in sight of a pseudo query, of all sequences, on average."""
        seen = self.context * (1 + self.shortest) / 2
        return int(self.batch * min(seen, self.window or seen))

    @property
    def bytes_moved(self) -> int:
        """Raw keys and values, read once; queries and results are not worth counting."""
        return 2 * self._keys * self.kv_heads * self.head_dim * jnp.dtype(self.dtype).itemsize

    @property
    def flops(self) -> int:
        """Of the form with the fewest: raw keys and values, or pseudo ones and what it takes to make them."""
        pairs = self.q_heads * self.pseudo_heads * self.head_dim
        raw = self.kv_heads * self.pseudo_heads
        made = self.kv_heads + self.pseudo_heads
        return 4 * self._keys * pairs * min(raw, made)

    def make(self, key: jax.Array) -> dict[str, Any]:
        """Keyword arguments of `iha_decode`: one arena, whose pages are dealt at random."""
        q_key, pages_key, length_key, pseudo_key = jax.random.split(key, 4)
        lengths = jax.random.uniform(length_key, (self.batch,), minval=self.shortest, maxval=1.0) * self.context
        shape = (self.batch, self.q_heads, self.pseudo_heads, self.head_dim)
        return {
            "q": jax.random.normal(q_key, shape, self.dtype),
            "lengths": jnp.ceil(lengths).astype(jnp.int32),
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
                seqs=self.batch,
                width=-(-self.context // self.page_size),
                page_size=self.page_size,
                kv_heads=self.kv_heads,
                head_dim=self.head_dim,
                dtype=self.dtype,
            ),
        }


_BATCH: dict[str, Any] = {"batch": 8, "context": 4096}
SPECS: Mapping[str, Spec] = {
    "mha_8_heads_2_pseudo": Spec(**_BATCH, pseudo_heads=2, **MHA_8),
    "mha_8_heads_4_pseudo": Spec(**_BATCH, pseudo_heads=4, **MHA_8),
    "mha_16_heads_2_pseudo": Spec(**_BATCH, pseudo_heads=2, **MHA_16),
    "mha_16_heads_4_pseudo": Spec(**_BATCH, pseudo_heads=4, **MHA_16),
    "mha_20_heads_2_pseudo": Spec(**_BATCH, pseudo_heads=2, **MHA_20),
    "mha_20_heads_2_pseudo_window_1k": Spec(**_BATCH, pseudo_heads=2, window=1024, **MHA_20),
    "mha_20_heads_2_pseudo_of_whole_tokens": Spec(**_BATCH, pseudo_heads=2, mask="token", **MHA_20),
    # So many rows that pseudo keys and values are made.
    "mha_16_heads_16_pseudo": Spec(**_BATCH, pseudo_heads=16, **MHA_16),
    "llama_3_1_8b_2_pseudo_batch_32_ragged": Spec(batch=32, context=4096, shortest=0.05, pseudo_heads=2, **LLAMA_8B),
    "small_2_pseudo_batch_8_context_1k": Spec(batch=8, context=1024, pseudo_heads=2, page_size=16, **SMALL),
}
