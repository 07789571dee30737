"""Public function of decode attention: checks and choice of implementation."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, Shaped

from pallas_kernels import cudnn, dispatch
from pallas_kernels.checks import check_array
from pallas_kernels.decode_attention import mosaic, reference, xla
from pallas_kernels.key_bias import KeyBias, check_key_bias
from pallas_kernels.paged import Pages, check_pages, checked_scale, checked_window

_IMPLEMENTATIONS = {
    "mosaic": mosaic.decode_attention,
    "cudnn": cudnn.decode_attention,
    "xla": xla.decode_attention,
    "reference": reference.decode_attention,
}


def decode_attention(
    q: Float[Array, "batch q_heads head_dim"],
    k_pages: Shaped[Array, "rows page_size kv_heads head_dim"],
    v_pages: Shaped[Array, "v_rows page_size kv_heads head_dim"],
    page_table: Int32[Array, "batch width"],
    lengths: Int32[Array, " batch"],
    *,
    v_page_table: Int32[Array, "batch width"] | None = None,
    scale: float | None = None,
    window: int | None = None,
    key_bias: KeyBias | None = None,
    k_scales: Float32[Array, "rows kv_heads page_size"] | None = None,
    v_scales: Float32[Array, "v_rows kv_heads page_size"] | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
) -> (
    Float[Array, "batch q_heads head_dim"]
    | tuple[Float[Array, "batch q_heads head_dim"], Float32[Array, "batch q_heads"]]
):
    """Attends with the newest token of each sequence to all its keys, its own included.

    Args:
      q: queries; query head h reads key/value head `h // (q_heads // kv_heads)`.
      k_pages, v_pages: rows of `page_size` tokens; they may be one array, the arena.
      page_table: row ids of the keys of each sequence, in token order. All must be valid, also those of pages past its
        end: such pages may be loaded, though nothing in them reaches a result.
      lengths: number of keys of each sequence, in tokens; 0 marks a padding row, whose result is zero. At most
        `width * page_size`: of a longer one that many count.
      v_page_table: row ids of the values; the same as those of the keys if left out.
      scale: factor of the scores, static: a finite number of Python or NumPy; `1 / sqrt(head_dim)` if left out.
      window: sliding window, static: a query at position p sees the keys at positions j with `p - window < j <= p`; all
        keys up to its own if left out. Only differences of positions count, so a table may leave out whole pages before
        the first key in sight if `lengths` are counted from the first page that it has.
      key_bias: added to the scaled scores of some keys of each sequence.
      k_scales, v_scales: factors of each token's keys and values, which pages of 8 bits need; like the pages, they may
        be one array.
      return_lse: also return the log of the sum of the exponentials of each query's scores, for merging parts.
      implementation: "auto": the first of the following that can; "mosaic": split-KV kernel for GPUs of compute
        capability 9.0 (bfloat16 or float16 queries, pages of their type or float8_e4m3fn, `head_dim` a multiple of 16
        up to 128 or of 32 up to 256, `page_size` 8, 16, 32 or a multiple of 64, up to 64 query heads a key/value
        head); "cudnn": any NVIDIA GPU with cuDNN (one type of 16 bits throughout, no window, bias or scales); "xla": a
        page of each sequence at a time; "reference": gathers the pages (memory `batch * width * page_size` keys and
        values), the only one that can be differentiated.

    Returns:
      Values `[batch, q_heads, head_dim]`, weighed by the softmax of the scores; with `return_lse` also
      `[batch, q_heads]`, -inf for padding rows.

    Raises:
      ValueError: shapes or types that don't fit together, or an unknown implementation.
      NotImplementedError: the chosen implementation can't do these arguments; of "auto" none can, and the message says
        why each can't.
    """
    check_array("q", q, jnp.floating, ("batch", "q_heads", "head_dim"))
    batch, q_heads, head_dim = q.shape
    keys = Pages(k_pages, page_table, k_scales)
    values = Pages(v_pages, page_table if v_page_table is None else v_page_table, v_scales)
    check_pages(keys, values, batch, q_heads, head_dim)
    window, scale = checked_window(window), checked_scale(scale, head_dim)
    check_array("lengths", lengths, jnp.int32, (batch,))
    check_key_bias(key_bias, batch, keys.keys)
    out, lse = dispatch.run(
        "decode_attention",
        _IMPLEMENTATIONS,
        implementation,
        q,
        keys,
        values,
        jnp.clip(lengths, 0, keys.keys),
        scale=scale,
        window=window,
        key_bias=key_bias,
    )
    return (out, lse) if return_lse else out
