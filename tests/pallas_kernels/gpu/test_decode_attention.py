"""The Mosaic kernel of decode attention, interpreted, beside attention written out in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import tuning
from pallas_kernels.decode_attention import decode_attention, mosaic
from pallas_kernels.decode_attention.plan import TILE, plan
from tests.pallas_kernels.gpu.interpreter import interpreted
from tests.pallas_kernels.paged_battery import check_decode

pytestmark = pytest.mark.kernels

compiled = jax.jit(decode_attention, static_argnames=("scale", "window", "return_lse", "implementation"))


def check(*arguments, multiprocessors=1, **options):
    with interpreted(multiprocessors):
        check_decode(functools.partial(compiled, implementation="mosaic"), *arguments, **options)


@pytest.mark.parametrize("page_size", [8, 16, 32, 64, 128])
def test_pages_of_all_sizes(page_size):
    check(0, [65, 1], page_size=page_size)


@pytest.mark.parametrize(("kv_heads", "group"), [(2, 1), (2, 4), (1, 12), (1, 16)])
def test_heads_and_groups(kv_heads, group):
    check(group, [70], kv_heads=kv_heads, group=group, multiprocessors=kv_heads)


@pytest.mark.parametrize("head_dim", [16, 32, 80, 96, 128, 192, 256])
def test_head_sizes(head_dim):
    check(head_dim, [70], head_dim=head_dim)


@pytest.mark.parametrize("lengths", [[0, 130, 1], [64, 63], [0, 0], [128]])
def test_ragged_lengths(lengths):
    check(1, lengths)


def test_float16():
    check(2, [100], dtype=jnp.float16)


@pytest.mark.parametrize("window", [1, 64, 65, 500])
def test_windows(window):
    check(window, [200, 3], window=window)


@pytest.mark.parametrize("page_size", [8, 64, 128])
def test_a_bias_of_some_keys(page_size):
    check(3, [0, 140, 33, 1], page_size=page_size, biased=True)


@pytest.mark.parametrize(("page_size", "head_dim"), [(16, 64), (64, 128), (128, 32)])
def test_pages_of_8_bits_with_scales(page_size, head_dim):
    check(4, [130, 0, 9], page_size=page_size, head_dim=head_dim, fp8=True)


def test_all_options_together():
    check(5, [150, 40], kv_heads=2, fp8=True, biased=True, window=90, dtype=jnp.float16, multiprocessors=2)


@pytest.mark.parametrize("multiprocessors", [1, 3])
def test_a_long_row_is_split_and_more_tiles_than_stages_are_loaded(multiprocessors):
    check(6, [4 * TILE + 5, 10], multiprocessors=multiprocessors)


@pytest.mark.parametrize("config", mosaic.CANDIDATES)
def test_every_form_that_tuning_tries(config):
    # A function of its own: one that was traced before would not be traced again.
    @functools.partial(jax.jit, static_argnames=("scale", "window", "return_lse"))
    def attention(**arguments):
        return decode_attention(**arguments, implementation="mosaic")

    with interpreted(), tuning.trying(config) as chosen_for:
        check_decode(attention, 7, [9 * TILE + 9], group=4)
    assert [operation for operation, _ in chosen_for] == ["decode_attention"]


@pytest.mark.parametrize("window", [None, 100])
def test_a_plan_covers_each_tile_in_sight_once_and_shares_them_evenly(window):
    rng = np.random.default_rng(3)
    planned = jax.jit(plan, static_argnums=(1, 2, 3))
    for _ in range(20):
        lengths = rng.integers(0, 2000, size=3)
        slots = int(rng.choice([1, 5, 40]))
        row, tile, tiles, first, count = map(np.asarray, planned(jnp.asarray(lengths, jnp.int32), 2048, window, slots))
        total = 0
        for sequence, length in enumerate(lengths):
            own = range(first[sequence], first[sequence] + count[sequence])
            covered = [int(tile[i]) + j for i in own for j in range(tiles[i])]
            start = max(0, length - window) if window else 0
            assert covered == sorted({position // TILE for position in range(start, length)})
            assert all(row[i] == sequence and tiles[i] > 0 for i in own)
            total += len(covered)
        assert tiles.sum() == total
        assert tiles.max(initial=0) <= max(1, -(-total // slots))
