"""Full Blocks and Layer Blocks in and out of the arena."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.kv_blocks import gather_blocks, scatter_blocks
from pallas_kernels.kv_blocks.arg_specs import SPECS

PAGES, ROWS = 6, 4
SHAPE = (PAGES * ROWS, 3, 2, 5)


def arena_of() -> np.ndarray:
    return np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)


def test_gathered_blocks_are_the_rows_of_their_pages() -> None:
    arena = arena_of()
    pages = [4, 0, 4, 5]
    blocks = gather_blocks(jnp.asarray(arena), jnp.asarray(pages, jnp.int32), rows_per_block=ROWS)
    for block, page in zip(blocks, pages, strict=True):
        np.testing.assert_array_equal(block, arena[page * ROWS : (page + 1) * ROWS])


def test_layer_blocks_are_pages_times_layers() -> None:
    arena = arena_of()
    page, layer, layers = 4, 1, ROWS // 2
    block = gather_blocks(jnp.asarray(arena), jnp.asarray([page * layers + layer], jnp.int32), rows_per_block=2)
    np.testing.assert_array_equal(block[0], arena[page * ROWS + 2 * layer :][:2])


def test_scattered_blocks_change_their_pages_only_and_padding_is_dropped() -> None:
    arena = arena_of()
    pages = np.array([3, PAGES, 1, PAGES, PAGES + 7], np.int32)
    blocks = -np.arange(5 * ROWS * 3 * 2 * 5, dtype=np.float32).reshape(5, ROWS, *SHAPE[1:]) - 1
    want = arena.copy()
    want[3 * ROWS : 4 * ROWS], want[1 * ROWS : 2 * ROWS] = blocks[0], blocks[2]
    out = scatter_blocks(jnp.asarray(arena), jnp.asarray(pages), jnp.asarray(blocks))
    np.testing.assert_array_equal(out, want)


def test_blocks_come_back_as_they_left() -> None:
    arena, pages = jnp.asarray(arena_of()), jnp.asarray([2, 5, 0], jnp.int32)
    blocks = gather_blocks(arena, pages, rows_per_block=ROWS)
    emptied = scatter_blocks(arena, pages, jnp.full_like(blocks, jnp.nan))
    assert np.isnan(emptied).sum() == blocks.size
    np.testing.assert_array_equal(scatter_blocks(emptied, pages, blocks), arena)


def test_a_donated_arena_keeps_its_address() -> None:
    scatter = jax.jit(scatter_blocks, donate_argnums=0)
    arena = jnp.zeros((64 * ROWS, 16, 2, 8))
    address = arena.unsafe_buffer_pointer()
    for value in (1.0, 2.0):
        before = arena
        arena = scatter(arena, jnp.asarray([1, 64], jnp.int32), jnp.full((2, ROWS, 16, 2, 8), value))
        assert before.is_deleted()
        assert arena.unsafe_buffer_pointer() == address
    assert float(arena.sum()) == 2.0 * ROWS * 16 * 2 * 8


def test_blocks_take_the_type_of_the_arena() -> None:
    arena = jnp.zeros(SHAPE, jnp.bfloat16)
    out = scatter_blocks(arena, jnp.asarray([0], jnp.int32), jnp.ones((1, ROWS, *SHAPE[1:]), jnp.float32))
    assert out.dtype == jnp.bfloat16
    assert float(out[0, 0, 0, 0]) == 1.0


@pytest.mark.parametrize("rows_per_block", [0, 5, -4])
def test_an_arena_of_broken_blocks_is_refused(rows_per_block: int) -> None:
    with pytest.raises(ValueError, match="whole number of blocks"):
        gather_blocks(jnp.zeros(SHAPE), jnp.zeros((1,), jnp.int32), rows_per_block=rows_per_block)


def test_blocks_that_do_not_divide_the_arena_are_refused() -> None:
    with pytest.raises(ValueError, match="whole number of blocks"):
        scatter_blocks(jnp.zeros(SHAPE), jnp.zeros((1,), jnp.int32), jnp.zeros((1, 5, *SHAPE[1:])))


def test_unknown_implementations_are_refused() -> None:
    arena, ids, blocks = jnp.zeros(SHAPE), jnp.zeros((1,), jnp.int32), jnp.zeros((1, ROWS, *SHAPE[1:]))
    with pytest.raises(ValueError, match=r"implementation='triton' is none of \['auto', 'mosaic', 'xla'\]"):
        gather_blocks(arena, ids, rows_per_block=ROWS, implementation="triton")
    with pytest.raises(ValueError, match="implementation='triton' is none of"):
        scatter_blocks(arena, ids, blocks, implementation="triton")


def test_the_kernels_need_a_hopper() -> None:
    arena, ids, blocks = jnp.zeros(SHAPE), jnp.zeros((1,), jnp.int32), jnp.zeros((1, ROWS, *SHAPE[1:]))
    with pytest.raises(NotImplementedError, match=r"compute capability 9\.0, not cpu"):
        gather_blocks(arena, ids, rows_per_block=ROWS, implementation="mosaic")
    with pytest.raises(NotImplementedError, match=r"compute capability 9\.0, not cpu"):
        scatter_blocks(arena, ids, blocks, implementation="mosaic")


@pytest.mark.parametrize("spec", SPECS)
def test_specs_move_whole_blocks(spec: str) -> None:
    function, options = SPECS[spec].function, SPECS[spec].options
    arguments = jax.eval_shape(SPECS[spec].make, jax.random.key(0))
    out = jax.eval_shape(lambda arguments: function(**arguments, **options), arguments)
    blocks = arguments.get("blocks", out)
    assert SPECS[spec].bytes_moved == 2 * blocks.size * blocks.dtype.itemsize
    assert arguments["ids"].shape == blocks.shape[:1]
    assert SPECS[spec].flops == 0
