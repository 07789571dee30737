"""Retrieval scores for Hopper in Pallas Mosaic GPU.

A block of the grid takes some tiles of `_TILE` keys of one sequence. It goes through them, and for each through the
key/value heads that have a weighted query head, which are found beforehand: those of the others are not loaded. Keys
come with TMA a few tiles ahead and are the rows of wgmma's products; the queries that share a head are the columns. So
a key's sum stays within a row, in registers, over all heads.

Rows of 8 bits are brought to float16, which holds them exactly, in shared memory; their scales go to the scores.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import target, tuning
from pallas_kernels.paged import Pages
from pallas_kernels.paged_tiles import LOG2E, Tiling, spread
from pallas_kernels.target import swizzled

_TILE = 64  # keys of one step, wgmma's M
_COLUMNS = 8  # queries are padded to a multiple of this, the least that wgmma's N can be
_MAX_GROUP = 64
_MAX_TILES = 16  # of a block: where lengths differ, those of short sequences leave their multiprocessors early
_MAX_QUERY_BYTES = 64 * 1024  # in shared memory, of all heads


@dataclasses.dataclass(frozen=True, slots=True)
class Config:
    """What is tuned: tiles of a head loaded ahead, and blocks that a multiprocessor should have."""

    stages: int = 4
    blocks: int = 4

    def __post_init__(self) -> None:
        if self.stages < 1 or self.blocks < 1:
            raise ValueError(f"{self.stages=} and {self.blocks=} must be at least 1")


CANDIDATES = (Config(2, 4), Config(3, 8), Config(4, 2), Config(6, 4))


def retrieval_scores(
    q: Float[Array, "batch q_heads head_dim"],
    keys: Pages,
    lengths: Int32[Array, " batch"],
    lse: Float32[Array, "batch q_heads"],
    weights: Float32[Array, "batch q_heads"],
    *,
    scale: float,
) -> Float32[Array, "batch keys"]:
    """See `api.retrieval_scores`."""
    device = target.hopper()
    batch, q_heads, head_dim = q.shape
    page_size, kv_heads, dtype = keys.page_size, keys.kv_heads, keys.rows.dtype
    scaled = keys.scales is not None
    if q.dtype not in (jnp.bfloat16, jnp.float16) or dtype != (jnp.float8_e4m3fn if scaled else q.dtype):
        raise NotImplementedError(
            f"queries must be bfloat16 or float16, pages of their type or float8_e4m3fn with scales: {q.dtype}, {dtype}"
        )
    if head_dim % 16 or head_dim > 256:
        raise NotImplementedError(f"{head_dim=} must be a multiple of 16 up to 256")
    if not Tiling.fits(_TILE, page_size):
        raise NotImplementedError(f"{page_size=} must be 8, 16, 32 or a multiple of {_TILE}")
    group = q_heads // kv_heads
    if group > _MAX_GROUP:
        raise NotImplementedError(f"{group} query heads share a key/value head; at most {_MAX_GROUP} can")
    padded = pl.cdiv(group, _COLUMNS) * _COLUMNS
    if kv_heads * padded * head_dim * 2 > _MAX_QUERY_BYTES:
        raise NotImplementedError(f"queries of {kv_heads=}, {group=} and {head_dim=} exceed {_MAX_QUERY_BYTES} bytes")
    if batch == 0:
        raise NotImplementedError("no queries")
    config = tuning.choose(
        "retrieval_scores", Config(), device, head_dim=head_dim, group=group, page_size=page_size, dtype=dtype.name
    )
    all_tiles = pl.cdiv(keys.keys, _TILE)
    tiles = min(max(batch * all_tiles // (device.multiprocessors * config.blocks), 1), _MAX_TILES, all_tiles)
    tiles = 1 << tiles.bit_length() - 1  # so the blocks of most tables end where the table does: nothing is cut off

    def by_head(array: Array) -> Array:
        grouped = array.reshape(batch, kv_heads, group, *array.shape[2:])
        return jnp.pad(grouped, [(0, 0), (0, 0), (0, padded - group)] + [(0, 0)] * (grouped.ndim - 3))

    # 8-bit rows become float16, so queries do; what a head without a weight has found may be anything.
    queries = by_head(q.astype(jnp.float16) if scaled else q)
    terms = jnp.stack([by_head(weights), by_head(jnp.where(weights != 0, lse * LOG2E, 0.0))], axis=2)
    found = _score(queries, keys, lengths, terms, _heads(terms[:, :, 0]), scale, tiles, config)
    return found[:, : keys.keys]


class _Heads(NamedTuple):
    """Key/value heads with a weighted query head: the first `number` of `order`."""

    order: Int32[Array, "batch kv_heads"]
    number: Int32[Array, " batch"]


def _heads(weights: Float32[Array, "batch kv_heads group"]) -> _Heads:
    looked_at = jnp.any(weights != 0, axis=2)
    return _Heads(
        jnp.argsort(~looked_at, axis=1, stable=True).astype(jnp.int32), looked_at.sum(axis=1, dtype=jnp.int32)
    )


def _score(
    q: Float[Array, "batch kv_heads group head_dim"],
    keys: Pages,
    lengths: Int32[Array, " batch"],
    terms: Float32[Array, "batch kv_heads 2 group"],
    heads: _Heads,
    scale: float,
    tiles: int,
    config: Config,
) -> Float32[Array, "batch padded_keys"]:
    """The scores, zero past the end, of keys up to a multiple of a block's.

    Args:
      terms: weight of each query, and log2 of the sum of its weights.
      tiles: of a block.
    """
    batch, kv_heads, group, head_dim = q.shape
    stages = config.stages
    blocks = pl.cdiv(pl.cdiv(keys.keys, _TILE), tiles)
    tiling = Tiling(_TILE, keys.page_size, keys.table.shape[1])
    scaled = keys.scales is not None
    # wgmma wants one swizzle of both operands: the widest that cuts a row of a head evenly.
    columns = math.gcd(head_dim, 64)
    parts = [pl.ds(at, columns) for at in range(0, head_dim, columns)]
    arguments = {
        "q": q,
        "terms": terms,
        "k": keys.rows,
        "table": keys.table,
        "lengths": lengths,
        "order": heads.order,
        "count": heads.number,
    }
    if keys.scales is not None:
        arguments["k_scales"] = keys.scales

    def retrieval_scores_mosaic(*refs: Any) -> None:
        *inputs, out_ref = refs
        ref = dict(zip(arguments, inputs, strict=True))
        row, block = jax.lax.axis_index("row"), jax.lax.axis_index("block")
        begin, length, count = block * tiles, ref["lengths"][row], ref["count"][row]
        real = jnp.clip(pl.cdiv(length, _TILE) - begin, 0, tiles)
        steps = real * count  # all heads of a tile one after the other

        def place(step: Any) -> tuple[Any, Any, list[Any]]:
            """Tile, head and row ids of a step; it may be past the last one."""
            each = jnp.maximum(count, 1)
            tile = begin + jax.lax.div(step, each)
            return tile, ref["order"][row, jax.lax.rem(step, each)], tiling.rows(ref["table"], row, tile)

        def load(smem: dict[str, Any], slot: Any, tile: Any, head: Any, rows: list[Any]) -> None:
            ready = smem["k_ready"].at[slot]
            tiling.load(tile, rows, smem["k"].at[slot], ready, ref["k"], [head, slice(None)], 0)
            if scaled:
                tiling.load(tile, rows, smem["k_scales"].at[slot], ready, ref["k_scales"], [head], 1)

        def by_query(terms: Any) -> Any:
            return spread(plgpu.load(terms, layout=plgpu.Layout.WGMMA.reduce(0)), (_TILE, group), 1)

        def scores_of(smem: dict[str, Any], slot: Any, number: Any) -> Any:
            """Of the keys in a slot and the queries of a head, in units of log2."""
            tile_keys = smem["k"].at[slot]
            if scaled:
                for part in parts:
                    loaded = plgpu.load(tile_keys.at[:, part], layout=plgpu.Layout.WGMMA)
                    smem["wide"][:, part] = loaded.astype(q.dtype)
                plgpu.commit_smem()
                tile_keys = smem["wide"]

            def product(scores_ref: Any) -> Any:
                plgpu.wgmma(scores_ref, tile_keys, smem["q"].at[number].transpose((1, 0)))
                return scores_ref[...]

            scores = pl.run_scoped(product, plgpu.ACC((_TILE, group), jnp.float32)) * (scale * LOG2E)
            if scaled:
                factors = plgpu.load(smem["k_scales"].at[slot], layout=plgpu.Layout.WGMMA.reduce(1))
                scores *= spread(factors, scores.shape, 0)
            return scores

        def score(**smem: Any) -> None:
            def fetch(number: Any, _: Any) -> None:
                head, ready = ref["order"][row, number], smem["q_ready"].at[number]
                plgpu.copy_gmem_to_smem(ref["q"].at[row, head], smem["q"].at[number], ready)
                plgpu.copy_gmem_to_smem(ref["terms"].at[row, head], smem["terms"].at[number], ready)

            jax.lax.fori_loop(0, jnp.where(real > 0, count, 0), fetch, None)
            for step in range(stages):

                @pl.when(step < steps)
                def _(step: int = step) -> None:
                    load(smem, step, *place(jnp.int32(step)))

            def of_tile(number: Any, _: Any) -> None:
                position = plgpu.broadcasted_iota(jnp.int32, (_TILE, group), 0, layout=plgpu.Layout.WGMMA)
                is_key = (begin + number) * _TILE + position < length

                def of_head(i: Any, total: Any) -> Any:
                    step = number * count + i
                    slot, ahead = jax.lax.rem(step, jnp.int32(stages)), step + stages
                    # Read before the waits, which they overlap.
                    there = place(ahead)

                    @pl.when(number == 0)
                    def _() -> None:
                        plgpu.barrier_wait(smem["q_ready"].at[i])

                    plgpu.barrier_wait(smem["k_ready"].at[slot])
                    scores = scores_of(smem, slot, i)
                    # One thread starts the copies: all must be done with what was there.
                    plgpu.commit_smem()

                    @pl.when(ahead < steps)
                    def _() -> None:
                        load(smem, slot, *there)

                    weight, sums = by_query(smem["terms"].at[i, 0]), by_query(smem["terms"].at[i, 1])
                    part = jnp.where(is_key & (weight != 0), weight * jnp.exp2(scores - sums), 0.0)
                    return total + part.sum(axis=1)

                zero = plgpu.layout_cast(jnp.zeros((_TILE,), jnp.float32), plgpu.Layout.WGMMA.reduce(1))
                heads_of_tile = jnp.where(number < real, count, 0)
                smem["out"][pl.ds(number * _TILE, _TILE)] = jax.lax.fori_loop(0, heads_of_tile, of_head, zero)

            jax.lax.fori_loop(0, tiles, of_tile, None)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(smem["out"], out_ref.at[row, pl.ds(begin * _TILE, tiles * _TILE)])
            plgpu.wait_smem_to_gmem(0)

        scratch = {
            "q": plgpu.SMEM((kv_heads, group, head_dim), q.dtype, transforms=swizzled(columns)),
            "terms": plgpu.SMEM((kv_heads, 2, group), jnp.float32),
            "k": plgpu.SMEM((stages, _TILE, head_dim), keys.rows.dtype, transforms=() if scaled else swizzled(columns)),
            "out": plgpu.SMEM((tiles * _TILE,), jnp.float32),
            "q_ready": plgpu.Barrier(num_arrivals=2, num_barriers=kv_heads),
            "k_ready": plgpu.Barrier(num_arrivals=tiling.pieces * (2 if scaled else 1), num_barriers=stages),
        }
        if scaled:
            scratch |= {
                "wide": plgpu.SMEM((_TILE, head_dim), q.dtype, transforms=swizzled(columns)),
                "k_scales": plgpu.SMEM((stages, _TILE), jnp.float32),
            }
        pl.run_scoped(score, **scratch)

    kernel: Any = plgpu.kernel(
        retrieval_scores_mosaic,
        out_type=jax.ShapeDtypeStruct((batch, blocks * tiles * _TILE), jnp.float32),
        grid=(batch, blocks),
        grid_names=("row", "block"),
        compiler_params=target.PARAMS,
    )
    scores: Float32[Array, "batch padded_keys"] = kernel(*arguments.values())
    return scores
