"""Public function of Interleaved Head Attention's prefill: checks and choice of implementation."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import dispatch
from pallas_kernels.checks import check_array
from pallas_kernels.iha_prefill import reference, virtual, xla
from pallas_kernels.paged import Pages, check_pages, checked_scale
from pallas_kernels.pseudo_heads import PseudoHeads, check_pseudo_heads

_IMPLEMENTATIONS = {
    "mosaic": virtual.mosaic,
    "cudnn": virtual.cudnn,
    "xla": xla.iha_prefill,
    "reference": reference.iha_prefill,
}


def iha_prefill(
    q: Float[Array, "seqs chunk q_heads pseudo head_dim"],
    k_pages: Float[Array, "rows page_size kv_heads head_dim"],
    v_pages: Float[Array, "v_rows page_size kv_heads head_dim"],
    page_table: Int32[Array, "seqs width"],
    starts: Int32[Array, " seqs"],
    counts: Int32[Array, " seqs"],
    pseudo: PseudoHeads,
    *,
    v_page_table: Int32[Array, "seqs width"] | None = None,
    scale: float | None = None,
    implementation: str = "auto",
) -> Float[Array, "seqs chunk q_heads pseudo head_dim"]:
    """Attends with all pseudo queries of a chunk of each sequence to the pseudo keys in sight (arXiv 2602.21371).

    The pages hold raw keys and values, those of the chunk itself included; what pseudo heads make of them, and what a
    pseudo query sees, is said by `PseudoHeads`. One softmax runs over all pseudo keys in sight. The collapse of the
    pseudo heads is left to the caller.

    Args:
      q: pseudo query p of token i of sequence s, which stands at position `starts[s] + i` and is rotated by its own
        pseudo position.
      k_pages, v_pages: rows of `page_size` tokens, keys rotated at their token's position; they may be one array, the
        arena.
      page_table: row ids of the keys of each sequence, in token order. All must be valid, also those of pages past its
        end: such pages may be loaded, though nothing in them reaches a result.
      starts: position of the first token of each chunk: the length of its cached prefix.
      counts: number of tokens of each chunk that are real; results of the others are zero. `starts + counts` is at most
        `width * page_size`: tokens whose position the table has no room for are not real.
      pseudo: alphas of `kv_heads` source and `q_heads` destination heads, phases, mask and window. Only differences of
        positions count, so with a window a table may leave out whole pages before the first key in sight
        (`pseudo.tokens_in_sight`) if `starts` are counted from the first page that it has.
      v_page_table: row ids of the values; the same as those of the keys if left out.
      scale: factor of the scores, static: a finite number of Python or NumPy; `1 / sqrt(head_dim)` if left out.
      implementation: "auto": the first of the following that can; "mosaic": `prefill_attention`'s kernel for GPUs of
        compute capability 9.0 (bfloat16 or float16, `head_dim` a multiple of 16 up to 128) over pseudo keys and values,
        which are made for as many heads and sequences at a time as some 256 MiB hold, at least one of each; "cudnn":
        any NVIDIA GPU with cuDNN (16 bits), likewise; "xla": a page of each sequence at a time, memory
        `seqs * q_heads * chunk * page_size * pseudo**2` scores; "reference": gathers the pages and makes all pseudo
        keys and values, the only one that can be differentiated. Both compute in float32, or in float64 where `q` is of
        that.

    Returns:
      Pseudo outputs `[seqs, chunk, q_heads, pseudo, head_dim]`.

    Raises:
      ValueError: shapes or types that don't fit together, or an unknown implementation.
      NotImplementedError: the chosen implementation can't do these arguments; of "auto" none can, and the message says
        why each can't.
    """
    check_array("q", q, jnp.floating, ("seqs", "chunk", "q_heads", "pseudo", "head_dim"))
    seqs, chunk, q_heads, _, head_dim = q.shape
    keys = Pages(k_pages, page_table)
    values = Pages(v_pages, page_table if v_page_table is None else v_page_table)
    check_pages(keys, values, seqs, q_heads, head_dim)
    check_pseudo_heads(pseudo, q_heads, keys.kv_heads, head_dim)
    check_array("q", q, jnp.floating, ("seqs", "chunk", "q_heads", pseudo.count, "head_dim"))
    scale = checked_scale(scale, head_dim)
    check_array("starts", starts, jnp.int32, (seqs,))
    check_array("counts", counts, jnp.int32, (seqs,))
    return dispatch.run(
        "iha_prefill",
        _IMPLEMENTATIONS,
        implementation,
        q,
        keys,
        values,
        starts,
        jnp.clip(counts, 0, jnp.clip(keys.keys - starts, 0, chunk)),
        pseudo,
        scale=scale,
    )
