"""Public function of prefill attention: checks and choice of implementation."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, Shaped

from pallas_kernels import cudnn, dispatch
from pallas_kernels.checks import check_array
from pallas_kernels.key_bias import KeyBias, check_key_bias
from pallas_kernels.paged import Pages, check_pages, checked_scale, checked_window
from pallas_kernels.prefill_attention import mosaic, reference, xla

_IMPLEMENTATIONS = {
    "mosaic": mosaic.prefill_attention,
    "cudnn": cudnn.prefill_attention,
    "xla": xla.prefill_attention,
    "reference": reference.prefill_attention,
}


def prefill_attention(
    q: Float[Array, "seqs chunk q_heads head_dim"],
    k_pages: Shaped[Array, "rows page_size kv_heads head_dim"],
    v_pages: Shaped[Array, "v_rows page_size kv_heads head_dim"],
    page_table: Int32[Array, "seqs width"],
    starts: Int32[Array, " seqs"],
    counts: Int32[Array, " seqs"],
    *,
    v_page_table: Int32[Array, "seqs width"] | None = None,
    scale: float | None = None,
    window: int | None = None,
    key_bias: KeyBias | None = None,
    k_scales: Float32[Array, "rows kv_heads page_size"] | None = None,
    v_scales: Float32[Array, "v_rows kv_heads page_size"] | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
) -> (
    Float[Array, "seqs chunk q_heads head_dim"]
    | tuple[Float[Array, "seqs chunk q_heads head_dim"], Float32[Array, "seqs chunk q_heads"]]
):
    """Attends causally with a chunk of each sequence to all keys up to each query's own position.

    The keys and values of the chunk itself must be in the pages already.

    Args:
      q: queries; query i of sequence s stands at position `starts[s] + i`; query head h reads key/value head
        `h // (q_heads // kv_heads)`.
      k_pages, v_pages: rows of `page_size` tokens; they may be one array, the arena.
      page_table: row ids of the keys of each sequence, in token order. All must be valid, also those of pages past its
        end: such pages may be loaded, though nothing in them reaches a result.
      starts: position of the first query of each sequence, in tokens: the length of its cached prefix.
      counts: number of queries of each sequence that are real; results of the others are zero. `starts + counts` is at
        most `width * page_size`: queries whose position the table has no room for are not real.
      v_page_table: row ids of the values; the same as those of the keys if left out.
      scale: factor of the scores, static: a finite number of Python or NumPy; `1 / sqrt(head_dim)` if left out.
      window: sliding window, static: a query at position p sees the keys at positions j with `p - window < j <= p`; all
        keys up to its own if left out. Only differences of positions count, so a table may leave out whole pages before
        the first key in sight if `starts` are counted from the first page that it has.
      key_bias: added to the scaled scores of some keys of each sequence.
      k_scales, v_scales: factors of each token's keys and values, which pages of 8 bits need; like the pages, they may
        be one array.
      return_lse: also return the log of the sum of the exponentials of each query's scores, for merging parts.
      implementation: "auto": the first of the following that can; "mosaic": warp-specialised kernel for GPUs of compute
        capability 9.0 (bfloat16 or float16 throughout, `head_dim` a multiple of 16 up to 128, `page_size` 16, 32, 64 or
        a multiple of 128, no scales); "cudnn": any NVIDIA GPU with cuDNN (one type of 16 bits throughout, no bias or
        scales), memory of the gathered pages and of a mask of `seqs * chunk * width * page_size` values, up to 1 GiB;
        "xla": a page of each sequence at a time, memory `seqs * q_heads * chunk * page_size` scores; "reference":
        gathers the pages, memory `seqs * q_heads * chunk * width * page_size` scores, the only one that can be
        differentiated.

    Returns:
      Values `[seqs, chunk, q_heads, head_dim]`, weighed by the softmax of the scores; with `return_lse` also
      `[seqs, chunk, q_heads]`, -inf where no query is.

    Raises:
      ValueError: shapes or types that don't fit together, or an unknown implementation.
      NotImplementedError: the chosen implementation can't do these arguments; of "auto" none can, and the message says
        why each can't.
    """
    check_array("q", q, jnp.floating, ("seqs", "chunk", "q_heads", "head_dim"))
    seqs, chunk, q_heads, head_dim = q.shape
    keys = Pages(k_pages, page_table, k_scales)
    values = Pages(v_pages, page_table if v_page_table is None else v_page_table, v_scales)
    check_pages(keys, values, seqs, q_heads, head_dim)
    window, scale = checked_window(window), checked_scale(scale, head_dim)
    check_array("starts", starts, jnp.int32, (seqs,))
    check_array("counts", counts, jnp.int32, (seqs,))
    check_key_bias(key_bias, seqs, keys.keys)
    out, lse = dispatch.run(
        "prefill_attention",
        _IMPLEMENTATIONS,
        implementation,
        q,
        keys,
        values,
        starts,
        jnp.clip(counts, 0, jnp.clip(keys.keys - starts, 0, chunk)),
        scale=scale,
        window=window,
        key_bias=key_bias,
    )
    return (out, lse) if return_lse else out
