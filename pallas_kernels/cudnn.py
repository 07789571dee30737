"""cuDNN's attention for GPUs that the Mosaic kernels don't know, by way of the one private module of JAX in use here.

JAX offers cuDNN through `jax.nn.dot_product_attention`, which knows no page tables and rounds the log-sum-exp to the
type of the queries. What takes the one and returns the other is private, so it may move with any release: all that is
known about it is in this file.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.key_bias import KeyBias
from pallas_kernels.paged import Pages

_MODULE = "jax._src.cudnn.fused_attention_stablehlo"
_PLATFORMS = ("gpu", "cuda")
# Of one call: a long prompt over a long context is better read page by page.
_MAX_MASK_BYTES = 2**30


def decode_attention(
    q: Float[Array, "batch q_heads head_dim"],
    keys: Pages,
    values: Pages,
    lengths: Int32[Array, " batch"],
    *,
    scale: float,
    window: int | None = None,
    key_bias: KeyBias | None = None,
) -> tuple[Float[Array, "batch q_heads head_dim"], Float32[Array, "batch q_heads"]]:
    """See `decode_attention.api.decode_attention`; reads the pages where they are.

    Raises:
      NotImplementedError: cuDNN can't be used here, or not for these arguments; found out by compiling a program of
        their shapes once.
    """
    if window is not None:
        raise NotImplementedError(f"{window=}: cuDNN would count positions from the query's, which is 0")
    _check_scales(keys, values)
    out, lse = _attend(
        q[:, None],
        keys.rows,
        values.rows,
        key_bias=key_bias,
        lengths=lengths,
        tables=(keys.table, values.table),
        scale=scale,
    )
    # What cuDNN makes of no keys at all is not said.
    real = (lengths > 0)[:, None]
    return jnp.where(real[:, :, None], out[:, 0], jnp.zeros((), q.dtype)), jnp.where(real, lse[:, :, 0], -jnp.inf)


def prefill_attention(
    q: Float[Array, "seqs chunk q_heads head_dim"],
    keys: Pages,
    values: Pages,
    starts: Int32[Array, " seqs"],
    counts: Int32[Array, " seqs"],
    *,
    scale: float,
    window: int | None = None,
    key_bias: KeyBias | None = None,
) -> tuple[Float[Array, "seqs chunk q_heads head_dim"], Float32[Array, "seqs chunk q_heads"]]:
    """See `prefill_attention.api.prefill_attention`; gathers the pages and writes the mask out.

    cuDNN's own causal mask starts both queries and keys at 0, which a chunk behind a cached prefix does not.

    Raises:
      NotImplementedError: as `decode_attention`.
    """
    _check_scales(keys, values)
    mask_bytes = q.shape[0] * q.shape[1] * keys.keys * 2
    if mask_bytes > _MAX_MASK_BYTES:
        raise NotImplementedError(f"a mask of {mask_bytes} bytes; at most {_MAX_MASK_BYTES} are made")
    offsets = jnp.arange(q.shape[1], dtype=jnp.int32)
    positions = jnp.arange(keys.keys, dtype=jnp.int32)
    real = offsets < counts[:, None]
    ends = jnp.where(counts > 0, starts + counts, 0)
    queries = (starts[:, None] + offsets)[:, :, None]
    visible = positions <= queries
    if window is not None:
        visible &= positions > queries - window
    written = (positions < ends[:, None])[:, :, None, None]
    # Unused slots hold anything, NaN included, which a mask that is added doesn't hide.
    k, v = (
        jnp.where(written, p.rows[p.table].reshape(len(starts), keys.keys, *p.rows.shape[2:]), 0)
        for p in (keys, values)
    )
    out, lse = _attend(q, k, v, key_bias=key_bias, lengths=ends, visible=visible, scale=scale)
    lse = lse.swapaxes(1, 2)
    return jnp.where(real[:, :, None, None], out, jnp.zeros((), q.dtype)), jnp.where(real[:, :, None], lse, -jnp.inf)


def check_device() -> None:
    """Raises `NotImplementedError` if the program being traced is for no device that cuDNN knows."""
    if _platform() not in _PLATFORMS:
        raise NotImplementedError(f"cuDNN can't be used: needs an NVIDIA GPU, not {_platform()}")


def _check_scales(keys: Pages, values: Pages) -> None:
    if keys.scales is not None or values.scales is not None:
        raise NotImplementedError("pages with scales")


def _attend(
    q: Float[Array, "batch queries q_heads head_dim"],
    k: Float[Array, "rows keys kv_heads head_dim"],
    v: Float[Array, "v_rows keys kv_heads head_dim"],
    *,
    key_bias: KeyBias | None,
    lengths: Int32[Array, " batch"],
    tables: tuple[Int32[Array, "batch width"], Int32[Array, "batch width"]] | None = None,
    visible: Bool[Array, "batch queries keys"] | None = None,
    scale: float,
) -> tuple[Float[Array, "batch queries q_heads head_dim"], Float32[Array, "batch q_heads queries"]]:
    """`_fused`, if cuDNN can do that."""
    if not q.size:
        raise NotImplementedError("no queries")
    if key_bias is not None:
        raise NotImplementedError(f"key_bias: cuDNN would round its values to {q.dtype}")
    if q.dtype not in (jnp.bfloat16, jnp.float16) or k.dtype != q.dtype or v.dtype != q.dtype:
        raise NotImplementedError(
            f"queries and pages must be all bfloat16 or all float16: {q.dtype}, {k.dtype}, {v.dtype}"
        )
    arguments: dict[str, Any] = {"q": q, "k": k, "v": v, "lengths": lengths, "tables": tables, "visible": visible}
    leaves, tree = jax.tree.flatten(arguments)
    refusal = _refusal(_platform(), tree, tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in leaves), scale)
    if refusal is not None:
        raise NotImplementedError(f"cuDNN can't be used: {refusal}")
    return _fused(**arguments, scale=scale)


def _platform() -> str:
    """Of the device that the program being traced is for."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return str(abstract.platform)
    device = jax.config.jax_default_device or jax.devices()[0]
    return str(getattr(device, "platform", device))


@functools.lru_cache
def _refusal(
    platform: str, tree: jax.tree_util.PyTreeDef, arrays: tuple[jax.ShapeDtypeStruct, ...], scale: float
) -> str | None:
    """Why attention to such arrays can't be compiled; None if it can."""
    if platform not in _PLATFORMS:
        return f"needs an NVIDIA GPU, not {platform}"
    try:
        # What is asked for is a program of its own: the mesh of the one being traced has no part in it.
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            arguments = jax.tree.unflatten(tree, arrays)
            jax.jit(functools.partial(_fused, scale=scale)).lower(**arguments).compile()
    except RuntimeError as error:  # of cuDNN, of XLA, or NotImplementedError
        return str(error)
    return None


def _fused(
    *,
    q: Float[Array, "batch queries q_heads head_dim"],
    k: Float[Array, "rows keys kv_heads head_dim"],
    v: Float[Array, "v_rows keys kv_heads head_dim"],
    lengths: Int32[Array, " batch"],
    tables: tuple[Int32[Array, "batch width"], Int32[Array, "batch width"]] | None,
    visible: Bool[Array, "batch queries keys"] | None,
    scale: float,
) -> tuple[Float[Array, "batch queries q_heads head_dim"], Float32[Array, "batch q_heads queries"]]:
    """Attention to the first `lengths` keys: those of rows `tables` of `k` and `v`, or of row s for sequence s."""
    try:
        fused: Any = importlib.import_module(_MODULE)
        attention, layout, mask = fused._dot_product_attention, fused.AttentionLayout.BTNH, fused.MaskType.PADDING
        version = fused.check_cudnn_version()
    except (ImportError, AttributeError) as error:
        raise NotImplementedError(f"JAX {jax.__version__}: {error}") from error
    batch, queries = q.shape[:2]
    unused = jnp.zeros(0, q.dtype)
    bias = unused
    if visible is not None:
        bias = jnp.where(visible, 0, jnp.finfo(q.dtype).min / 2).astype(q.dtype)[:, None]
    k_table, v_table = (unused, unused) if tables is None else (t.reshape(batch, 1, -1, 1) for t in tables)
    # Not by `fused.paged_attention`, which demands that the pages are exactly those of the tables: an arena holds more.
    out, lse = attention(
        q,
        k,
        v,
        bias,
        jnp.full(batch, queries, jnp.int32),
        lengths,
        unused,  # offsets of packed queries
        unused,  # offsets of packed keys
        k_table,
        v_table,
        scale,
        0,  # seed
        0.0,  # dropout
        (visible is not None, False),  # bias, and its gradient
        mask,
        layout.value,
        None,  # sliding window
        version,
        True,  # log of the sums
    )
    return out, lse
