"""Public function of Interleaved Head Attention's decode: checks and choice of implementation."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import dispatch
from pallas_kernels.checks import check_array
from pallas_kernels.iha_decode import mix, mosaic, reference, xla
from pallas_kernels.paged import Pages, check_pages, checked_scale
from pallas_kernels.pseudo_heads import PseudoHeads, check_pseudo_heads

_IMPLEMENTATIONS = {
    "mosaic": mosaic.iha_decode,
    "cudnn": mix.cudnn,
    "xla": xla.iha_decode,
    "reference": reference.iha_decode,
}


def iha_decode(
    q: Float[Array, "batch q_heads pseudo head_dim"],
    k_pages: Float[Array, "rows page_size kv_heads head_dim"],
    v_pages: Float[Array, "v_rows page_size kv_heads head_dim"],
    page_table: Int32[Array, "batch width"],
    lengths: Int32[Array, " batch"],
    pseudo: PseudoHeads,
    *,
    v_page_table: Int32[Array, "batch width"] | None = None,
    scale: float | None = None,
    implementation: str = "auto",
) -> Float[Array, "batch q_heads pseudo head_dim"]:
    """Attends with all pseudo queries of the newest token of each sequence to the pseudo keys in sight.

    Interleaved Head Attention (arXiv 2602.21371). The pages hold raw keys and values, those of the newest token
    included: with P pseudo heads a P-th of what pseudo keys and values would take. What pseudo heads make of them, and
    what a pseudo query sees, is said by `PseudoHeads`. One softmax runs over all pseudo keys in sight. The collapse of
    the pseudo heads is left to the caller.

    Args:
      q: pseudo query p of each query head, rotated by its own pseudo position.
      k_pages, v_pages: rows of `page_size` tokens, keys rotated at their token's position; they may be one array, the
        arena.
      page_table: row ids of the keys of each sequence, in token order. All must be valid, also those of pages past its
        end: such pages may be loaded, though nothing in them reaches a result.
      lengths: number of tokens of each sequence; 0 marks a padding row, whose result is zero. At most
        `width * page_size`: of a longer one that many count.
      pseudo: alphas of `kv_heads` source and `q_heads` destination heads, phases, mask and window. Only differences of
        positions count, so with a window a table may leave out whole pages before the first key in sight
        (`pseudo.tokens_in_sight`) if `lengths` are counted from the first page that it has.
      v_page_table: row ids of the values; the same as those of the keys if left out.
      scale: factor of the scores, static: a finite number of Python or NumPy; `1 / sqrt(head_dim)` if left out.
      implementation: "auto": the first of the following that can; "mosaic": for GPUs of compute capability 9.0
        (bfloat16 or float16 throughout, `head_dim` a multiple of 16 up to 128), a split-KV kernel that reads raw keys
        and values (`page_size` 8, 16, 32 or a multiple of 64, up to 64 key/value heads), or, beyond that and where a
        model of the cost says so, `decode_attention`'s kernel over pseudo keys and values, made for as many heads and
        sequences at a time as some 256 MiB hold, at least one of each; "cudnn": any NVIDIA GPU with cuDNN (16 bits, no
        window), likewise; "xla": a page of each sequence at a time, by raw or by pseudo keys and values, whichever
        takes fewer operations; "reference": gathers the pages and makes all pseudo keys and values, the only one that
        can be differentiated. Both compute in float32, or in float64 where `q` is of that.

    Returns:
      Pseudo outputs `[batch, q_heads, pseudo, head_dim]`.

    Raises:
      ValueError: shapes or types that don't fit together, or an unknown implementation.
      NotImplementedError: the chosen implementation can't do these arguments; of "auto" none can, and the message says
        why each can't.
    """
    check_array("q", q, jnp.floating, ("batch", "q_heads", "pseudo", "head_dim"))
    batch, q_heads, _, head_dim = q.shape
    keys = Pages(k_pages, page_table)
    values = Pages(v_pages, page_table if v_page_table is None else v_page_table)
    check_pages(keys, values, batch, q_heads, head_dim)
    check_pseudo_heads(pseudo, q_heads, keys.kv_heads, head_dim)
    check_array("q", q, jnp.floating, ("batch", "q_heads", pseudo.count, "head_dim"))
    scale = checked_scale(scale, head_dim)
    check_array("lengths", lengths, jnp.int32, (batch,))
    return dispatch.run(
        "iha_decode",
        _IMPLEMENTATIONS,
        implementation,
        q,
        keys,
        values,
        jnp.clip(lengths, 0, keys.keys),
        pseudo,
        scale=scale,
    )
