"""Split-KV decode attention for Hopper in Pallas Mosaic GPU.

The keys of all sequences are cut into tiles of `TILE`, and the tiles into items of about equal length: a block of the
grid takes one item of one key/value head, loads its pages with TMA a few tiles ahead, and multiplies with wgmma. The
queries that share the head are the rows of the products. A second kernel merges the items of each sequence, always in
the same order. The work is planned from `lengths` alone, so that all layers of a step share one plan.

Rows of 8 bits are brought to float16, which holds them exactly, in shared memory; their scales go to the scores and to
the weights.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import target, tuning
from pallas_kernels.decode_attention.merge import ROW_BLOCK, merge
from pallas_kernels.decode_attention.plan import TILE, Plan, plan
from pallas_kernels.key_bias import KeyBias
from pallas_kernels.paged import Pages
from pallas_kernels.paged_tiles import LOG2E, Tiling, bias_log2, spread
from pallas_kernels.target import swizzled

_ROWS = 64  # queries of one step, wgmma's M: those beyond the group compute what nobody reads
_FP8_MAX = float(jnp.finfo(jnp.float8_e4m3fn).max)


@dataclasses.dataclass(frozen=True, slots=True)
class Config:
    """What is tuned: tiles loaded ahead, and blocks that a multiprocessor should have."""

    stages: int = 2
    blocks: int = 2

    def __post_init__(self) -> None:
        if self.stages < 1 or self.blocks < 1:
            raise ValueError(f"{self.stages=} and {self.blocks=} must be at least 1")


CANDIDATES = (Config(2, 1), Config(2, 4), Config(3, 2), Config(4, 1))


def decode_attention(
    q: Float[Array, "batch q_heads head_dim"],
    keys: Pages,
    values: Pages,
    lengths: Int32[Array, " batch"],
    *,
    scale: float,
    window: int | None = None,
    key_bias: KeyBias | None = None,
    config: Config | None = None,
) -> tuple[Float[Array, "batch q_heads head_dim"], Float32[Array, "batch q_heads"]]:
    """See `api.decode_attention`."""
    device = target.hopper()
    batch, q_heads, head_dim = q.shape
    page_size, kv_heads, dtype = keys.page_size, keys.kv_heads, keys.rows.dtype
    scaled = keys.scales is not None
    if q.dtype not in (jnp.bfloat16, jnp.float16) or dtype != (jnp.float8_e4m3fn if scaled else q.dtype):
        raise NotImplementedError(
            f"queries must be bfloat16 or float16, pages of their type or float8_e4m3fn with scales: {q.dtype}, {dtype}"
        )
    if scaled != (values.scales is not None):
        raise NotImplementedError("keys and values must both have scales, or none of them")
    if head_dim % (16 * _halves(head_dim)) or head_dim > 256:
        raise NotImplementedError(f"{head_dim=} must be a multiple of 16 up to 128, or of 32 up to 256")
    if not Tiling.fits(TILE, page_size):
        raise NotImplementedError(f"{page_size=} must be 8, 16, 32 or a multiple of {TILE}")
    group = q_heads // kv_heads
    if group > _ROWS:
        raise NotImplementedError(f"{group} query heads share a key/value head; at most {_ROWS} can")
    if batch == 0:
        raise NotImplementedError("no queries")
    if config is None:
        workload: dict[str, object] = {
            "head_dim": head_dim,
            "group": group,
            "page_size": page_size,
            "dtype": dtype.name,
        }
        workload["biased"] = key_bias is not None
        config = tuning.choose("decode_attention", Config(), device, **workload)
    padded = pl.cdiv(group, ROW_BLOCK) * ROW_BLOCK
    grouped = jnp.pad(q.reshape(batch, kv_heads, group, head_dim), ((0, 0), (0, 0), (0, padded - group), (0, 0)))
    if scaled:
        grouped = grouped.astype(jnp.float16)
    slots = max(1, device.multiprocessors * config.blocks // kv_heads)
    work = plan(lengths, keys.keys, window, slots)
    parts, lse = _attend(grouped, keys, values, lengths, work, scale, window, key_bias, config)
    out, lse = merge(parts, lse, work, q.dtype)
    return out[:, :, :group].reshape(q.shape), lse[:, :, :group].reshape(batch, q_heads)


def _attend(
    q: Float[Array, "batch kv_heads group head_dim"],
    keys: Pages,
    values: Pages,
    lengths: Int32[Array, " batch"],
    work: Plan,
    scale: float,
    window: int | None,
    key_bias: KeyBias | None,
    config: Config,
) -> tuple[Float[Array, "items kv_heads group head_dim"], Float[Array, "items kv_heads group"]]:
    """Attention to the keys of each item, and log2 of the sum of its weights; items of no tiles are left unwritten."""
    _, kv_heads, group, head_dim = q.shape
    items = work.row.shape[0]
    stages = config.stages
    tiling = Tiling(TILE, keys.page_size, keys.table.shape[1])
    scaled = keys.scales is not None
    # wgmma wants one swizzle of all its operands: the widest that cuts a row of a head evenly.
    halves = _halves(head_dim)
    half_dim = head_dim // halves
    columns = math.gcd(half_dim, 64)
    key_parts = [pl.ds(at, columns) for at in range(0, head_dim, columns)]
    value_parts = key_parts[: len(key_parts) // halves]
    arguments = {
        "q": q,
        "k": keys.rows,
        "v": values.rows,
        "k_table": keys.table,
        "v_table": values.table,
        "lengths": lengths,
        "row": work.row,
        "tile": work.tile,
        "tiles": work.tiles,
    }
    optional = {
        "k_scales": keys.scales,
        "v_scales": values.scales,
        "bits": None if key_bias is None else key_bias.bits,
        "bias": None if key_bias is None else key_bias.value,
    }
    arguments |= {name: array for name, array in optional.items() if array is not None}

    def decode_attention_parts(*refs: Any) -> None:
        *inputs, out_ref, lse_ref = refs
        ref = dict(zip(arguments, inputs, strict=True))
        head, item, half = jax.lax.axis_index("head"), jax.lax.axis_index("item"), jax.lax.axis_index("half")
        own = pl.ds(half * half_dim, half_dim) if halves > 1 else slice(None)
        row, begin, tiles = ref["row"][item], ref["tile"][item], ref["tiles"][item]
        length = ref["lengths"][row]

        def rows_of(name: str, tile: Any) -> list[Any]:
            return tiling.rows(ref[name + "_table"], row, tile)

        def load(name: str, smem: dict[str, Any], slot: Any, tile: Any, rows: list[Any]) -> None:
            ready = smem[name + "_ready"].at[slot]
            head_part = own if name == "v" else slice(None)
            tiling.load(tile, rows, smem[name].at[slot], ready, ref[name], [head, head_part], 0)
            if scaled:
                scales = name + "_scales"
                tiling.load(tile, rows, smem[scales].at[slot], ready, ref[scales], [head], 1)

        def in_sight(position: Any) -> Any:
            return position < length if window is None else (position < length) & (position >= length - window)

        def scores_of(smem: dict[str, Any], slot: Any, tile: Any) -> tuple[Any, Any]:
            """Scores of a tile in units of log2, -inf where no key is in sight, and whether one is."""
            tile_keys = smem["k"].at[slot]
            if scaled:
                for part in key_parts:
                    loaded = plgpu.load(tile_keys.at[:, part], layout=plgpu.Layout.WGMMA)
                    smem["wide"][:, part] = loaded.astype(q.dtype)
                plgpu.commit_smem()
                tile_keys = smem["wide"]

            def product(scores_ref: Any) -> Any:
                plgpu.wgmma(scores_ref, smem["q"], tile_keys.transpose((1, 0)))
                return scores_ref[...]

            scores = pl.run_scoped(product, plgpu.ACC((_ROWS, TILE), jnp.float32)) * (scale * LOG2E)
            if scaled:
                scores *= by_key(smem["k_scales"].at[slot])
            column = plgpu.broadcasted_iota(jnp.int32, (_ROWS, TILE), 1, layout=plgpu.Layout.WGMMA)
            if key_bias is not None:
                scores += bias_log2(ref["bits"], ref["bias"][row], row, tile, column)
            seen = in_sight(tile * TILE + column)
            return jnp.where(seen, scores, -jnp.inf), seen

        def by_key(scales: Any) -> Any:
            one = plgpu.load(scales, layout=plgpu.Layout.WGMMA.reduce(0))
            return spread(one, (_ROWS, TILE), 1)

        def values_of(smem: dict[str, Any], slot: Any, tile: Any) -> Any:
            """Where the values of a tile lie: 0 out of sight, where 0 * NaN might reach the sum."""

            def clean(target_ref: Any) -> None:
                at = plgpu.broadcasted_iota(jnp.int32, (TILE, columns), 0, layout=plgpu.Layout.WGMMA)
                written = in_sight(tile * TILE + at)
                for part in value_parts:
                    loaded = plgpu.load(smem["v"].at[slot, :, part], layout=plgpu.Layout.WGMMA).astype(q.dtype)
                    target_ref[:, part] = jnp.where(written, loaded, jnp.zeros_like(loaded))
                plgpu.commit_smem()

            if scaled:
                clean(smem["wide"])
                return smem["wide"]
            unclean = (tile + 1) * TILE > length
            if window is not None:
                unclean |= tile * TILE < length - window
            pl.when(unclean)(lambda: clean(smem["v"].at[slot]))
            return smem["v"].at[slot]

        def attend(smem: dict[str, Any]) -> Any:
            plgpu.copy_gmem_to_smem(ref["q"].at[row, head], smem["q"].at[pl.ds(0, group)], smem["q_ready"])
            for i in range(stages):

                @pl.when(i < tiles)
                def _(i: int = i) -> None:
                    for name in ("k", "v"):
                        load(name, smem, i, begin + i, rows_of(name, begin + i))

            plgpu.barrier_wait(smem["q_ready"])

            def step(i: Any, carry: Any) -> Any:
                acc, top, total = carry
                slot, tile = jax.lax.rem(i, jnp.int32(stages)), begin + i
                # Read before the waits, which they overlap.
                ahead, more = tile + stages, i + stages < tiles
                k_rows, v_rows = rows_of("k", ahead), rows_of("v", ahead)
                plgpu.barrier_wait(smem["k_ready"].at[slot])
                scores, seen = scores_of(smem, slot, tile)

                @pl.when(more)
                def _() -> None:
                    load("k", smem, slot, ahead, k_rows)

                # Every tile has a key in sight, so the maximum is finite.
                higher = jnp.maximum(top, scores.max(axis=1))
                decay = jnp.exp2(top - higher)
                weights = jnp.exp2(scores - spread(higher, scores.shape, 0))
                total = total * decay + weights.sum(axis=1)
                plgpu.barrier_wait(smem["v_ready"].at[slot])
                if scaled:
                    # The scales alone would bring small weights below what float16 holds; taken back at the end.
                    weights = jnp.where(seen, weights * (by_key(smem["v_scales"].at[slot]) * _FP8_MAX), 0)
                smem["p"][...] = weights.astype(q.dtype)
                plgpu.commit_smem()
                tile_values = values_of(smem, slot, tile)

                def product(acc_ref: Any, part: Any) -> Any:
                    plgpu.wgmma(acc_ref, smem["p"], tile_values.at[:, part])
                    return acc_ref[...]

                acc = [
                    one * spread(decay, one.shape, 0)
                    + pl.run_scoped(functools.partial(product, part=part), plgpu.ACC((_ROWS, columns), jnp.float32))
                    for one, part in zip(acc, value_parts, strict=True)
                ]

                @pl.when(more)
                def _() -> None:
                    load("v", smem, slot, ahead, v_rows)

                return acc, higher, total

            column = plgpu.Layout.WGMMA.reduce(1)
            zero = plgpu.layout_cast(jnp.zeros((_ROWS, columns), jnp.float32), plgpu.Layout.WGMMA)
            none = plgpu.layout_cast(jnp.full((_ROWS,), -jnp.inf, jnp.float32), column)
            nothing = plgpu.layout_cast(jnp.zeros((_ROWS,), jnp.float32), column)
            return jax.lax.fori_loop(0, tiles, step, ([zero for _ in value_parts], none, nothing))

        def store(acc: Any, top: Any, total: Any, out_smem: Any, lse_smem: Any) -> None:
            whole = total * _FP8_MAX if scaled else total
            for one, part in zip(acc, value_parts, strict=True):
                out_smem[:, part] = one / spread(whole, one.shape, 0)
            lse_smem[...] = top + jnp.log2(total)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, group)], out_ref.at[item, head, :, own])

            @pl.when(half == 0)
            def _() -> None:
                plgpu.copy_smem_to_gmem(lse_smem.at[pl.ds(0, group)], lse_ref.at[item, head])

            plgpu.wait_smem_to_gmem(0)

        tile_ready = plgpu.Barrier(num_arrivals=tiling.pieces * (2 if scaled else 1), num_barriers=stages)
        transforms = () if scaled else swizzled(columns)
        scratch = {
            "q": plgpu.SMEM((_ROWS, head_dim), q.dtype, transforms=swizzled(columns)),
            "k": plgpu.SMEM((stages, TILE, head_dim), keys.rows.dtype, transforms=transforms),
            "v": plgpu.SMEM((stages, TILE, half_dim), keys.rows.dtype, transforms=transforms),
            "p": plgpu.SMEM((_ROWS, TILE), q.dtype, transforms=swizzled(columns)),
            "q_ready": plgpu.Barrier(),
            "k_ready": tile_ready,
            "v_ready": tile_ready,
        }
        if scaled:
            scratch |= {
                "wide": plgpu.SMEM((TILE, head_dim), q.dtype, transforms=swizzled(columns)),
                "k_scales": plgpu.SMEM((stages, TILE), jnp.float32),
                "v_scales": plgpu.SMEM((stages, TILE), jnp.float32),
            }

        @pl.when(tiles > 0)
        def _() -> None:
            acc, top, total = pl.run_scoped(
                lambda *smem: attend(dict(zip(scratch, smem, strict=True))), *scratch.values()
            )
            # In the memory of the tiles, which are done.
            pl.run_scoped(
                functools.partial(store, acc, top, total),
                plgpu.SMEM((_ROWS, half_dim), jnp.float32),
                plgpu.SMEM((_ROWS,), jnp.float32),
            )

    kernel: Any = plgpu.kernel(
        decode_attention_parts,
        out_type=(
            jax.ShapeDtypeStruct((items, kv_heads, group, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((items, kv_heads, group), jnp.float32),
        ),
        grid=(kv_heads, items, halves),
        grid_names=("head", "item", "half"),
        compiler_params=target.PARAMS,
    )
    parts, lse = kernel(*arguments.values())
    return parts, lse


def _halves(head_dim: int) -> int:
    """Blocks of the grid that share an item: with over 128 columns two compute the same scores and half the values.

    The sums of all columns would not fit into registers beside the scores; the second block finds the keys in L2.
    """
    return 2 if head_dim > 128 else 1
