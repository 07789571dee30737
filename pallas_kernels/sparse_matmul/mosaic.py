"""Product with packed weights for Hopper in Pallas Mosaic GPU, for few rows.

Outputs are the rows of wgmma, so that 8 rows of x cost no more than 8. A block takes 64 or 128 outputs and a share of
the inputs. One warpgroup loads values, mask and x with TMA a few steps ahead; each of the others makes 64 outputs'
planes of the weights from packed ones and multiplies them with those of x: `sum over p of planes[p] @ x[:, p::16].T`.
Sums of the shares are added up afterwards, always in the same order.

A plane is made in pairs of 16-bit numbers: three instructions turn a bit of the mask into a mask of 16, and one each
takes a value and moves up one that waits. Those instructions bound the kernel if memory does not.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, UInt16

from pallas_kernels import target, tuning
from pallas_kernels.sparse_matmul.packing import WORD
from pallas_kernels.target import swizzled

_OUTPUTS = 64  # of a warpgroup, wgmma's M
_SHARED_BYTES = 227 * 1024 - 1024  # of a block, less what barriers take
_MOST_SHARES = 16
MAX_ROWS = 64


@dataclasses.dataclass(frozen=True, slots=True)
class Config:
    """What is tuned.

    Attributes:
      warpgroups: that compute, of 64 outputs each.
      words: of the mask, for each output and step: 16, or 32 with one warpgroup; more would spill registers.
      stages: steps loaded ahead.
      shares: blocks among which the inputs of an output are divided.
      registers: planes go to wgmma from registers, else through shared memory, which the interpreter needs.
    """

    warpgroups: int
    words: int
    stages: int
    shares: int
    registers: bool = True

    def __post_init__(self) -> None:
        if self.warpgroups not in (1, 2):
            raise ValueError(f"{self.warpgroups=} must be 1 or 2")
        if self.words != 16 and (self.words, self.warpgroups) != (32, 1):
            raise ValueError(f"{self.words=} must be 16, or 32 with one warpgroup")
        if not 2 <= self.stages <= 16:
            raise ValueError(f"{self.stages=} must be from 2 to 16")
        if not 1 <= self.shares <= 64:
            raise ValueError(f"{self.shares=} must be from 1 to 64")

    def shared_bytes(self, planes: int, rows: int, of: int) -> int:
        """Shared memory, for so many planes of values, and rows of x in multiples of 8."""
        outputs = self.warpgroups * _OUTPUTS
        step = 2 * self.words * (outputs * (planes + 1) + WORD * rows)
        through = 0 if self.registers else 2 * self.words * outputs * of
        return self.stages * step + through + 4 * outputs * rows


def candidates(planes: int, rows: int, of: int) -> tuple[Config, ...]:
    """Forms that are tried: what fits in shared memory and, as compiled ahead of time, in registers.

    Args:
      rows: of x; others as of `default_config`.
    """
    padded = _in_eights(rows)
    forms = (
        Config(warpgroups, words, stages, shares)
        for warpgroups, words, stages in ((1, 32, 4), (1, 32, 3), (1, 16, 8), (1, 16, 3), (2, 16, 4), (2, 16, 2))
        for shares in (1, 2, 4)
    )
    return tuple(form for form in forms if form.shared_bytes(planes, padded, of) <= _SHARED_BYTES)


def default_config(rows: int, words: int, outputs: int, planes: int, of: int, multiprocessors: int) -> Config:
    """One warpgroup up to 16 rows; more of them share what is read of x. The fewest shares that fill the device.

    Args:
      rows: of x, in multiples of 8.
      words: of the mask for each output, in all.
    """
    warpgroups = 1 if rows <= 16 else 2
    width = 32 if warpgroups == 1 and words % 32 == 0 else 16
    tiles, steps = pl.cdiv(outputs, warpgroups * _OUTPUTS), words // width

    step_bytes = 2 * width * warpgroups * _OUTPUTS * (planes + 1)

    def cost(shares: int) -> int:
        """Bytes that pass while the busiest multiprocessor reads its weights, and those of sums, written and read."""
        rounds = pl.cdiv(tiles * shares, multiprocessors) * pl.cdiv(steps, shares)
        return rounds * step_bytes * multiprocessors + 8 * shares * outputs * rows

    shares, stages = min(range(1, min(steps, _MOST_SHARES) + 1), key=cost), 6
    while (config := Config(warpgroups, width, stages, shares)).shared_bytes(planes, rows, of) > _SHARED_BYTES:
        stages -= 1
    return config


def _in_eights(rows: int) -> int:
    return -(-rows // 8) * 8


def sparse_matmul(
    x: Float[Array, "M K"],
    values: Float[Array, "V N G"],
    mask: UInt16[Array, "N G"],
    *,
    of: int,
    config: Config | None = None,
) -> Float[Array, "M N"]:
    """See `api.sparse_matmul`."""
    device = target.hopper()
    (rows, depth), (planes, outputs, words) = x.shape, values.shape
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"x and values must be bfloat16 or float16: {x.dtype}")
    if depth % 256 or outputs % 8 or depth == 0 or outputs == 0:
        raise NotImplementedError(f"K={depth} must be a multiple of 256, N={outputs} of 8, and neither 0")
    if not 0 < rows <= MAX_ROWS:
        raise NotImplementedError(f"M={rows} must be from 1 to {MAX_ROWS}: more are not bound by reading weights")
    padded = _in_eights(rows)
    if config is None:
        default = default_config(padded, words, outputs, planes, of, device.multiprocessors)
        workload = {"K": depth, "N": outputs, "planes": planes, "of": of, "rows": padded}
        config = tuning.choose("sparse_matmul", default, device, **workload)
    if words % config.words or config.shared_bytes(planes, padded, of) > _SHARED_BYTES:
        raise ValueError(
            f"{config} needs {config.shared_bytes(planes, padded, of)} bytes of shared memory, {_SHARED_BYTES} are "
            f"there, and words must divide {words}"
        )
    # Plane p of x holds the inputs that bit p of the masks stands for.
    x_planes = jnp.pad(x.reshape(rows, words, WORD).transpose(2, 0, 1), ((0, 0), (0, padded - rows), (0, 0)))
    # Selections are of bits: 16-bit integers, of which two are one register.
    bits = jax.lax.bitcast_convert_type(values, jnp.int16)
    sums = _kernel(x_planes, bits, jax.lax.bitcast_convert_type(mask, jnp.int16), of, config)
    return jnp.sum(sums, axis=0)[:, :rows].T.astype(x.dtype)


def _kernel(x: jax.Array, values: jax.Array, mask: jax.Array, of: int, config: Config) -> jax.Array:
    """Sums of each share `[shares, N, M]` float32."""
    (planes, outputs, words), rows, dtype = values.shape, x.shape[1], x.dtype
    keep = planes * of // WORD
    width, stages, warpgroups = config.words, config.stages, config.warpgroups
    tile = warpgroups * _OUTPUTS
    steps_of_share = pl.cdiv(words // width, config.shares)

    def sparse_matmul_mosaic(x_ref: Any, values_ref: Any, mask_ref: Any, out_ref: Any) -> None:
        first_output = jax.lax.axis_index("tile") * tile
        share, warpgroup = jax.lax.axis_index("share"), jax.lax.axis_index("warpgroup")
        steps = jnp.clip(words // width - share * steps_of_share, 0, steps_of_share)

        def load(smem: dict[str, Any]) -> None:
            def step(k: Any, _: None) -> None:
                slot = jax.lax.rem(k, jnp.int32(stages))
                pl.when(k >= stages)(lambda: plgpu.barrier_wait(smem["free"].at[slot]))
                ready, at = smem["ready"].at[slot], pl.ds((share * steps_of_share + k) * width, width)
                own = pl.ds(first_output, tile)
                plgpu.copy_gmem_to_smem(values_ref.at[:, own, at], smem["values"].at[slot], ready)
                plgpu.copy_gmem_to_smem(mask_ref.at[own, at], smem["mask"].at[slot], ready)
                plgpu.copy_gmem_to_smem(x_ref.at[:, :, at], smem["x"].at[slot], ready)

            jax.lax.fori_loop(0, steps, step, None)
            # Every completion of a barrier must be seen by who waits at it.
            for slot in range(stages):

                @pl.when(slot < steps)
                def drain(slot: int = slot) -> None:
                    plgpu.barrier_wait(smem["free"].at[slot])

        def compute(smem: dict[str, Any]) -> None:
            own = pl.ds(warpgroup * _OUTPUTS, _OUTPUTS)

            def multiply_words(smem: dict[str, Any], sums: Any, slot: Any) -> None:
                there = plgpu.load(smem["mask"].at[slot, own], layout=plgpu.Layout.WGMMA)
                for first in range(0, WORD, of):
                    stored = [smem["values"].at[slot, first // of * keep + i, own] for i in range(keep)]
                    waiting = [plgpu.load(ref, layout=plgpu.Layout.WGMMA) for ref in stored]
                    made = _planes(there, waiting, first, of, dtype)
                    if not config.registers:
                        for place, plane in enumerate(made):
                            smem["planes"][warpgroup, place] = plane
                        plgpu.commit_smem()
                    for place, plane in enumerate(made):
                        of_weights = plane if config.registers else smem["planes"].at[warpgroup, place]
                        plgpu.wgmma(sums, of_weights, smem["x"].at[slot, first + place].transpose((1, 0)))
                    if not config.registers:
                        plgpu.wgmma_wait(0)

            def multiply(sums: Any) -> Any:
                def step(k: Any, _: None) -> None:
                    slot = jax.lax.rem(k, jnp.int32(stages))
                    plgpu.barrier_wait(smem["ready"].at[slot])
                    multiply_words(smem, sums, slot)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(smem["free"].at[slot])

                jax.lax.fori_loop(0, steps, step, None)
                return sums[...]

            smem["out"][warpgroup] = pl.run_scoped(multiply, plgpu.ACC((_OUTPUTS, rows), jnp.float32))
            plgpu.commit_smem()
            to = out_ref.at[share, pl.ds(first_output + warpgroup * _OUTPUTS, _OUTPUTS)]
            plgpu.copy_smem_to_gmem(smem["out"].at[warpgroup], to)
            plgpu.wait_smem_to_gmem(0)

        transforms = swizzled(width)
        scratch = {
            "values": plgpu.SMEM((stages, planes, tile, width), jnp.int16, transforms=transforms),
            "mask": plgpu.SMEM((stages, tile, width), jnp.int16, transforms=transforms),
            "x": plgpu.SMEM((stages, WORD, rows, width), dtype, transforms=transforms),
            "out": plgpu.SMEM((warpgroups, _OUTPUTS, rows), jnp.float32),
            "ready": plgpu.Barrier(num_arrivals=3, num_barriers=stages),
            "free": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        }
        if not config.registers:
            scratch["planes"] = plgpu.SMEM((warpgroups, of, _OUTPUTS, width), dtype, transforms=transforms)

        def run(*refs: Any) -> None:
            smem = dict(zip(scratch, refs, strict=True))
            pl.when(warpgroup < warpgroups)(lambda: compute(smem))
            pl.when(warpgroup == warpgroups)(lambda: load(smem))

        pl.run_scoped(run, *scratch.values(), collective_axes="warpgroup")

    kernel: Any = plgpu.kernel(
        sparse_matmul_mosaic,
        out_type=jax.ShapeDtypeStruct((config.shares, outputs, rows), jnp.float32),
        grid=(pl.cdiv(outputs, tile), config.shares),
        grid_names=("tile", "share"),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=target.PARAMS,
    )
    result: jax.Array = kernel(x, values, mask)
    return result


def _planes(there: jax.Array, waiting: list[jax.Array], first: int, of: int, dtype: Any) -> list[jax.Array]:
    """Planes of the inputs from `first` on: each takes the first value of the group that none before it took."""
    made = []
    for place in range(of):
        bit = there & jnp.int16(_signed(1 << (first + place)))
        # All bits where the plane has a value, none elsewhere.
        has = jnp.maximum(bit, jnp.int16(-1)) if first + place == WORD - 1 else ~(jnp.minimum(bit, jnp.int16(1)) - 1)
        made.append(jax.lax.bitcast_convert_type(waiting[0] & has, dtype))
        # As many as places are left; what stands behind the last value is never taken.
        later = [*waiting[1:], waiting[-1]]
        waiting = [(now & ~has) | (after & has) for now, after in zip(waiting, later, strict=True)]
        waiting = waiting[: of - place - 1]
    return made


def _signed(word: int) -> int:
    """The 16-bit integer of these bits."""
    return word - (1 << WORD) if word >> (WORD - 1) else word
