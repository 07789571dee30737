"""Public function of retrieval scores: checks and choice of implementation."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, Shaped

from pallas_kernels import dispatch
from pallas_kernels.checks import check_array
from pallas_kernels.paged import Pages, check_pages, checked_scale
from pallas_kernels.retrieval_scores import mosaic, reference

# The specification is what XLA runs.
_IMPLEMENTATIONS = {
    "mosaic": mosaic.retrieval_scores,
    "xla": reference.retrieval_scores,
    "reference": reference.retrieval_scores,
}


def retrieval_scores(
    q: Float[Array, "batch q_heads head_dim"],
    k_pages: Shaped[Array, "rows page_size kv_heads head_dim"],
    page_table: Int32[Array, "batch width"],
    lengths: Int32[Array, " batch"],
    lse: Float32[Array, "batch q_heads"],
    weights: Float32[Array, "batch q_heads"],
    *,
    scale: float | None = None,
    k_scales: Float32[Array, "rows kv_heads page_size"] | None = None,
    implementation: str = "auto",
) -> Float32[Array, "batch keys"]:
    """Weighs the probabilities that heads give each key, after an attention without a bias has found their sums.

    Args:
      q, k_pages, page_table, lengths, scale, k_scales: as of that attention, `decode_attention`.
      lse: of it, with `return_lse`.
      weights: of each head; heads without one are not looked at.
      implementation: "auto": the first of the following that can; "mosaic": on GPUs of compute capability 9.0, reads
        only the keys of heads that are looked at (bfloat16 or float16 queries, pages of their type or float8_e4m3fn,
        `head_dim` a multiple of 16 up to 256, `page_size` 8, 16, 32 or a multiple of 64, up to 64 query heads a
        key/value head, queries of a sequence of up to 64 KiB once each key/value head's are filled up to 8); "xla",
        which is the "reference", too: gathers all pages (memory `batch * width * page_size` keys).

    Returns:
      Sum over heads of weight and probability of each key, `[batch, width * page_size]`; zero past the end.

    Raises:
      ValueError: shapes or types that don't fit together, or an unknown implementation.
      NotImplementedError: the chosen implementation can't do these arguments.
    """
    check_array("q", q, jnp.floating, ("batch", "q_heads", "head_dim"))
    batch, q_heads, head_dim = q.shape
    keys = Pages(k_pages, page_table, k_scales)
    check_pages(keys, keys, batch, q_heads, head_dim)
    check_array("lengths", lengths, jnp.int32, (batch,))
    check_array("lse", lse, jnp.float32, (batch, q_heads))
    check_array("weights", weights, jnp.float32, (batch, q_heads))
    return dispatch.run(
        "retrieval_scores",
        _IMPLEMENTATIONS,
        implementation,
        q,
        keys,
        jnp.clip(lengths, 0, keys.keys),
        lse,
        weights,
        scale=checked_scale(scale, head_dim),
    )
