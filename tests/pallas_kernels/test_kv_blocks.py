"""Full Blocks and Layer Blocks in and out of the arena."""

from __future__ import annotations

from functools import partial
from typing import Any

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
    pages = np.array([3, PAGES, 1, PAGES, PAGES + 7, -1, -PAGES], np.int32)
    blocks = -np.arange(7 * ROWS * 3 * 2 * 5, dtype=np.float32).reshape(7, ROWS, *SHAPE[1:]) - 1
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


def test_padding_may_be_gathered() -> None:
    arena = arena_of()
    blocks = gather_blocks(jnp.asarray(arena), jnp.asarray([PAGES, 2, -1], jnp.int32), rows_per_block=ROWS)
    np.testing.assert_array_equal(blocks[1], arena[2 * ROWS : 3 * ROWS])


def test_no_blocks_are_moved() -> None:
    arena, ids = jnp.asarray(arena_of()), jnp.zeros(0, jnp.int32)
    blocks = gather_blocks(arena, ids, rows_per_block=ROWS)
    assert blocks.shape == (0, ROWS, *SHAPE[1:])
    np.testing.assert_array_equal(scatter_blocks(arena, ids, blocks), arena)


ARENA, ID, BLOCKS = jnp.zeros(SHAPE), jnp.zeros((1,), jnp.int32), jnp.zeros((1, ROWS, *SHAPE[1:]))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rows_per_block": 0}, "rows_per_block=0 must be an int of at least 1"),
        ({"rows_per_block": -4}, "rows_per_block=-4 must be"),
        ({"rows_per_block": True}, "rows_per_block=True must be"),
        ({"rows_per_block": 2.0}, r"rows_per_block=2\.0 must be"),
        ({"rows_per_block": 5}, "rows=24 is not a whole number of blocks of rows_per_block=5"),
        ({"arena": jnp.zeros(SHAPE[:3])}, r"arena must be any\[rows, page_size, kv_heads, head_dim\]"),
        ({"ids": jnp.zeros((1, 1), jnp.int32)}, r"ids must be int32\[blocks\]: int32\[1, 1\]"),
        ({"ids": jnp.zeros(1)}, r"ids must be int32\[blocks\]: float32\[1\]"),
        ({"ids": [0]}, r"ids must be int32\[blocks\]: \[0\]"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_wrong_arguments_of_gather_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gather_blocks(**{"arena": ARENA, "ids": ID, "rows_per_block": ROWS} | changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"blocks": BLOCKS[0]}, r"blocks must be any\[blocks, rows_per_block, "),
        ({"blocks": BLOCKS[:, :0]}, "rows_per_block=0 must be at least 1"),
        ({"blocks": jnp.zeros((1, 5, *SHAPE[1:]))}, "not a whole number of blocks of rows_per_block=5"),
        ({"blocks": BLOCKS[..., :4]}, r"blocks must be floating\[1, 4, 3, 2, 5\]: float32\[1, 4, 3, 2, 4\]"),
        ({"ids": jnp.arange(2)}, r"blocks must be floating\[2, 4, 3, 2, 5\]: float32\[1, "),
        ({"blocks": BLOCKS.astype(jnp.int8)}, r"blocks must be float32\[1, 4, 3, 2, 5\]: int8"),
        ({"arena": ARENA.astype(jnp.int8)}, r"blocks must be int8\[1, 4, 3, 2, 5\]: float32"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_wrong_arguments_of_scatter_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scatter_blocks(**{"arena": ARENA, "ids": ID, "blocks": BLOCKS} | changed)


MOVES = pytest.mark.parametrize(
    "move", [partial(gather_blocks, ARENA, ID, rows_per_block=ROWS), partial(scatter_blocks, ARENA, ID, BLOCKS)]
)


@MOVES
def test_implementations_are_chosen_by_name(move: Any) -> None:
    np.testing.assert_array_equal(move(implementation="reference"), move(implementation="xla"))
    with pytest.raises(ValueError, match="implementation='triton' is none of"):
        move(implementation="triton")
    with pytest.raises(NotImplementedError, match="has no form named 'cudnn'"):
        move(implementation="cudnn")
    with pytest.raises(NotImplementedError, match=r"compute capability 9\.0, not cpu"):
        move(implementation="mosaic")


@pytest.mark.parametrize("spec", SPECS)
def test_specs_move_whole_blocks(spec: str) -> None:
    function, options = SPECS[spec].function, SPECS[spec].options
    arguments = jax.eval_shape(SPECS[spec].make, jax.random.key(0))
    out = jax.eval_shape(lambda arguments: function(**arguments, **options), arguments)
    blocks = arguments.get("blocks", out)
    assert SPECS[spec].bytes_moved == 2 * blocks.size * blocks.dtype.itemsize
    assert arguments["ids"].shape == blocks.shape[:1]
    assert SPECS[spec].flops == 0
