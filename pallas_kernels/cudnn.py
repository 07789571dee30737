"""cuDNN's paged attention, by way of the one private module of JAX that this project reaches into.

JAX offers cuDNN through `jax.nn.dot_product_attention`, which knows no page tables. What takes them is private, so it
may move with any release: all that is known about it is in this file.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

_MODULE = "jax._src.cudnn.fused_attention_stablehlo"


def paged_decode_attention(
    q: Float[Array, "batch q_heads head_dim"],
    k_pages: Float[Array, "rows page_size kv_heads head_dim"],
    v_pages: Float[Array, "v_rows page_size kv_heads head_dim"],
    k_table: Int32[Array, "batch width"],
    v_table: Int32[Array, "batch width"],
    lengths: Int32[Array, " batch"],
    scale: float,
) -> Float[Array, "batch q_heads head_dim"]:
    """Attends with one token of each sequence to its keys.

    Args:
      q: bfloat16 or float16, like the pages.
      k_table, v_table: ids of rows of `k_pages` and `v_pages`, in token order.
      lengths: keys of each sequence; 0 for padding, whose output is 0.
      scale: of the scores.

    Raises:
      NotImplementedError: cuDNN can't be used here, or not for these shapes and types; found out by compiling a program
        of them once.
    """
    if q.dtype not in (jnp.bfloat16, jnp.float16) or k_pages.dtype != q.dtype or v_pages.dtype != q.dtype:
        raise NotImplementedError(
            f"queries and pages must be all bfloat16 or all float16: {q.dtype}, {k_pages.dtype}, {v_pages.dtype}"
        )
    arrays = (q, k_pages, v_pages, k_table, v_table, lengths)
    refusal = _refusal(_platform(), tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays), scale)
    if refusal is not None:
        raise NotImplementedError(f"cuDNN can't be used: {refusal}")
    return _attend(*arrays, scale=scale)


def _platform() -> str:
    """Of the device that the program being traced is for."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return str(abstract.platform)
    device = jax.config.jax_default_device or jax.devices()[0]
    return str(getattr(device, "platform", device))


@functools.lru_cache
def _refusal(platform: str, arrays: tuple[jax.ShapeDtypeStruct, ...], scale: float) -> str | None:
    """Why attention to such arrays can't be compiled; None if it can."""
    if platform not in ("gpu", "cuda"):
        return f"needs an NVIDIA GPU, not {platform}"
    try:
        # What is asked for is a program of its own: the mesh of the one being traced has no part in it.
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            jax.jit(functools.partial(_attend, scale=scale)).lower(*arrays).compile()
    except RuntimeError as error:  # of cuDNN, of XLA, or NotImplementedError
        return str(error)
    return None


def _attend(
    q: Float[Array, "batch q_heads head_dim"],
    k_pages: Float[Array, "rows page_size kv_heads head_dim"],
    v_pages: Float[Array, "v_rows page_size kv_heads head_dim"],
    k_table: Int32[Array, "batch width"],
    v_table: Int32[Array, "batch width"],
    lengths: Int32[Array, " batch"],
    *,
    scale: float,
) -> Float[Array, "batch q_heads head_dim"]:
    try:
        fused: Any = importlib.import_module(_MODULE)
        attention, layout, mask = fused._dot_product_attention, fused.AttentionLayout.BTNH, fused.MaskType.PADDING
        version = fused.check_cudnn_version()
    except (ImportError, AttributeError) as error:
        raise NotImplementedError(f"JAX {jax.__version__}: {error}") from error
    batch, width = k_table.shape
    unused = jnp.zeros(0, q.dtype)
    # Not by `fused.paged_attention`, which demands that the pages are exactly those of the tables: an arena holds more.
    out: jax.Array = attention(
        q[:, None],
        k_pages,
        v_pages,
        unused,  # bias
        jnp.ones(batch, jnp.int32),  # queries of each sequence
        lengths,
        unused,  # offsets of packed queries
        unused,  # offsets of packed keys
        k_table.reshape(batch, 1, width, 1),
        v_table.reshape(batch, 1, width, 1),
        scale,
        0,  # seed
        0.0,  # dropout
        (False, False),  # bias, and its gradient
        mask,
        layout.value,
        None,  # sliding window
        version,
        False,  # log of the sums
    )
    # What cuDNN makes of no keys at all is not said.
    return jnp.where(lengths[:, None, None] > 0, out[:, 0], jnp.zeros((), q.dtype))
