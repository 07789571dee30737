"""Block-sparse product for Hopper in Pallas Mosaic GPU.

A block of threads takes 64 or 128 rows, one block of outputs and a share of its blocks of weights. One warpgroup reads
which inputs each is of, and loads those of x and the weights with TMA a few steps ahead; each of the others multiplies
64 rows with wgmma. Sums of the shares are added up afterwards, always in the same order.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels import target, tuning
from pallas_kernels.target import swizzled

SIZES = (64, 128)
_ROWS = 64  # of a warpgroup, wgmma's M
_COLUMNS = 64  # of the most that a swizzled row in shared memory holds
_SHARED_BYTES = 227 * 1024 - 1024  # of a block, less what barriers take
_MOST_SHARES = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Config:
    """What is tuned.

    Attributes:
      warpgroups: that compute, of 64 rows each.
      stages: blocks of weights loaded ahead.
      shares: blocks of threads among which the weights of a block of outputs are divided.
    """

    warpgroups: int
    stages: int
    shares: int

    def __post_init__(self) -> None:
        if self.warpgroups not in (1, 2):
            raise ValueError(f"{self.warpgroups=} must be 1 or 2")
        if not 2 <= self.stages <= 16:
            raise ValueError(f"{self.stages=} must be from 2 to 16")
        if not 1 <= self.shares <= 64:
            raise ValueError(f"{self.shares=} must be from 1 to 64")

    def shared_bytes(self, size: int) -> int:
        """Shared memory, for blocks of this size."""
        rows = self.warpgroups * _ROWS
        return 2 * self.stages * size * (rows + size) + (2 if self.shares == 1 else 4) * rows * size


def candidates(size: int) -> tuple[Config, ...]:
    """Forms that are tried for blocks of this size."""
    forms = (Config(w, stages, shares) for w in (1, 2) for stages in (3, 4, 8) for shares in (1, 2, 4))
    return tuple(form for form in forms if form.shared_bytes(size) <= _SHARED_BYTES)


def default_config(rows: int, parts: int, kept: int, size: int, multiprocessors: int) -> Config:
    """Two warpgroups for more than 64 rows; the fewest shares that fill the device; as many stages as fit, up to 8."""
    warpgroups = 1 if rows <= _ROWS else 2
    tiles = pl.cdiv(rows, warpgroups * _ROWS) * parts

    def cost(shares: int) -> int:
        """Bytes that pass while the busiest multiprocessor reads its weights, and those of sums, written and read."""
        rounds = pl.cdiv(tiles * shares, multiprocessors) * pl.cdiv(kept, shares)
        return rounds * 2 * size * size * multiprocessors + 8 * shares * rows * parts * size

    shares, stages = min(range(1, min(kept, _MOST_SHARES) + 1), key=cost), 8
    while (config := Config(warpgroups, stages, shares)).shared_bytes(size) > _SHARED_BYTES:
        stages -= 1
    return config


def block_sparse_matmul(
    x: Float[Array, "M K"],
    blocks: Float[Array, "P k b b"],
    indices: Int32[Array, "P k"],
    *,
    config: Config | None = None,
) -> Float[Array, "M N"]:
    """See `api.block_sparse_matmul`."""
    device = target.hopper()
    (rows, depth), (parts, kept, size, _) = x.shape, blocks.shape
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"x and blocks must be bfloat16 or float16: {x.dtype}")
    if size not in SIZES:
        raise NotImplementedError(f"blocks of {size} must be of {SIZES[0]} or {SIZES[1]}")
    if rows == 0 or parts == 0:
        return jnp.zeros((rows, parts * size), x.dtype)
    if config is None:
        default = default_config(rows, parts, kept, size, device.multiprocessors)
        workload = {"K": depth, "N": parts * size, "kept": kept, "block": size, "rows": 1 << (rows - 1).bit_length()}
        config = tuning.choose("block_sparse_matmul", default, device, **workload)
    if config.shared_bytes(size) > _SHARED_BYTES:
        raise ValueError(
            f"{config} needs {config.shared_bytes(size)} bytes of shared memory, {_SHARED_BYTES} are there"
        )
    sums = _kernel(x, blocks, indices, config)
    return jnp.sum(sums, axis=0).astype(x.dtype) if config.shares > 1 else sums[0]


def _kernel(x: jax.Array, blocks: jax.Array, indices: jax.Array, config: Config) -> jax.Array:
    """Sums of each share `[shares, M, N]`, float32 if there are several."""
    rows, (parts, kept, size, _) = x.shape[0], blocks.shape
    stages, warpgroups = config.stages, config.warpgroups
    tile = warpgroups * _ROWS
    steps_of_share = pl.cdiv(kept, config.shares)
    dtype = jnp.dtype(jnp.float32) if config.shares > 1 else x.dtype
    columns = _COLUMNS * 2 // dtype.itemsize  # of the result, that a copy of 128 bytes a row takes
    slices = range(0, size, columns)

    def block_sparse_matmul_mosaic(x_ref: Any, blocks_ref: Any, indices_ref: Any, out_ref: Any) -> None:
        first_row, part = jax.lax.axis_index("tile") * tile, jax.lax.axis_index("part")
        share, warpgroup = jax.lax.axis_index("share"), jax.lax.axis_index("warpgroup")
        steps = jnp.clip(kept - share * steps_of_share, 0, steps_of_share)

        def load(smem: dict[str, Any]) -> None:
            def step(k: Any, _: None) -> None:
                slot = jax.lax.rem(k, jnp.int32(stages))
                pl.when(k >= stages)(lambda: plgpu.barrier_wait(smem["free"].at[slot]))
                ready, place = smem["ready"].at[slot], share * steps_of_share + k
                inputs = pl.multiple_of(indices_ref[part, place] * size, size)
                # What a copy finds beyond the last row is 0.
                rows_of_tile = x_ref.at[pl.ds(first_row, tile), pl.ds(inputs, size)]
                plgpu.copy_gmem_to_smem(rows_of_tile, smem["x"].at[slot], ready)
                plgpu.copy_gmem_to_smem(blocks_ref.at[part, place], smem["blocks"].at[slot], ready)

            jax.lax.fori_loop(0, steps, step, None)
            # Every completion of a barrier must be seen by who waits at it.
            for slot in range(stages):

                @pl.when(slot < steps)
                def drain(slot: int = slot) -> None:
                    plgpu.barrier_wait(smem["free"].at[slot])

        def compute(smem: dict[str, Any]) -> None:
            own = pl.ds(warpgroup * _ROWS, _ROWS)

            def multiply(sums: Any) -> Any:
                def release(k: Any) -> None:
                    plgpu.barrier_arrive(smem["free"].at[jax.lax.rem(k, jnp.int32(stages))])

                def step(k: Any, _: None) -> None:
                    slot = jax.lax.rem(k, jnp.int32(stages))
                    plgpu.barrier_wait(smem["ready"].at[slot])
                    plgpu.wgmma(sums, smem["x"].at[slot, own], smem["blocks"].at[slot])
                    # The product of the step before is done, this one goes on.
                    plgpu.wgmma_wait(1)
                    pl.when(k > 0)(lambda: release(k - 1))

                jax.lax.fori_loop(0, steps, step, None)
                found = sums[...]
                pl.when(steps > 0)(lambda: release(steps - 1))
                return found

            result = pl.run_scoped(multiply, plgpu.ACC((_ROWS, size), jnp.float32)).astype(dtype)
            for i, column in enumerate(slices):
                smem["out"][warpgroup, i] = result[:, column : column + columns]
            plgpu.commit_smem()
            for i, column in enumerate(slices):
                to = out_ref.at[
                    share, pl.ds(first_row + warpgroup * _ROWS, _ROWS), pl.ds(part * size + column, columns)
                ]
                plgpu.copy_smem_to_gmem(smem["out"].at[warpgroup, i], to)
            plgpu.wait_smem_to_gmem(0)

        scratch = {
            "x": plgpu.SMEM((stages, tile, size), x.dtype, transforms=swizzled(_COLUMNS)),
            "blocks": plgpu.SMEM((stages, size, size), x.dtype, transforms=swizzled(_COLUMNS)),
            "out": plgpu.SMEM((warpgroups, len(slices), _ROWS, columns), dtype),
            "ready": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            "free": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        }

        def run(*refs: Any) -> None:
            smem = dict(zip(scratch, refs, strict=True))
            pl.when(warpgroup < warpgroups)(lambda: compute(smem))
            pl.when(warpgroup == warpgroups)(lambda: load(smem))

        pl.run_scoped(run, *scratch.values(), collective_axes="warpgroup")

    kernel: Any = plgpu.kernel(
        block_sparse_matmul_mosaic,
        out_type=jax.ShapeDtypeStruct((config.shares, rows, parts * size), dtype),
        grid=(parts, config.shares, pl.cdiv(rows, tile)),
        grid_names=("part", "share", "tile"),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=target.PARAMS,
    )
    result: jax.Array = kernel(x, blocks, indices)
    return result
