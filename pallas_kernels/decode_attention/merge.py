"""Merges parts of split-KV attention on Hopper, always in the same order."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import target
from pallas_kernels.decode_attention.plan import Plan
from pallas_kernels.paged_tiles import LOG2E

ROW_BLOCK = 8  # queries are padded to a multiple of this, the rows of a tile in shared memory


def merge(
    parts: Float[Array, "items kv_heads group head_dim"],
    lse: Float[Array, "items kv_heads group"],
    work: Plan,
    dtype: Any,
) -> tuple[Float[Array, "batch kv_heads group head_dim"], Float[Array, "batch kv_heads group"]]:
    """Weighs the parts of each sequence by the sums of their weights; a sequence of no items gets 0 and -inf."""
    _, kv_heads, group, head_dim = parts.shape
    batch = work.first.shape[0]
    shape = (ROW_BLOCK, head_dim)

    def decode_attention_merge(parts_ref, lse_ref, first_ref, count_ref, out_ref, lse_out_ref):  # type: ignore[no-untyped-def]
        row, head, block = jax.lax.axis_index("row"), jax.lax.axis_index("head"), jax.lax.axis_index("block")
        first, count = first_ref[row], count_ref[row]
        rows = pl.ds(block * ROW_BLOCK, ROW_BLOCK)
        layout = plgpu.Layout.WG_STRIDED(shape, vec_size=_vector(shape))
        at = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)

        def by_row(scalars: list[Any]) -> Any:
            full = jnp.full(shape, scalars[0], jnp.float32)
            for i in range(1, ROW_BLOCK):
                full = jnp.where(at == i, scalars[i], full)
            return full

        def sums(item: Any) -> list[Any]:
            return [lse_ref[item, head, block * ROW_BLOCK + i] for i in range(ROW_BLOCK)]

        def highest(i: Any, tops: Any) -> Any:
            return [jnp.maximum(top, one) for top, one in zip(tops, sums(first + i), strict=True)]

        tops = jax.lax.fori_loop(0, count, highest, [jnp.float32(-jnp.inf)] * ROW_BLOCK)

        def add(i: Any, carry: Any) -> Any:
            out, totals = carry
            weights = [jnp.exp2(one - top) for top, one in zip(tops, sums(first + i), strict=True)]
            part = plgpu.load(parts_ref.at[first + i, head, rows], layout=layout)
            return out + part * by_row(weights), [total + weight for total, weight in zip(totals, weights, strict=True)]

        zero = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)
        out, totals = jax.lax.fori_loop(0, count, add, (zero, [jnp.float32(0)] * ROW_BLOCK))
        inverse = [jnp.where(count > 0, 1 / total, 0) for total in totals]
        out_ref[row, head, rows] = (out * by_row(inverse)).astype(dtype)
        for i in range(ROW_BLOCK):
            lse_out_ref[row, head, block * ROW_BLOCK + i] = (tops[i] + jnp.log2(totals[i])) / LOG2E

    kernel: Any = plgpu.kernel(
        decode_attention_merge,
        out_type=(
            jax.ShapeDtypeStruct((batch, kv_heads, group, head_dim), dtype),
            jax.ShapeDtypeStruct((batch, kv_heads, group), jnp.float32),
        ),
        grid=(batch, kv_heads, group // ROW_BLOCK),
        grid_names=("row", "head", "block"),
        compiler_params=target.PARAMS,
    )
    out, lse = kernel(parts, lse, work.first, work.number)
    return out, lse


def _vector(shape: tuple[int, int]) -> int:
    """Neighbouring numbers of one thread: 16 bytes of float32, or as many as 128 threads can share out."""
    return math.gcd(4, math.prod(shape) // 128)
