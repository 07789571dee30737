"""Split-KV decode attention for Hopper in Pallas Mosaic GPU.

The keys of all sequences are cut into tiles of `TILE`, and the tiles into items of about equal length: a block of the
grid takes one item of one key/value head, loads its pages with TMA a few tiles ahead, and multiplies with wgmma. The
queries that share the head are the rows of the products. A second kernel merges the items of each sequence, always in
the same order. The work is planned from `lengths` alone, so that all layers of a step share one plan.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels import target

TILE = 64  # keys of one step: one page of 64, a part of a larger one, or several smaller ones
_ROWS = 64  # queries of one step, wgmma's M: those beyond the group compute what nobody reads
_ROW_BLOCK = 8  # queries are padded to a multiple of this, the rows of a tile in shared memory
_LOG2E = math.log2(math.e)
# Layout in shared memory that TMA writes and wgmma reads, for numbers of two bytes.
_SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
_PARAMS = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup)


@dataclasses.dataclass(frozen=True)
class Config:
    """What is tuned: tiles loaded ahead, and blocks that a multiprocessor should have."""

    stages: int = 2
    blocks: int = 2


class Plan(NamedTuple):
    """Items of work, those of a sequence one after the other; `tiles` of those beyond the last one are 0."""

    row: jax.Array  # [items]
    tile: jax.Array  # [items], the first of the item
    tiles: jax.Array  # [items]
    first: jax.Array  # [batch], first item of the sequence
    number: jax.Array  # [batch], of its items


def plan(lengths: Int32[Array, " batch"], width: int, window: int | None, slots: int) -> Plan:
    """Cuts the keys in sight into items of at most `ceil(tiles / slots)` tiles, those of a sequence of about one size.

    Args:
      width: keys that a page table has room for.
      slots: items that run side by side; there are fewer than `slots + batch`.
    """
    batch = lengths.shape[0]
    start = jnp.zeros_like(lengths) if window is None else jnp.maximum(lengths - window, 0) // TILE
    tiles = pl.cdiv(lengths, TILE) - start
    share = jnp.maximum(pl.cdiv(jnp.sum(tiles), slots), 1)
    size = pl.cdiv(tiles, jnp.maximum(pl.cdiv(tiles, share), 1))
    count = jnp.where(tiles > 0, pl.cdiv(tiles, jnp.maximum(size, 1)), 0)
    ends = jnp.cumsum(count)
    item = jnp.arange(min(slots + batch, batch * pl.cdiv(width, TILE)), dtype=jnp.int32)
    row = jnp.minimum(jnp.searchsorted(ends, item, side="right").astype(jnp.int32), batch - 1)
    first = ends - count
    skipped = (item - first[row]) * size[row]
    left = jnp.where(item < ends[-1], tiles[row] - skipped, 0)
    return Plan(row, start[row] + skipped, jnp.clip(left, 0, size[row]), first, count)


def decode_attention(
    q: Float[Array, "batch q_heads head_dim"],
    k_pages: Float[Array, "rows page_size kv_heads head_dim"],
    v_pages: Float[Array, "v_rows page_size kv_heads head_dim"],
    k_table: Int32[Array, "batch width"],
    v_table: Int32[Array, "batch width"],
    lengths: Int32[Array, " batch"],
    scale: float,
    window: int | None = None,
    config: Config | None = None,
) -> Float[Array, "batch q_heads head_dim"]:
    """See `api.decode_attention`."""
    device = target.hopper()
    batch, q_heads, head_dim = q.shape
    _, page_size, kv_heads, _ = k_pages.shape
    if q.dtype not in (jnp.bfloat16, jnp.float16) or k_pages.dtype != q.dtype or v_pages.dtype != q.dtype:
        raise NotImplementedError(
            f"queries and pages must be all bfloat16 or all float16: {q.dtype}, {k_pages.dtype}, {v_pages.dtype}"
        )
    if head_dim not in (64, 128):
        raise NotImplementedError(f"{head_dim=} must be 64 or 128")
    if page_size < _ROW_BLOCK or (TILE % page_size and page_size % TILE):
        raise NotImplementedError(f"{page_size=} must be 8, 16, 32 or a multiple of {TILE}")
    group = q_heads // kv_heads
    if group > _ROWS:
        raise NotImplementedError(f"{group} query heads share a key/value head; at most {_ROWS} can")
    config = config or Config()
    padded = pl.cdiv(group, _ROW_BLOCK) * _ROW_BLOCK
    grouped = jnp.pad(q.reshape(batch, kv_heads, group, head_dim), ((0, 0), (0, 0), (0, padded - group), (0, 0)))
    slots = max(1, device.multiprocessors * config.blocks // kv_heads)
    work = plan(lengths, k_table.shape[1] * page_size, window, slots)
    parts, lse = _attend(grouped, k_pages, v_pages, k_table, v_table, lengths, work, scale, window, config)
    out, lse = _merge(parts, lse, work, q.dtype)
    return out[:, :, :group].reshape(q.shape)


def _attend(
    q: Float[Array, "batch kv_heads group head_dim"],
    k_pages: Float[Array, "rows page_size kv_heads head_dim"],
    v_pages: Float[Array, "v_rows page_size kv_heads head_dim"],
    k_table: Int32[Array, "batch width"],
    v_table: Int32[Array, "batch width"],
    lengths: Int32[Array, " batch"],
    work: Plan,
    scale: float,
    window: int | None,
    config: Config,
) -> tuple[Float[Array, "items kv_heads group head_dim"], Float[Array, "items kv_heads group"]]:
    """Attention to the keys of each item, and log2 of the sum of its weights; items of no tiles are left unwritten."""
    _, kv_heads, group, head_dim = q.shape
    page_size, width = k_pages.shape[1], k_table.shape[1]
    items = work.row.shape[0]
    stages = config.stages
    piece = min(TILE, page_size)
    pieces = TILE // piece

    def decode_attention_parts(  # type: ignore[no-untyped-def]
        q_ref, k_ref, v_ref, k_table_ref, v_table_ref, lengths_ref, row_ref, tile_ref, tiles_ref, out_ref, lse_ref
    ):
        head, item = jax.lax.axis_index("head"), jax.lax.axis_index("item")
        row, begin, tiles = row_ref[item], tile_ref[item], tiles_ref[item]
        length = lengths_ref[row]

        def rows_of(table_ref: Any, tile: Any) -> list[Any]:
            pages = [tile * TILE // page_size] if pieces == 1 else [tile * pieces + i for i in range(pieces)]
            # A tile may end beyond the table; what it loads there is masked.
            return [table_ref[row, jnp.minimum(page, width - 1)] for page in pages]

        def load(pages_ref: Any, smem: Any, barriers: Any, slot: Any, tile: Any, rows: list[Any]) -> None:
            offset = tile * TILE % page_size if page_size > TILE else 0
            for i, page_row in enumerate(rows):
                plgpu.copy_gmem_to_smem(
                    pages_ref.at[page_row, pl.ds(offset, piece), head],
                    smem.at[slot, pl.ds(i * piece, piece)],
                    barriers.at[slot],
                )

        def attend(q_smem: Any, k_smem: Any, v_smem: Any, p_smem: Any, q_ready: Any, k_ready: Any, v_ready: Any) -> Any:
            plgpu.copy_gmem_to_smem(q_ref.at[row, head], q_smem.at[pl.ds(0, group)], q_ready)
            for i in range(stages):

                @pl.when(i < tiles)
                def _(i: int = i) -> None:
                    load(k_ref, k_smem, k_ready, i, begin + i, rows_of(k_table_ref, begin + i))
                    load(v_ref, v_smem, v_ready, i, begin + i, rows_of(v_table_ref, begin + i))

            plgpu.barrier_wait(q_ready)

            def step(i: Any, carry: Any) -> Any:
                acc, top, total = carry
                slot = jax.lax.rem(i, jnp.int32(stages))
                tile = begin + i
                # Read before the waits, which they overlap.
                ahead = tile + stages
                k_rows, v_rows = rows_of(k_table_ref, ahead), rows_of(v_table_ref, ahead)
                more = i + stages < tiles
                plgpu.barrier_wait(k_ready.at[slot])

                def product_with_keys(scores_ref: Any) -> Any:
                    plgpu.wgmma(scores_ref, q_smem, k_smem.at[slot].transpose((1, 0)))
                    return scores_ref[...]

                scores = pl.run_scoped(product_with_keys, plgpu.ACC((_ROWS, TILE), jnp.float32))

                @pl.when(more)
                def _() -> None:
                    load(k_ref, k_smem, k_ready, slot, ahead, k_rows)

                keys = tile * TILE + plgpu.broadcasted_iota(jnp.int32, (_ROWS, TILE), 1, layout=plgpu.Layout.WGMMA)
                seen = keys < length
                if window is not None:
                    seen &= keys >= length - window
                scores = jnp.where(seen, scores * (scale * _LOG2E), -jnp.inf)
                # Every tile has a key in sight, so the maximum is finite.
                higher = jnp.maximum(top, scores.max(axis=1))
                decay = jnp.exp2(top - higher)
                weights = jnp.exp2(scores - jax.lax.broadcast_in_dim(higher, scores.shape, [0]))
                total = total * decay + weights.sum(axis=1)
                p_smem[...] = weights.astype(p_smem.dtype)
                plgpu.commit_smem()
                plgpu.barrier_wait(v_ready.at[slot])

                # Slots beyond the length hold anything, NaN included, and 0 * NaN would reach the sum.
                @pl.when((tile + 1) * TILE > length)
                def _() -> None:
                    values = plgpu.load(v_smem.at[slot], layout=plgpu.Layout.WGMMA)
                    at = plgpu.broadcasted_iota(jnp.int32, (TILE, head_dim), 0, layout=plgpu.Layout.WGMMA)
                    v_smem[slot] = jnp.where(tile * TILE + at < length, values, jnp.zeros_like(values))
                    plgpu.commit_smem()

                def product_with_values(part_ref: Any) -> Any:
                    plgpu.wgmma(part_ref, p_smem, v_smem.at[slot])
                    return part_ref[...]

                part = pl.run_scoped(product_with_values, plgpu.ACC((_ROWS, head_dim), jnp.float32))

                @pl.when(more)
                def _() -> None:
                    load(v_ref, v_smem, v_ready, slot, ahead, v_rows)

                return acc * jax.lax.broadcast_in_dim(decay, acc.shape, [0]) + part, higher, total

            column = plgpu.Layout.WGMMA.reduce(1)
            return jax.lax.fori_loop(
                0,
                tiles,
                step,
                (
                    plgpu.layout_cast(jnp.zeros((_ROWS, head_dim), jnp.float32), plgpu.Layout.WGMMA),
                    plgpu.layout_cast(jnp.full((_ROWS,), -jnp.inf, jnp.float32), column),
                    plgpu.layout_cast(jnp.zeros((_ROWS,), jnp.float32), column),
                ),
            )

        def store(acc: Any, top: Any, total: Any, out_smem: Any, lse_smem: Any) -> None:
            out_smem[...] = acc / jax.lax.broadcast_in_dim(total, acc.shape, [0])
            lse_smem[...] = top + jnp.log2(total)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, group)], out_ref.at[item, head])
            plgpu.copy_smem_to_gmem(lse_smem.at[pl.ds(0, group)], lse_ref.at[item, head])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(tiles > 0)
        def _() -> None:
            acc, top, total = pl.run_scoped(
                attend,
                plgpu.SMEM((_ROWS, head_dim), q.dtype, transforms=_SWIZZLED),
                plgpu.SMEM((stages, TILE, head_dim), q.dtype, transforms=_SWIZZLED),
                plgpu.SMEM((stages, TILE, head_dim), q.dtype, transforms=_SWIZZLED),
                plgpu.SMEM((_ROWS, TILE), q.dtype, transforms=_SWIZZLED),
                plgpu.Barrier(),
                plgpu.Barrier(num_arrivals=pieces, num_barriers=stages),
                plgpu.Barrier(num_arrivals=pieces, num_barriers=stages),
            )
            # In the memory of the tiles, which are done.
            pl.run_scoped(
                lambda *smem: store(acc, top, total, *smem),
                plgpu.SMEM((_ROWS, head_dim), jnp.float32),
                plgpu.SMEM((_ROWS,), jnp.float32),
            )

    kernel: Any = plgpu.kernel(
        decode_attention_parts,
        out_type=(
            jax.ShapeDtypeStruct((items, kv_heads, group, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((items, kv_heads, group), jnp.float32),
        ),
        grid=(kv_heads, items),
        grid_names=("head", "item"),
        compiler_params=_PARAMS,
    )
    parts, lse = kernel(q, k_pages, v_pages, k_table, v_table, lengths, work.row, work.tile, work.tiles)
    return parts, lse


def _merge(
    parts: Float[Array, "items kv_heads group head_dim"],
    lse: Float[Array, "items kv_heads group"],
    work: Plan,
    dtype: Any,
) -> tuple[Float[Array, "batch kv_heads group head_dim"], Float[Array, "batch kv_heads group"]]:
    """Weighs the parts of each sequence by the sums of their weights; a sequence of no items gets 0 and -inf."""
    _, kv_heads, group, head_dim = parts.shape
    batch = work.first.shape[0]
    shape = (_ROW_BLOCK, head_dim)

    def decode_attention_merge(parts_ref, lse_ref, first_ref, count_ref, out_ref, lse_out_ref):  # type: ignore[no-untyped-def]
        row, head, block = jax.lax.axis_index("row"), jax.lax.axis_index("head"), jax.lax.axis_index("block")
        first, count = first_ref[row], count_ref[row]
        rows = pl.ds(block * _ROW_BLOCK, _ROW_BLOCK)
        layout = plgpu.Layout.WG_STRIDED(shape, vec_size=_vector(shape))
        at = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)

        def spread(scalars: list[Any]) -> Any:
            full = jnp.full(shape, scalars[0], jnp.float32)
            for i in range(1, _ROW_BLOCK):
                full = jnp.where(at == i, scalars[i], full)
            return full

        def sums(item: Any) -> list[Any]:
            return [lse_ref[item, head, block * _ROW_BLOCK + i] for i in range(_ROW_BLOCK)]

        def highest(i: Any, tops: Any) -> Any:
            return [jnp.maximum(top, one) for top, one in zip(tops, sums(first + i), strict=True)]

        tops = jax.lax.fori_loop(0, count, highest, [jnp.float32(-jnp.inf)] * _ROW_BLOCK)

        def add(i: Any, carry: Any) -> Any:
            out, totals = carry
            weights = [jnp.exp2(one - top) for top, one in zip(tops, sums(first + i), strict=True)]
            part = plgpu.load(parts_ref.at[first + i, head, rows], layout=layout)
            return out + part * spread(weights), [total + weight for total, weight in zip(totals, weights, strict=True)]

        zero = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)
        out, totals = jax.lax.fori_loop(0, count, add, (zero, [jnp.float32(0)] * _ROW_BLOCK))
        inverse = [jnp.where(count > 0, 1 / total, 0) for total in totals]
        out_ref[row, head, rows] = (out * spread(inverse)).astype(dtype)
        for i in range(_ROW_BLOCK):
            lse_out_ref[row, head, block * _ROW_BLOCK + i] = (tops[i] + jnp.log2(totals[i])) / _LOG2E

    kernel: Any = plgpu.kernel(
        decode_attention_merge,
        out_type=(
            jax.ShapeDtypeStruct((batch, kv_heads, group, head_dim), dtype),
            jax.ShapeDtypeStruct((batch, kv_heads, group), jnp.float32),
        ),
        grid=(batch, kv_heads, group // _ROW_BLOCK),
        grid_names=("row", "head", "block"),
        compiler_params=_PARAMS,
    )
    out, lse = kernel(parts, lse, work.first, work.number)
    return out, lse


def _vector(shape: tuple[int, int]) -> int:
    """Neighbouring numbers of one thread: 16 bytes of float32, or what 128 threads leave."""
    return min(4, math.prod(shape) // 128)
