"""Grouped matrix product for Hopper in Pallas Mosaic GPU.

The blocks of a persistent grid, one a multiprocessor, take turns at tiles of the result: `block_m` rows of one group by
`block_n` columns, the columns of a tile of rows one after the other, so that blocks at work side by side share rows and
matrices in L2. In each block one warpgroup loads with TMA a few steps ahead, over the ends of tiles too, and one or
two others, of 64 rows each, multiply with wgmma.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels import target, tuning
from pallas_kernels.grouped_matmul.plan import ALIGNMENT, plan
from pallas_kernels.target import swizzled

_ROWS = 64  # of a warpgroup, wgmma's M
_COLUMNS = 64  # of the most that a swizzled row in shared memory holds
# Registers of a thread where two warpgroups compute, and of the one that loads: together those of a multiprocessor.
_COMPUTE_REGISTERS, _LOAD_REGISTERS = 232, 40
_SHARED_BYTES = 227 * 1024 - 1024  # of a block, less what barriers take
_WIDTH = 256  # columns of all products of a tile: 128 registers of a thread


@dataclasses.dataclass(frozen=True, slots=True)
class Config:
    """What is tuned.

    Attributes:
      block_m: rows of a tile; fewer than 64 are loaded as such and multiplied as 64.
      block_n: columns of a tile.
      block_k: columns of the rows, and rows of the matrix, of one step.
      stages: steps loaded ahead.
    """

    block_m: int
    block_n: int
    block_k: int
    stages: int

    def __post_init__(self) -> None:
        if self.block_m not in (8, 16, 32, 64, 128):
            raise ValueError(f"{self.block_m=} must be 8, 16, 32, 64 or 128")
        if self.block_n % _COLUMNS or not 0 < self.block_n <= _WIDTH:
            raise ValueError(f"{self.block_n=} must be a multiple of {_COLUMNS} up to {_WIDTH}")
        if self.block_k % _COLUMNS or not 0 < self.block_k <= 256:
            raise ValueError(f"{self.block_k=} must be a multiple of {_COLUMNS} up to 256")
        if not 2 <= self.stages <= 16:
            raise ValueError(f"{self.stages=} must be from 2 to 16")

    @property
    def warpgroups(self) -> int:
        """Those that compute."""
        return max(1, self.block_m // _ROWS)

    def shared_bytes(self, products: int) -> int:
        """Shared memory, for numbers of two bytes and so many matrices a group."""
        step = (self.warpgroups * _ROWS + products * self.block_n) * self.block_k
        result = self.warpgroups * _ROWS * self.block_n
        return 2 * (self.stages * step + result)


def candidates(products: int) -> tuple[Config, ...]:
    """Forms that are tried for so many matrices a group."""
    tiles = ((16, 64, 128), (16, 128, 64), (64, 64, 128), (64, 128, 64), (128, 128, 64), (128, 256, 64))
    return tuple(_deepest(*tile, products) for tile in tiles if tile[1] * products <= _WIDTH)


def default_config(rows: int, groups: int, columns: int, products: int) -> Config:
    """Tiles of about twice an even share of rows, so that most groups need one.

    Where that is a whole tile of 128 rows the tensor cores are the bound, and tiles are as wide as registers allow;
    where it is less, reading the matrices is, and narrow tiles, of which there are more, keep all multiprocessors busy.

    Args:
      columns: `N`.
      products: matrices a group.
    """
    share = -(-rows // max(groups, 1))
    block_m = min(max(16, 1 << (2 * share - 1).bit_length()), 128)
    slices = -(-columns // _COLUMNS)
    most = _WIDTH // products // _COLUMNS if block_m == 128 else 1
    block_n = _COLUMNS * max(n for n in range(1, most + 1) if slices % n == 0)
    block_k = 64 if block_m == 128 else 128
    return _deepest(block_m, block_n, block_k, products)


def _deepest(block_m: int, block_n: int, block_k: int, products: int) -> Config:
    """As many stages, up to 8, as shared memory has room for."""
    stages = 8
    while (config := Config(block_m, block_n, block_k, stages)).shared_bytes(products) > _SHARED_BYTES:
        stages -= 1
    return config


def grouped_matmul(
    lhs: Float[Array, "M K"],
    rhs: Float[Array, "E K N"],
    group_sizes: Int32[Array, " E"],
    *,
    config: Config | None = None,
) -> Float[Array, "M N"]:
    """See `api.grouped_matmul`."""
    return _multiply(lhs, (rhs,), group_sizes, config)


def gated_grouped_matmul(
    lhs: Float[Array, "M K"],
    gate: Float[Array, "E K N"],
    up: Float[Array, "E K N"],
    group_sizes: Int32[Array, " E"],
    *,
    config: Config | None = None,
) -> Float[Array, "M N"]:
    """See `api.gated_grouped_matmul`."""
    return _multiply(lhs, (gate, up), group_sizes, config)


def _multiply(
    lhs: Float[Array, "M K"],
    matrices: Sequence[Float[Array, "E K N"]],
    group_sizes: Int32[Array, " E"],
    config: Config | None,
) -> Float[Array, "M N"]:
    """The product with one matrix a group, or the gated product with two."""
    device = target.hopper()
    rows, depth = lhs.shape
    groups, _, columns = matrices[0].shape
    products = len(matrices)
    if lhs.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"rows and matrices must be bfloat16 or float16: {lhs.dtype}")
    if depth % 16 or columns % 16 or depth == 0 or columns == 0:
        raise NotImplementedError(f"K={depth} and N={columns} must be multiples of 16 and not 0")
    if rows == 0 or groups == 0:
        return jnp.zeros((rows, columns), lhs.dtype)
    if config is None:
        default = default_config(rows, groups, columns, products)
        share = 1 << (-(-rows // groups) - 1).bit_length()
        workload = {"K": depth, "N": columns, "products": products, "rows_of_a_group": share}
        config = tuning.choose("grouped_matmul", default, device, **workload)
    if config.block_n * products > _WIDTH or config.shared_bytes(products) > _SHARED_BYTES:
        raise ValueError(
            f"{config} needs {config.shared_bytes(products)} bytes of shared memory and {config.block_n * products} "
            f"columns of sums; {_SHARED_BYTES} and {_WIDTH} are there"
        )
    block_m, block_n, block_k, stages = config.block_m, config.block_n, config.block_k, config.stages
    warpgroups = config.warpgroups
    # wgmma wants one swizzle of all its operands, and TMA arrays that it cuts evenly.
    swizzle = math.gcd(depth, columns, _COLUMNS)
    slices = range(0, block_n, _COLUMNS)
    padding = -rows % ALIGNMENT
    padded = jnp.pad(lhs, ((0, padding), (0, 0))) if padding else lhs
    tiles = plan(group_sizes, rows + padding, block_m)
    across = pl.cdiv(columns, block_n)
    blocks = min(device.multiprocessors, tiles.group.shape[0] * across)

    def body(*refs: Any) -> None:
        lhs_ref, *matrix_refs, group_ref, start_ref, first_ref, end_ref, count_ref, out_ref = refs
        block, warpgroup = jax.lax.axis_index("block"), jax.lax.axis_index("warpgroup")
        turns = pl.cdiv(jnp.maximum(count_ref[0] * across - block, 0), blocks)

        def item(turn: Any) -> tuple[Any, Any, Any]:
            """Tile of rows, first column, and steps of a turn; rows behind the last group have no steps."""
            index = block + turn * blocks
            tile = index // across
            steps = jnp.where(group_ref[tile] < groups, pl.cdiv(depth, block_k), 0)
            return tile, (index - tile * across) * block_n, steps

        def load(smem: dict[str, Any]) -> None:
            if warpgroups == 2:
                plgpu.set_max_registers(_LOAD_REGISTERS, action="decrease")

            def take_turn(turn: Any, done: Any) -> Any:
                tile, column, steps = item(turn)
                group, start = group_ref[tile], pl.multiple_of(start_ref[tile], ALIGNMENT)

                def step(k: Any, _: None) -> None:
                    slot = jax.lax.rem(done + k, jnp.int32(stages))
                    pl.when(done + k >= stages)(lambda: plgpu.barrier_wait(smem["free"].at[slot]))
                    ready, at = smem["ready"].at[slot], pl.ds(k * block_k, block_k)
                    # What a copy finds beyond the end of an array is 0.
                    plgpu.copy_gmem_to_smem(
                        lhs_ref.at[pl.ds(start, block_m), at], smem["lhs"].at[slot, pl.ds(0, block_m)], ready
                    )
                    for i, matrix_ref in enumerate(matrix_refs):
                        part = matrix_ref.at[group, at, pl.ds(column, block_n)]
                        plgpu.copy_gmem_to_smem(part, smem["rhs"].at[slot, i], ready)

                jax.lax.fori_loop(0, steps, step, None)
                return done + steps

            done = jax.lax.fori_loop(0, turns, take_turn, jnp.int32(0))
            # Every completion of a barrier must be seen by who waits at it.
            for slot in range(stages):

                @pl.when(slot < done)
                def drain(slot: int = slot) -> None:
                    plgpu.barrier_wait(smem["free"].at[slot])

        def compute(smem: dict[str, Any]) -> None:
            if warpgroups == 2:
                plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
            own = pl.ds(warpgroup * _ROWS, _ROWS)

            def take_turn(turn: Any, done: Any) -> Any:
                tile, column, steps = item(turn)

                def multiply(*accumulators: Any) -> Any:
                    def release(i: Any) -> None:
                        plgpu.barrier_arrive(smem["free"].at[jax.lax.rem(i, jnp.int32(stages))])

                    def step(k: Any, _: None) -> None:
                        slot = jax.lax.rem(done + k, jnp.int32(stages))
                        plgpu.barrier_wait(smem["ready"].at[slot])
                        for i, accumulator in enumerate(accumulators):
                            plgpu.wgmma(accumulator, smem["lhs"].at[slot, own], smem["rhs"].at[slot, i])
                        # The products of the step before are done, these go on.
                        plgpu.wgmma_wait(products)
                        pl.when(k > 0)(lambda: release(done + k - 1))

                    jax.lax.fori_loop(0, steps, step, None)
                    sums = [accumulator[...] for accumulator in accumulators]
                    pl.when(steps > 0)(lambda: release(done + steps - 1))
                    return sums

                accumulator = plgpu.ACC((_ROWS, block_n), jnp.float32)
                sums = pl.run_scoped(multiply, *[accumulator] * products)
                if products == 2:
                    gate, up = sums
                    result = gate / (1 + jnp.exp(-gate)) * up
                else:
                    (result,) = sums
                store(smem, result.astype(lhs.dtype), tile, column)
                return done + steps

            jax.lax.fori_loop(0, turns, take_turn, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

        def store(smem: dict[str, Any], result: Any, tile: Any, column: Any) -> None:
            """Writes the rows of the tile and no other, of which a neighbour may be the next group's."""
            start = pl.multiple_of(start_ref[tile], ALIGNMENT) + warpgroup * _ROWS
            first = jnp.maximum(first_ref[tile], start)
            count = jnp.clip(jnp.minimum(end_ref[tile], start + _ROWS) - first, 0)
            # The copies of the tile before have read the buffer.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for i, part in enumerate(slices):
                smem["out"][warpgroup, i] = result[:, part : part + _COLUMNS]
            plgpu.commit_smem()
            # A copy has a fixed number of rows: one for each bit that is set in the count.
            for run in (1 << bit for bit in reversed(range(min(block_m, _ROWS).bit_length()))):
                skipped = count // (2 * run) * (2 * run)

                @pl.when(count // run % 2 == 1)
                def store_run(run: int = run, skipped: Any = skipped) -> None:
                    for i, part in enumerate(slices):
                        rows = pl.ds(first - start + skipped, run)
                        to = out_ref.at[pl.ds(first + skipped, run), pl.ds(column + part, _COLUMNS)]
                        plgpu.copy_smem_to_gmem(smem["out"].at[warpgroup, i, rows], to)

        scratch = {
            "lhs": plgpu.SMEM((stages, warpgroups * _ROWS, block_k), lhs.dtype, transforms=swizzled(swizzle)),
            "rhs": plgpu.SMEM((stages, products, block_k, block_n), lhs.dtype, transforms=swizzled(swizzle)),
            # A row at a time, so that copies can begin at any.
            "out": plgpu.SMEM((warpgroups, len(slices), _ROWS, _COLUMNS), lhs.dtype, transforms=swizzled(swizzle, 1)),
            "ready": plgpu.Barrier(num_arrivals=1 + products, num_barriers=stages),
            "free": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        }

        def run(*refs: Any) -> None:
            smem = dict(zip(scratch, refs, strict=True))
            pl.when(warpgroup < warpgroups)(lambda: compute(smem))
            pl.when(warpgroup == warpgroups)(lambda: load(smem))

        pl.run_scoped(run, *scratch.values(), collective_axes="warpgroup")

    body.__name__ = "gated_grouped_matmul" if products == 2 else "grouped_matmul"
    kernel: Any = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows + padding, columns), lhs.dtype),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=target.PARAMS,
    )
    result: jax.Array = kernel(padded, *matrices, *tiles)
    return result[:rows]
