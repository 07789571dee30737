"""The Mosaic kernel of decode attention, interpreted, beside attention written out in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.decode_attention.mosaic import TILE, plan
from tests.pallas_kernels.gpu.interpreter import interpreted

pytestmark = pytest.mark.kernels

compiled = jax.jit(decode_attention, static_argnames=("scale", "window", "implementation"))


def attention(q, k_pages, v_pages, k_table, v_table, lengths, scale, window):
    """Key by key as the docstring says, in float64."""
    q, k_pages, v_pages = (np.asarray(a, np.float64) for a in (q, k_pages, v_pages))
    batch, q_heads, _ = q.shape
    group = q_heads // k_pages.shape[2]
    out = np.zeros(q.shape)
    for row in range(batch):
        seen = slice(max(0, lengths[row] - window) if window else 0, lengths[row])
        k = k_pages[k_table[row]].reshape(-1, *k_pages.shape[2:])[seen]
        v = v_pages[v_table[row]].reshape(-1, *v_pages.shape[2:])[seen]
        for head in range(q_heads) if lengths[row] else ():
            scores = k[:, head // group] @ q[row, head] * scale
            weights = np.exp(scores - scores.max())
            out[row, head] = weights @ v[:, head // group] / weights.sum()
    return out


def case(rng, lengths, *, kv_heads=1, group=8, head_dim=64, page_size=64, dtype=jnp.bfloat16, spare=1):
    """Arguments: one arena whose pages are dealt at random, with NaN wherever no key or value is."""
    batch, width = len(lengths), -(-max(*lengths, 1) // page_size) + spare
    arena = np.full((2 * batch * width + 1, page_size, kv_heads, head_dim), np.nan, np.float32)
    ids = rng.permutation(arena.shape[0])[: 2 * batch * width].reshape(2, batch, width)
    for row, length in enumerate(lengths):
        for table in ids:
            for position in range(length):
                page, slot = divmod(position, page_size)
                arena[table[row, page], slot] = rng.normal(size=(kv_heads, head_dim))
    q = jnp.asarray(rng.normal(size=(batch, kv_heads * group, head_dim)), dtype)
    pages = jnp.asarray(arena, dtype)
    k_table, v_table = (jnp.asarray(table, jnp.int32) for table in ids)
    return q, pages, pages, k_table, jnp.asarray(lengths, jnp.int32), v_table


def check(arguments, multiprocessors=1, window=None):
    q, k_pages, v_pages, k_table, lengths, v_table = arguments
    scale = 0.3  # sharper than usual: an error in a score shows
    with interpreted(multiprocessors):
        out = compiled(
            q, k_pages, v_pages, k_table, lengths, v_page_table=v_table, scale=scale, window=window,
            implementation="mosaic",
        )  # fmt: skip
        out = np.asarray(out, np.float64)
    expected = attention(q, k_pages, v_pages, k_table, v_table, np.asarray(lengths), scale, window)
    np.testing.assert_allclose(out, expected, atol=0.02 if q.dtype == jnp.bfloat16 else 0.003)


@pytest.mark.parametrize("page_size", [8, 16, 32, 64, 128])
def test_pages_of_all_sizes(page_size):
    check(case(np.random.default_rng(page_size), [65, 1], page_size=page_size))


@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), [(2, 1, 64), (2, 4, 128), (1, 12, 64), (1, 16, 128)])
def test_heads_and_groups(kv_heads, group, head_dim):
    rng = np.random.default_rng(group)
    check(case(rng, [70], kv_heads=kv_heads, group=group, head_dim=head_dim), multiprocessors=kv_heads)


@pytest.mark.parametrize("lengths", [[0, 130, 1], [64, 63], [0, 0], [128]])
def test_ragged_lengths(lengths):
    check(case(np.random.default_rng(0), lengths))


def test_float16():
    check(case(np.random.default_rng(1), [100], dtype=jnp.float16))


@pytest.mark.parametrize("window", [1, 64, 65, 500])
def test_windows(window):
    check(case(np.random.default_rng(window), [200, 3]), window=window)


def test_a_long_row_is_split_and_more_tiles_than_stages_are_loaded():
    arguments = case(np.random.default_rng(2), [4 * TILE + 5, 10])
    check(arguments, multiprocessors=1)
    check(arguments, multiprocessors=3)


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
