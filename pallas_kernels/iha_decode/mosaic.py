"""Interleaved Head Attention of one token for Hopper in Pallas Mosaic GPU, by raw keys and values.

The rows of the products are all triples of pseudo key index, query head and pseudo query, `pseudo**2 * q_heads` of
them: a pseudo query turned back by the phase of the pseudo key, which is one more part of split-KV attention. A block
of the grid takes 64 rows and some tiles of 64 keys of one sequence, as `decode_attention.plan` deals them. For each
tile it goes through the source heads twice: the products with their keys are added up, weighed by row, to the scores;
after the softmax those with their values to the sums. What source heads count for stays float32: it is in no product.
At last `decode_attention.merge` takes all parts of a sequence together.

With more than 64 rows the blocks of an item load the same tiles, all but the first from L2 as a rule: memory is read
once, L2 once for each 64 rows. One block of two warpgroups would halve that, for barriers between the two at each slot.

Where there are so many rows that products would take longer than making pseudo keys and values, those are made (`mix`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import target, tuning
from pallas_kernels.decode_attention.merge import ROW_BLOCK, merge
from pallas_kernels.decode_attention.plan import TILE, Plan, plan
from pallas_kernels.iha_decode import mix
from pallas_kernels.iha_decode.absorbed import absorbed_is_faster, turned_back
from pallas_kernels.paged import Pages
from pallas_kernels.paged_tiles import LOG2E, Tiling, spread
from pallas_kernels.pseudo_heads import PseudoHeads
from pallas_kernels.target import swizzled

_ROWS = 64  # of a block, wgmma's M
_MAX_SOURCES = 64  # heads whose weights a block holds in shared memory
# Below any score: a row that sees no key of a tile must not bring in -inf - -inf.
_LOWEST = -1e30


@dataclasses.dataclass(frozen=True, slots=True)
class Config:
    """What is tuned: tiles of a source head loaded ahead, and blocks that a multiprocessor should have."""

    stages: int = 2
    blocks: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.stages <= 4 or self.blocks < 1:
            raise ValueError(f"{self.stages=} must be from 1 to 4, and {self.blocks=} at least 1")


CANDIDATES = (Config(2, 1), Config(3, 1), Config(3, 2), Config(4, 1))


def iha_decode(
    q: Float[Array, "batch q_heads pseudo head_dim"],
    keys: Pages,
    values: Pages,
    lengths: Int32[Array, " batch"],
    pseudo: PseudoHeads,
    *,
    scale: float,
) -> Float[Array, "batch q_heads pseudo head_dim"]:
    """See `api.iha_decode`; by raw keys and values, or pseudo ones, as `absorbed_is_faster` has it."""
    device = target.hopper()
    batch, q_heads, count, head_dim = q.shape
    if q.dtype not in (jnp.bfloat16, jnp.float16) or keys.rows.dtype != q.dtype:
        raise NotImplementedError(
            f"queries and pages must be all bfloat16 or all float16: {q.dtype}, {keys.rows.dtype}"
        )
    if head_dim % 16 or head_dim > 128:
        raise NotImplementedError(f"{head_dim=} must be a multiple of 16 up to 128")
    if batch == 0:
        raise NotImplementedError("no queries")
    fits = Tiling.fits(TILE, keys.page_size) and keys.kv_heads <= _MAX_SOURCES
    if not fits or not absorbed_is_faster(q_heads, keys.kv_heads, count):
        return mix.mosaic(q, keys, values, lengths, pseudo, scale=scale)
    rows = _rows(q, pseudo)
    config = tuning.choose(
        "iha_decode",
        Config(),
        device,
        head_dim=head_dim,
        rows=rows.number,
        kv_heads=keys.kv_heads,
        page_size=keys.page_size,
        dtype=q.dtype.name,
    )
    slots = max(1, device.multiprocessors * config.blocks // rows.blocks)
    work = plan(lengths, keys.keys, pseudo.tokens_in_sight, slots)
    parts, lse = _attend(rows, keys, values, lengths, work, pseudo, scale, config)
    # Pseudo keys of one index are a part of their own: `count` of them for each item.
    group = rows.group
    work = work._replace(first=work.first * count, number=work.number * count)
    out, _ = merge(parts.reshape(-1, 1, group, head_dim), lse.reshape(-1, 1, group), work, q.dtype)
    return out[:, 0, : q_heads * count].reshape(q.shape)


class _Rows(NamedTuple):
    """Rows of the products: for each index of a pseudo key `group` of them, those of all pseudo queries and a rest.

    Attributes:
      q: pseudo queries turned back; zeros in rows past `number`.
      alpha_k, alpha_v: what each source head counts for each row.
      group: a multiple of 8.
      number: `pseudo * group`.
    """

    q: Float[Array, "batch blocks rows head_dim"]
    alpha_k: Float32[Array, "blocks kv_heads rows"]
    alpha_v: Float32[Array, "blocks kv_heads rows"]
    group: int
    number: int

    @property
    def blocks(self) -> int:
        return int(self.q.shape[1])


def _rows(q: Float[Array, "batch q_heads pseudo head_dim"], pseudo: PseudoHeads) -> _Rows:
    batch, q_heads, count, head_dim = q.shape
    group = pl.cdiv(q_heads * count, ROW_BLOCK) * ROW_BLOCK
    blocks = pl.cdiv(count * group, _ROWS)

    def laid_out(x: Array) -> Array:
        """From `[..., index of the key, pseudo queries, numbers]` to `[..., blocks, rows, numbers]`."""
        front = [(0, 0)] * (x.ndim - 3)
        grouped = jnp.pad(x, [*front, (0, 0), (0, group - x.shape[-2]), (0, 0)])
        flat = grouped.reshape(*x.shape[:-3], count * group, x.shape[-1])
        whole = jnp.pad(flat, [*front, (0, blocks * _ROWS - count * group), (0, 0)])
        return whole.reshape(*x.shape[:-3], blocks, _ROWS, x.shape[-1])

    def by_row(alpha: Array) -> Float32[Array, "blocks kv_heads rows"]:
        of_queries = jnp.repeat(alpha.astype(jnp.float32).transpose(2, 1, 0), count, axis=1)
        return laid_out(of_queries).swapaxes(1, 2)

    turned = turned_back(q, pseudo).transpose(0, 3, 1, 2, 4).reshape(batch, count, q_heads * count, head_dim)
    return _Rows(laid_out(turned.astype(q.dtype)), by_row(pseudo.alpha_k), by_row(pseudo.alpha_v), group, count * group)


def _attend(
    rows: _Rows,
    keys: Pages,
    values: Pages,
    lengths: Int32[Array, " batch"],
    work: Plan,
    pseudo: PseudoHeads,
    scale: float,
    config: Config,
) -> tuple[Float[Array, "items number head_dim"], Float[Array, "items number"]]:
    """Attention of each row to the keys of each item, and log2 of the sum of its weights, -inf where it sees none.

    Items of no tiles are left unwritten.
    """
    head_dim, dtype = rows.q.shape[-1], rows.q.dtype
    items, sources, stages = work.row.shape[0], keys.kv_heads, config.stages
    count, window, sight = pseudo.count, pseudo.window, pseudo.tokens_in_sight
    tail = rows.number - (rows.blocks - 1) * _ROWS  # rows of the last block
    tiling = Tiling(TILE, keys.page_size, keys.table.shape[1])
    # wgmma wants one swizzle of all its operands: the widest that cuts a row of a head evenly.
    columns = math.gcd(head_dim, 64)
    value_parts = [pl.ds(at, columns) for at in range(0, head_dim, columns)]
    tile_shape = (_ROWS, TILE)
    by_row = plgpu.Layout.WGMMA.reduce(1)
    arguments = {
        "q": rows.q,
        "alpha_k": rows.alpha_k,
        "alpha_v": rows.alpha_v,
        "k": keys.rows,
        "v": values.rows,
        "k_table": keys.table,
        "v_table": values.table,
        "lengths": lengths,
        "row": work.row,
        "tile": work.tile,
        "tiles": work.tiles,
    }

    def iha_decode_parts(*refs: Any) -> None:
        *inputs, out_ref, lse_ref = refs
        ref = dict(zip(arguments, inputs, strict=True))
        item, block = jax.lax.axis_index("item"), jax.lax.axis_index("block")
        seq, begin, tiles = ref["row"][item], ref["tile"][item], ref["tiles"][item]
        length = ref["lengths"][seq]
        steps = tiles * sources  # all source heads of a tile one after the other

        def place(name: str, step: Any) -> tuple[Any, Any, list[Any]]:
            """Tile, source head and row ids of a step; it may be past the last one."""
            tile = begin + jax.lax.div(step, jnp.int32(sources))
            return tile, jax.lax.rem(step, jnp.int32(sources)), tiling.rows(ref[name + "_table"], seq, tile)

        def load(name: str, smem: dict[str, Any], slot: Any, tile: Any, head: Any, ids: list[Any]) -> None:
            ready = smem[name + "_ready"].at[slot]
            tiling.load(tile, ids, smem[name].at[slot], ready, ref[name], [head, slice(None)], 0)

        def load_ahead(name: str, smem: dict[str, Any], slot: Any, step: Any, there: Any) -> None:
            # One thread starts the copies: all must be done with what was there.
            plgpu.commit_smem()
            pl.when(step + stages < steps)(lambda: load(name, smem, slot, *there))

        def last_seen() -> Any:
            """Of each row, the position of the last key that it sees: its own token's, or the one before."""
            if pseudo.mask == "token":
                return plgpu.layout_cast(jnp.full((_ROWS,), length - 1, jnp.int32), by_row)
            row = block * _ROWS + plgpu.broadcasted_iota(jnp.int32, (_ROWS,), 0, layout=by_row)
            of_key = jax.lax.div(row, jnp.int32(rows.group))
            of_query = jax.lax.rem(jax.lax.rem(row, jnp.int32(rows.group)), jnp.int32(count))
            return length - 1 - jnp.where(of_key > of_query, 1, 0)

        def clean(v_ref: Any, tile: Any) -> None:
            """Zeros where no row sees the token: such slots hold anything, and 0 * NaN would reach the sums."""
            position = tile * TILE + plgpu.broadcasted_iota(jnp.int32, (TILE, columns), 0, layout=plgpu.Layout.WGMMA)
            written = position < length
            if sight is not None:
                written &= position >= length - sight
            for part in value_parts:
                loaded = plgpu.load(v_ref.at[:, part], layout=plgpu.Layout.WGMMA)
                v_ref[:, part] = jnp.where(written, loaded, jnp.zeros_like(loaded))
            plgpu.commit_smem()

        def attend(smem: dict[str, Any]) -> Any:
            for name in ("q", "alpha_k", "alpha_v"):
                source = ref[name].at[seq, block] if name == "q" else ref[name].at[block]
                plgpu.copy_gmem_to_smem(source, smem[name], smem["q_ready"])
            for step in range(stages):

                @pl.when(step < steps)
                def _(step: int = step) -> None:
                    for name in ("k", "v"):
                        load(name, smem, step, *place(name, jnp.int32(step)))

            plgpu.barrier_wait(smem["q_ready"])
            last = last_seen()

            def of_row(name: str, head: Any, shape: tuple[int, int]) -> Any:
                return spread(plgpu.load(smem[name].at[head], layout=by_row), shape, 0)

            def of_tile(i: Any, carry: Any) -> Any:
                acc, top, total = carry
                tile = begin + i

                def add_scores(head: Any, scores: Any) -> Any:
                    step = i * sources + head
                    slot = jax.lax.rem(step, jnp.int32(stages))
                    # Read before the waits, which they overlap.
                    there = place("k", step + stages)
                    plgpu.barrier_wait(smem["k_ready"].at[slot])

                    def product(scores_ref: Any) -> Any:
                        plgpu.wgmma(scores_ref, smem["q"], smem["k"].at[slot].transpose((1, 0)))
                        return scores_ref[...]

                    part = pl.run_scoped(product, plgpu.ACC(tile_shape, jnp.float32))
                    load_ahead("k", smem, slot, step, there)
                    return scores + part * of_row("alpha_k", head, tile_shape)

                none = plgpu.layout_cast(jnp.zeros(tile_shape, jnp.float32), plgpu.Layout.WGMMA)
                scores = jax.lax.fori_loop(0, sources, add_scores, none) * (scale * LOG2E)
                column = plgpu.broadcasted_iota(jnp.int32, tile_shape, 1, layout=plgpu.Layout.WGMMA)
                ahead = tile * TILE + column - spread(last, tile_shape, 0)  # of the last key in sight
                seen = ahead <= 0
                if window is not None:
                    seen &= ahead > -window
                scores = jnp.where(seen, scores, -jnp.inf)
                higher = jnp.maximum(top, scores.max(axis=1))
                decay = jnp.exp2(top - higher)
                weights = jnp.exp2(scores - spread(higher, tile_shape, 0))
                total = total * decay + weights.sum(axis=1)
                smem["p"][...] = weights.astype(dtype)
                plgpu.commit_smem()
                unclean = (tile + 1) * TILE > length
                if sight is not None:
                    unclean |= tile * TILE < length - sight

                def add_values(head: Any, acc: Any) -> Any:
                    step = i * sources + head
                    slot = jax.lax.rem(step, jnp.int32(stages))
                    there = place("v", step + stages)
                    plgpu.barrier_wait(smem["v_ready"].at[slot])
                    pl.when(unclean)(lambda: clean(smem["v"].at[slot], tile))

                    def product(acc_ref: Any, part: Any) -> Any:
                        plgpu.wgmma(acc_ref, smem["p"], smem["v"].at[slot, :, part])
                        return acc_ref[...]

                    added = []
                    for one, part in zip(acc, value_parts, strict=True):
                        run = functools.partial(product, part=part)
                        found = pl.run_scoped(run, plgpu.ACC((_ROWS, columns), jnp.float32))
                        added.append(one + found * of_row("alpha_v", head, (_ROWS, columns)))
                    load_ahead("v", smem, slot, step, there)
                    return added

                acc = [one * spread(decay, (_ROWS, columns), 0) for one in acc]
                return jax.lax.fori_loop(0, sources, add_values, acc), higher, total

            zero = plgpu.layout_cast(jnp.zeros((_ROWS, columns), jnp.float32), plgpu.Layout.WGMMA)
            lowest = plgpu.layout_cast(jnp.full((_ROWS,), _LOWEST, jnp.float32), by_row)
            nothing = plgpu.layout_cast(jnp.zeros((_ROWS,), jnp.float32), by_row)
            return jax.lax.fori_loop(0, tiles, of_tile, ([zero for _ in value_parts], lowest, nothing))

        def store(acc: Any, top: Any, total: Any, out_smem: Any, lse_smem: Any) -> None:
            # A row that sees no key of the item has a sum of 0.
            divisor = jnp.where(total > 0, total, 1)
            for one, part in zip(acc, value_parts, strict=True):
                out_smem[:, part] = one / spread(divisor, one.shape, 0)
            lse_smem[...] = jnp.where(total > 0, top + jnp.log2(divisor), -jnp.inf)
            plgpu.commit_smem()

            def copy(number: int) -> None:
                own = pl.ds(block * _ROWS, number)
                plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, number)], out_ref.at[item, own])
                plgpu.copy_smem_to_gmem(lse_smem.at[pl.ds(0, number)], lse_ref.at[item, own])

            if rows.blocks > 1:
                pl.when(block < rows.blocks - 1)(lambda: copy(_ROWS))
            pl.when(block == rows.blocks - 1)(lambda: copy(tail))
            plgpu.wait_smem_to_gmem(0)

        tile_ready = plgpu.Barrier(num_arrivals=tiling.pieces, num_barriers=stages)
        scratch = {
            "q": plgpu.SMEM((_ROWS, head_dim), dtype, transforms=swizzled(columns)),
            "alpha_k": plgpu.SMEM((sources, _ROWS), jnp.float32),
            "alpha_v": plgpu.SMEM((sources, _ROWS), jnp.float32),
            "k": plgpu.SMEM((stages, TILE, head_dim), dtype, transforms=swizzled(columns)),
            "v": plgpu.SMEM((stages, TILE, head_dim), dtype, transforms=swizzled(columns)),
            "p": plgpu.SMEM((_ROWS, TILE), dtype, transforms=swizzled(columns)),
            "q_ready": plgpu.Barrier(num_arrivals=3),
            "k_ready": tile_ready,
            "v_ready": tile_ready,
        }

        @pl.when(tiles > 0)
        def _() -> None:
            found = pl.run_scoped(lambda *smem: attend(dict(zip(scratch, smem, strict=True))), *scratch.values())
            # In the memory of the tiles, which are done.
            pl.run_scoped(
                functools.partial(store, *found),
                plgpu.SMEM((_ROWS, head_dim), jnp.float32),
                plgpu.SMEM((_ROWS,), jnp.float32),
            )

    kernel: Any = plgpu.kernel(
        iha_decode_parts,
        out_type=(
            jax.ShapeDtypeStruct((items, rows.number, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((items, rows.number), jnp.float32),
        ),
        grid=(items, rows.blocks),
        grid_names=("item", "block"),
        compiler_params=target.PARAMS,
    )
    parts, lse = kernel(*arguments.values())
    return parts, lse
