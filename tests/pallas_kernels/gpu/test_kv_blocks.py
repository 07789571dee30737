"""The Mosaic kernels of the block moves, interpreted: bits in, the same bits out, and nothing else touched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.kv_blocks import gather_blocks, mosaic, scatter_blocks
from tests.pallas_kernels.gpu.interpreter import interpreted

pytestmark = pytest.mark.kernels

SMALL = mosaic.Config(chunk_bytes=512, stages=3, storing=1)


def random_bits(seed, shape, dtype):
    """Any bits at all: infinities and NaN with every payload are among them."""
    size = np.prod(shape) * jnp.dtype(dtype).itemsize
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8).view(dtype).reshape(shape)


def assert_same_bits(actual, expected):
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    np.testing.assert_array_equal(actual.view(np.uint8), expected.view(np.uint8))


def gathered(arena, ids, rows_per_block, config=SMALL, multiprocessors=2):
    gather = jax.jit(mosaic.gather_blocks, static_argnames=("rows_per_block", "config"))
    with interpreted(multiprocessors):
        return np.asarray(gather(arena, np.asarray(ids, np.int32), rows_per_block=rows_per_block, config=config))


def scattered(arena, ids, blocks, config=SMALL, multiprocessors=2):
    scatter = jax.jit(mosaic.scatter_blocks, static_argnames="config")
    with interpreted(multiprocessors):
        return np.asarray(scatter(arena, np.asarray(ids, np.int32), blocks, config=config))


def check(arena, ids, rows_per_block, config=SMALL, multiprocessors=2):
    """Moves blocks both ways; ids that no block has are padding."""
    by_block = arena.reshape(-1, rows_per_block, *arena.shape[1:])
    real = [(place, block) for place, block in enumerate(ids) if 0 <= block < len(by_block)]
    out = gathered(arena, ids, rows_per_block, config, multiprocessors)
    assert out.shape == (len(ids), *by_block.shape[1:])
    for place, block in real:
        assert_same_bits(out[place], by_block[block])

    contents = random_bits(99, out.shape, arena.dtype)
    expected = by_block.copy()
    for place, block in real:
        expected[block] = contents[place]
    out = scattered(arena, ids, contents, config, multiprocessors)
    assert_same_bits(out, expected.reshape(arena.shape))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.float32])
def test_all_types_keep_their_bits(dtype):
    check(random_bits(0, (5 * 4, 8, 2, 32), jnp.dtype(dtype)), [3, 0, 4], rows_per_block=4)


def test_layer_blocks_are_pages_times_layers():
    layers = 3
    arena = random_bits(1, (4 * layers * 2, 8, 1, 32), jnp.dtype(jnp.bfloat16))
    ids = [page * layers + layer for page, layer in [(3, 2), (0, 1), (2, 0)]]
    rows = arena.reshape(4, layers, 2, *arena.shape[1:])
    assert_same_bits(gathered(arena, ids, 2), np.stack([rows[3, 2], rows[0, 1], rows[2, 0]]))
    check(arena, ids, rows_per_block=2)


@pytest.mark.parametrize("ids", [[1, 6, 0, 6, 6], [2, -1, 7, 2**31 - 1, 7, 0, -1]])
def test_padding_is_neither_read_nor_written(ids):
    arena = random_bits(2, (6 * 2, 8, 1, 64), jnp.dtype(jnp.bfloat16))
    # Copies that ran beyond the arena would read 0 here, and race where two write to one place.
    check(arena, ids, rows_per_block=2, multiprocessors=3)
    padding = [place for place, block in enumerate(ids) if not 0 <= block < 6]
    assert np.isnan(gathered(arena, ids, 2)[padding].astype(np.float32)).all()


@pytest.mark.parametrize(("chunk_bytes", "stages", "storing"), [(16 * 1024, 8, 3), (256, 2, 0), (256, 4, 2)])
def test_rings_of_buffers(chunk_bytes, stages, storing):
    config = mosaic.Config(chunk_bytes, stages, storing)
    check(random_bits(3, (3 * 2, 16, 1, 32), jnp.dtype(jnp.bfloat16)), [2, 3, 0], 2, config, multiprocessors=1)


@pytest.mark.parametrize("shape", [(6, 8, 3, 40), (6, 1, 1, 8)])
def test_blocks_that_are_no_multiple_of_the_chunk(shape):
    check(random_bits(4, shape, jnp.dtype(jnp.bfloat16)), [1, 0], rows_per_block=2)


@pytest.mark.parametrize("multiprocessors", [3, 132])
def test_one_block_is_shared_by_all_multiprocessors(multiprocessors):
    check(random_bits(5, (3 * 2, 16, 1, 64), jnp.dtype(jnp.bfloat16)), [1], 2, multiprocessors=multiprocessors)


def test_blocks_come_back_as_they_left():
    arena = random_bits(6, (4 * 4, 8, 1, 32), jnp.dtype(jnp.bfloat16))
    ids = jnp.asarray([3, 1, 0], jnp.int32)

    @jax.jit
    def there_and_back(arena, ids):
        blocks = gather_blocks(arena, ids, rows_per_block=4, implementation="mosaic")
        emptied = scatter_blocks(arena, ids, jnp.zeros_like(blocks), implementation="mosaic")
        return emptied, scatter_blocks(emptied, ids, blocks, implementation="mosaic")

    with interpreted(2):
        emptied, restored = (np.asarray(a) for a in there_and_back(jnp.asarray(arena), ids))
    assert not emptied.reshape(4, -1).view(np.uint8)[np.asarray(ids)].any()
    assert_same_bits(restored, arena)


@pytest.mark.parametrize(
    ("chunk_bytes", "stages", "storing", "message"),
    [
        (8, 2, 0, "chunk_bytes=8 "),
        (16, 2, 2, "storing=2 .*stages=2"),
        (16, 2, -1, "storing=-1 "),
        (16, 0, 0, "stages=0"),
    ],
)
def test_impossible_rings_are_refused(chunk_bytes, stages, storing, message):
    with pytest.raises(ValueError, match=message):
        mosaic.Config(chunk_bytes, stages, storing)


@pytest.mark.parametrize("shape", [(6, 1, 1, 3), (6, 3, 1, 5)])
def test_blocks_of_odd_bytes_are_left_to_another(shape):
    with pytest.raises(NotImplementedError, match="multiple of 16"), interpreted(1):
        mosaic.gather_blocks(jnp.zeros(shape, jnp.bfloat16), jnp.zeros(1, jnp.int32), rows_per_block=2)


def test_blocks_of_another_type_are_left_to_another():
    arena, blocks = jnp.zeros((4, 8, 1, 32), jnp.bfloat16), jnp.zeros((1, 2, 8, 1, 32))
    with pytest.raises(NotImplementedError, match="bfloat16, not float32"), interpreted(1):
        mosaic.scatter_blocks(arena, jnp.zeros(1, jnp.int32), blocks)


def test_no_blocks_are_left_to_another():
    with pytest.raises(NotImplementedError, match="at least one"), interpreted(1):
        mosaic.gather_blocks(jnp.zeros((4, 8, 1, 32), jnp.bfloat16), jnp.zeros(0, jnp.int32), rows_per_block=2)
