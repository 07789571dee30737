"""Causal prefill attention for Hopper in Pallas Mosaic GPU.

A block of the grid takes `_BLOCK` neighbouring queries of one head. One warpgroup loads tiles of keys and values with
TMA a few tiles ahead; two others multiply with wgmma, each for half of the queries, and take turns: while one computes
its softmax the other has the tensor cores (FlashAttention-3, arXiv 2407.08608, section 3.1). Masks are applied only in
tiles that the diagonal or the edge of the window crosses.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import target, tuning
from pallas_kernels.key_bias import KeyBias
from pallas_kernels.paged import Pages
from pallas_kernels.paged_tiles import LOG2E, Tiling, bias_log2, spread
from pallas_kernels.target import swizzled

TILE = 128  # keys of one step
_ROWS = 64  # queries of a warpgroup, wgmma's M
_WARPGROUPS = 2  # that compute
_BLOCK = _ROWS * _WARPGROUPS
# Registers of a thread of a warpgroup that computes, and of the one that loads: together those of a multiprocessor.
_COMPUTE_REGISTERS, _LOAD_REGISTERS = 216, 80
# Below any score: a query that sees no key of a tile must not bring in -inf - -inf.
_LOWEST = -1e30


@dataclasses.dataclass(frozen=True, slots=True)
class Config:
    """What is tuned.

    Attributes:
      stages: tiles loaded ahead.
      registers: the weights go from registers into the product with the values, which adds to the sums where they are;
        if not, they pass through shared memory, which is the form that can be interpreted on a CPU.
      turns: the warpgroups take turns on the tensor cores.
    """

    stages: int = 2
    registers: bool = True
    turns: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.stages <= 4:
            raise ValueError(f"{self.stages=} must be from 1 to 4")


CANDIDATES = (Config(1), Config(3), Config(2, turns=False))


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
    config: Config | None = None,
) -> tuple[Float[Array, "seqs chunk q_heads head_dim"], Float32[Array, "seqs chunk q_heads"]]:
    """See `api.prefill_attention`."""
    device = target.hopper()
    seqs, chunk, _, head_dim = q.shape
    if q.dtype not in (jnp.bfloat16, jnp.float16) or keys.rows.dtype != q.dtype:
        raise NotImplementedError(
            f"queries and pages must be all bfloat16 or all float16: {q.dtype}, {keys.rows.dtype}"
        )
    if keys.scales is not None or values.scales is not None:
        raise NotImplementedError("pages with scales")
    if head_dim % 16 or head_dim > 128:
        raise NotImplementedError(f"{head_dim=} must be a multiple of 16 up to 128")
    # The row ids of smaller pages would not fit into the registers of the warpgroup that loads.
    if not Tiling.fits(TILE, keys.page_size) or keys.page_size < 16:
        raise NotImplementedError(f"{keys.page_size=} must be 16, 32, 64 or a multiple of {TILE}")
    if seqs == 0 or chunk == 0:
        raise NotImplementedError("no queries")
    if config is None:
        workload: dict[str, object] = {"head_dim": head_dim, "page_size": keys.page_size, "dtype": q.dtype.name}
        workload["biased"] = key_bias is not None
        config = tuning.choose("prefill_attention", Config(), device, **workload)
    padded = jnp.pad(q, ((0, 0), (0, -chunk % _BLOCK), (0, 0), (0, 0)))
    out, lse = _attend(padded, keys, values, starts, counts, scale, window, key_bias, config)
    return out[:, :chunk], lse[:, :, :chunk].swapaxes(1, 2)


def _attend(
    q: Float[Array, "seqs chunk q_heads head_dim"],
    keys: Pages,
    values: Pages,
    starts: Int32[Array, " seqs"],
    counts: Int32[Array, " seqs"],
    scale: float,
    window: int | None,
    key_bias: KeyBias | None,
    config: Config,
) -> tuple[Float[Array, "seqs chunk q_heads head_dim"], Float32[Array, "seqs q_heads chunk"]]:
    """Of whole blocks of queries."""
    seqs, chunk, q_heads, head_dim = q.shape
    group = q_heads // keys.kv_heads
    blocks = chunk // _BLOCK
    stages = config.stages
    tiling = Tiling(TILE, keys.page_size, keys.table.shape[1])
    columns = math.gcd(head_dim, 64)
    arguments = [q, keys.rows, values.rows, keys.table, values.table, starts, counts]
    if key_bias is not None:
        arguments += [key_bias.bits, key_bias.value]

    def prefill_attention_mosaic(*refs: Any) -> None:
        q_ref, k_ref, v_ref, k_table_ref, v_table_ref, starts_ref, counts_ref, *bias_refs, out_ref, lse_ref = refs
        head, seq, warpgroup = jax.lax.axis_index("head"), jax.lax.axis_index("seq"), jax.lax.axis_index("warpgroup")
        # The last blocks see the most keys: they begin first.
        block = blocks - 1 - jax.lax.axis_index("block")
        start, count = starts_ref[seq], counts_ref[seq]
        end = start + count
        low = start + block * _BLOCK  # position of the first query
        begin = jnp.int32(0) if window is None else jnp.maximum(low - window + 1, 0) // TILE
        steps = jnp.where(low < end, pl.cdiv(jnp.minimum(low + _BLOCK, end), TILE) - begin, 0)

        def load(smem: dict[str, Any]) -> None:
            plgpu.set_max_registers(_LOAD_REGISTERS, action="decrease")

            def step(i: Any, _: None) -> None:
                slot, tile = jax.lax.rem(i, jnp.int32(stages)), begin + i
                k_rows = tiling.rows(k_table_ref, seq, tile)
                pl.when(i >= stages)(lambda: plgpu.barrier_wait(smem["k_free"].at[slot]))
                tiling.load(tile, k_rows, smem["k"].at[slot], smem["k_ready"].at[slot], k_ref, [head // group], 0)
                pl.when(i >= stages)(lambda: plgpu.barrier_wait(smem["v_free"].at[slot]))
                # Slots that no query sees hold anything, NaN included, and 0 * NaN would reach the sums.
                unclean = (tile + 1) * TILE > end
                if window is not None:
                    unclean |= tile * TILE <= start - window

                v_rows = tiling.rows(v_table_ref, seq, tile)
                ready = smem["v_ready"].at[jnp.where(unclean, stages, slot)]
                tiling.load(tile, v_rows, smem["v"].at[slot], ready, v_ref, [head // group], 0)

                @pl.when(unclean)
                def clean_values() -> None:
                    plgpu.barrier_wait(smem["v_ready"].at[stages])
                    clean(smem["v"].at[slot], tile)
                    for _ in range(tiling.pieces):
                        plgpu.barrier_arrive(smem["v_ready"].at[slot])

            jax.lax.fori_loop(0, steps, step, None)
            # Every completion of a barrier must be seen by who waits at it.
            for slot in range(stages):

                @pl.when(slot < steps)
                def drain(slot: int = slot) -> None:
                    plgpu.barrier_wait(smem["k_free"].at[slot])
                    plgpu.barrier_wait(smem["v_free"].at[slot])

        def clean(v_ref: Any, tile: Any) -> None:
            for rows in (pl.ds(0, _ROWS), pl.ds(_ROWS, _ROWS)):
                position = (
                    tile * TILE
                    + rows.start
                    + plgpu.broadcasted_iota(jnp.int32, (_ROWS, columns), 0, layout=plgpu.Layout.WGMMA)
                )
                written = position < end
                if window is not None:
                    written &= position > start - window
                for part in (pl.ds(at, columns) for at in range(0, head_dim, columns)):
                    loaded = plgpu.load(v_ref.at[rows, part], layout=plgpu.Layout.WGMMA)
                    v_ref[rows, part] = jnp.where(written, loaded, jnp.zeros_like(loaded))
            plgpu.commit_smem()

        def compute(smem: dict[str, Any]) -> None:
            plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
            offset = block * _BLOCK + warpgroup * _ROWS
            q_smem, first = smem["q"].at[warpgroup], low + warpgroup * _ROWS
            plgpu.copy_gmem_to_smem(q_ref.at[seq, pl.ds(offset, _ROWS), head], q_smem, smem["q_ready"].at[warpgroup])
            plgpu.barrier_wait(smem["q_ready"].at[warpgroup])

            def take_turn() -> None:
                if config.turns:
                    plgpu.barrier_arrive(smem["turn"])
                    plgpu.barrier_wait(smem["turn"])

            pl.when(warpgroup == 1)(take_turn)

            def step(i: Any, carry: Any) -> Any:
                acc, top, total = carry
                slot, tile = jax.lax.rem(i, jnp.int32(stages)), begin + i
                plgpu.barrier_wait(smem["k_ready"].at[slot])

                def product_with_keys(scores_ref: Any) -> Any:
                    plgpu.wgmma(scores_ref, q_smem, smem["k"].at[slot].transpose((1, 0)))
                    take_turn()
                    return scores_ref[...]

                scores = pl.run_scoped(product_with_keys, plgpu.ACC((_ROWS, TILE), jnp.float32)) * (scale * LOG2E)
                plgpu.barrier_arrive(smem["k_free"].at[slot])
                scores = masked(scores, tile, first)
                higher = jnp.maximum(top, scores.max(axis=1))
                decay = jnp.exp2(top - higher)
                weights = jnp.exp2(scores - spread(higher, scores.shape, 0))
                total = total * decay + weights.sum(axis=1)
                acc *= spread(decay, acc.shape, 0)
                weights = weights.astype(q.dtype)
                if not config.registers:
                    smem["p"][warpgroup] = weights
                    plgpu.commit_smem()
                if config.turns:
                    plgpu.barrier_arrive(smem["turn"])
                plgpu.barrier_wait(smem["v_ready"].at[slot])
                if config.turns:
                    plgpu.barrier_wait(smem["turn"])

                def product_with_values(acc_ref: Any) -> Any:
                    plgpu.wgmma(acc_ref, weights if config.registers else smem["p"].at[warpgroup], smem["v"].at[slot])
                    return None if config.registers else acc_ref[...]

                if config.registers:
                    acc = pl.run_state(product_with_values)(plgpu.ACC.init(acc))
                else:
                    acc += pl.run_scoped(product_with_values, plgpu.ACC(acc.shape, jnp.float32))
                plgpu.barrier_arrive(smem["v_free"].at[slot])
                return acc, higher, total

            column = plgpu.Layout.WGMMA.reduce(1)
            acc, top, total = jax.lax.fori_loop(
                0,
                steps,
                step,
                (
                    plgpu.layout_cast(jnp.zeros((_ROWS, head_dim), jnp.float32), plgpu.Layout.WGMMA),
                    plgpu.layout_cast(jnp.full((_ROWS,), _LOWEST, jnp.float32), column),
                    plgpu.layout_cast(jnp.zeros((_ROWS,), jnp.float32), column),
                ),
            )
            pl.when(warpgroup == 0)(take_turn)
            real = offset + plgpu.broadcasted_iota(jnp.int32, acc.shape, 0, layout=plgpu.Layout.WGMMA) < count
            q_smem[...] = jnp.where(real, acc / spread(total, acc.shape, 0), 0).astype(q.dtype)
            real = offset + plgpu.broadcasted_iota(jnp.int32, (_ROWS,), 0, layout=column) < count
            lse_ref[seq, head, pl.ds(offset, _ROWS)] = jnp.where(real, (top + jnp.log2(total)) / LOG2E, -jnp.inf)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem, out_ref.at[seq, pl.ds(offset, _ROWS), head])
            plgpu.wait_smem_to_gmem(0)

        def masked(scores: Any, tile: Any, first: Any) -> Any:
            """Scores of a tile with bias, -inf where a query doesn't see the key."""
            if bias_refs:
                bits_ref, value_ref = bias_refs
                column = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA)
                scores += bias_log2(bits_ref, value_ref[seq], seq, tile, column)
            crossed = (tile + 1) * TILE > first + 1
            if window is not None:
                crossed |= tile * TILE <= first + _ROWS - 1 - window

            def mask(scores: Any) -> Any:
                row = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=plgpu.Layout.WGMMA)
                column = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA)
                ahead = tile * TILE + column - (first + row)  # of the query
                visible = ahead <= 0
                if window is not None:
                    visible &= ahead > -window
                return jnp.where(visible, scores, -jnp.inf)

            return jax.lax.cond(crossed, mask, lambda scores: scores, scores)

        scratch = {
            "q": plgpu.SMEM((_WARPGROUPS, _ROWS, head_dim), q.dtype, transforms=swizzled(columns)),
            "k": plgpu.SMEM((stages, TILE, head_dim), q.dtype, transforms=swizzled(columns)),
            "v": plgpu.SMEM((stages, TILE, head_dim), q.dtype, transforms=swizzled(columns)),
            "q_ready": plgpu.Barrier(num_barriers=_WARPGROUPS),
            "k_ready": plgpu.Barrier(num_arrivals=tiling.pieces, num_barriers=stages),
            # The last one: of values that are cleaned before they are ready.
            "v_ready": plgpu.Barrier(num_arrivals=tiling.pieces, num_barriers=stages + 1),
            "k_free": plgpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=stages),
            "v_free": plgpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=stages),
            "turn": plgpu.Barrier(num_arrivals=_WARPGROUPS),
        }
        if not config.registers:
            scratch["p"] = plgpu.SMEM((_WARPGROUPS, _ROWS, TILE), q.dtype, transforms=swizzled(columns))

        def run(*refs: Any) -> None:
            smem = dict(zip(scratch, refs, strict=True))
            pl.when(warpgroup < _WARPGROUPS)(lambda: compute(smem))
            pl.when(warpgroup == _WARPGROUPS)(lambda: load(smem))

        pl.run_scoped(run, *scratch.values(), collective_axes="warpgroup")

    kernel: Any = plgpu.kernel(
        prefill_attention_mosaic,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((seqs, q_heads, chunk), jnp.float32),
        ),
        grid=(q_heads, seqs, blocks),
        grid_names=("head", "seq", "block"),
        num_threads=_WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=target.PARAMS,
    )
    out, lse = kernel(*arguments)
    return out, lse
