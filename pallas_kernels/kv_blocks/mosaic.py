"""Block moves for Hopper in Pallas Mosaic GPU.

Blocks are contiguous in the arena and in the staging buffer, so each move is a list of bulk copies. One thread block a
multiprocessor takes its share of the chunks of all blocks and brings them through a ring of buffers in shared memory:
the copy engine fills some while it empties others, and no byte passes through a register.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int32, Shaped

from pallas_kernels import target, tuning

_UNIT = 16  # bytes: bulk copies start at multiples of it and are multiples of it long


@dataclasses.dataclass(frozen=True, slots=True)
class Config:
    """What is tuned.

    Attributes:
      chunk_bytes: of one copy, at most; the largest divisor of a block is taken.
      stages: buffers of a multiprocessor.
      storing: buffers that may be on their way out while the others are filled; fewer than `stages`.
    """

    chunk_bytes: int = 16 * 1024
    stages: int = 8
    storing: int = 3

    def __post_init__(self) -> None:
        if self.chunk_bytes < _UNIT:
            raise ValueError(f"chunk_bytes={self.chunk_bytes} must be at least {_UNIT}")
        if not 0 <= self.storing < self.stages:
            raise ValueError(f"storing={self.storing} must be at least 0 and less than stages={self.stages}")


CANDIDATES = (Config(8192, 16, 8), Config(16384, 12, 6), Config(32768, 6, 3))


def gather_blocks(
    arena: Shaped[Array, "rows page_size kv_heads head_dim"],
    ids: Int32[Array, " blocks"],
    *,
    rows_per_block: int,
    config: Config | None = None,
) -> Shaped[Array, "blocks rows_per_block page_size kv_heads head_dim"]:
    """See `api.gather_blocks`; blocks of padding are left unwritten."""
    device = target.hopper()
    config = config or _config("gather", device, arena, rows_per_block)
    shape = (ids.shape[0], rows_per_block, *arena.shape[1:])
    chunk = _chunk(rows_per_block * math.prod(arena.shape[1:]), arena.dtype.itemsize, config)
    by_block = _in_chunks(arena, rows_per_block, chunk)
    held, chunks, _ = by_block.shape
    blocks = len(ids)

    def gather_blocks_mosaic(arena_ref, ids_ref, out_ref, *scratch):  # type: ignore[no-untyped-def]
        def place(block: Any, part: Any) -> tuple[Any, Any, Any]:
            held_at = ids_ref[block]
            return arena_ref.at[held_at, part], out_ref.at[block, part], (held_at >= 0) & (held_at < held)

        _stream(place, blocks, chunks, config, *scratch)

    kernel = _kernel(
        gather_blocks_mosaic,
        jax.ShapeDtypeStruct((blocks, chunks, chunk), arena.dtype),
        copies=blocks * chunks,
        multiprocessors=device.multiprocessors,
        buffer=plgpu.SMEM((config.stages, chunk), arena.dtype),
    )
    out: jax.Array = kernel(by_block, ids)
    return out.reshape(shape)


def scatter_blocks(
    arena: Shaped[Array, "rows page_size kv_heads head_dim"],
    ids: Int32[Array, " blocks"],
    blocks: Shaped[Array, "blocks rows_per_block page_size kv_heads head_dim"],
    *,
    config: Config | None = None,
) -> Shaped[Array, "rows page_size kv_heads head_dim"]:
    """See `api.scatter_blocks`."""
    device = target.hopper()
    config = config or _config("scatter", device, arena, blocks.shape[1])
    if blocks.dtype != arena.dtype:
        raise NotImplementedError(f"blocks must have the type of the arena, {arena.dtype}, not {blocks.dtype}")
    number, rows_per_block = blocks.shape[:2]
    chunk = _chunk(math.prod(blocks.shape[1:]), arena.dtype.itemsize, config)
    contents = blocks.reshape(number, -1, chunk)
    chunks = contents.shape[1]
    by_block = _in_chunks(arena, rows_per_block, chunk)
    held = by_block.shape[0]

    def scatter_blocks_mosaic(arena_ref, ids_ref, blocks_ref, *scratch):  # type: ignore[no-untyped-def]
        def place(block: Any, part: Any) -> tuple[Any, Any, Any]:
            held_at = ids_ref[block]
            return blocks_ref.at[block, part], arena_ref.at[held_at, part], (held_at >= 0) & (held_at < held)

        _stream(place, number, chunks, config, *scratch)

    kernel = _kernel(
        scatter_blocks_mosaic,
        (),
        copies=number * chunks,
        multiprocessors=device.multiprocessors,
        buffer=plgpu.SMEM((config.stages, chunk), arena.dtype),
    )
    # A kernel's outputs are always new arrays; written through a reference, a donated arena stays where it is.
    ref = jax.new_ref(by_block)
    kernel(ref, ids, contents)
    return jax.freeze(ref).reshape(arena.shape)


def _config(direction: str, device: target.Target, arena: jax.Array, rows_per_block: int) -> Config:
    block_bytes = rows_per_block * math.prod(arena.shape[1:]) * arena.dtype.itemsize
    return tuning.choose("kv_blocks", Config(), device, direction=direction, block_bytes=block_bytes)


def _chunk(elements: int, itemsize: int, config: Config) -> int:
    """Elements of a chunk of a block of so many elements."""
    units, rest = divmod(elements * itemsize, _UNIT)
    if rest:
        raise NotImplementedError(f"a block of {elements * itemsize} bytes; must be a multiple of {_UNIT}")
    limit = min(units, config.chunk_bytes // _UNIT)
    return next(size for size in range(limit, 0, -1) if units % size == 0) * _UNIT // itemsize


def _in_chunks(
    arena: Shaped[Array, "rows page_size kv_heads head_dim"], rows_per_block: int, chunk: int
) -> Shaped[Array, "held chunks chunk"]:
    return arena.reshape(arena.shape[0] // rows_per_block, -1, chunk)


def _kernel(
    body: Callable[..., None], out_type: Any, *, copies: int, multiprocessors: int, buffer: Any
) -> Callable[..., Any]:
    if not copies:
        raise NotImplementedError("no blocks; must be at least one")
    kernel: Callable[..., Any] = plgpu.kernel(
        body,
        out_type=out_type,
        grid=(min(multiprocessors, copies),),
        grid_names=("thread_block",),
        scratch_types=[buffer, plgpu.Barrier(num_barriers=buffer.shape[0])],
        compiler_params=target.PARAMS,
    )
    return kernel


def _stream(
    place: Callable[[Any, Any], tuple[Any, Any, Any]],
    blocks: int,
    chunks: int,
    config: Config,
    buffer: Any,
    loaded: Any,
) -> None:
    """Copies the chunks of this thread block: of every so many, as there are thread blocks, one.

    Args:
      place: from block and chunk to source, destination, and whether there is anything to copy.
      buffer: `[stages, chunk]` in shared memory.
      loaded: barrier of each stage.
    """
    stages, storing = config.stages, config.storing
    first, step = jax.lax.axis_index("thread_block"), jax.lax.axis_size("thread_block")
    count = jax.lax.div(blocks * chunks - first + step - 1, jnp.int32(step))

    def at(i: Any) -> tuple[Any, Any, Any, Any]:
        chunk = first + i * step
        block = jax.lax.div(chunk, jnp.int32(chunks))
        return *place(block, chunk - block * chunks), jax.lax.rem(i, jnp.int32(stages))

    def load(i: Any) -> None:
        source, _, wanted, slot = at(i)

        @pl.when(wanted)
        def fill() -> None:
            plgpu.copy_gmem_to_smem(
                source, buffer.at[slot], loaded.at[slot], oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS
            )

    for i in range(stages):
        pl.when(i < count)(functools.partial(load, jnp.int32(i)))

    def move(i: Any, _: None) -> None:
        _, destination, wanted, slot = at(i)

        @pl.when(wanted)
        def empty() -> None:
            plgpu.barrier_wait(loaded.at[slot])
            plgpu.copy_smem_to_gmem(buffer.at[slot], destination)
            plgpu.wait_smem_to_gmem(storing, wait_read_only=True)

        # Waits count copies, so a chunk without one would let an older buffer be filled before it is empty.
        @pl.when(jnp.logical_not(wanted))
        def catch_up() -> None:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        pl.when((i >= storing) & (i - storing + stages < count))(functools.partial(load, i - storing + stages))

    jax.lax.fori_loop(0, count, move, None)
    plgpu.wait_smem_to_gmem(0)
