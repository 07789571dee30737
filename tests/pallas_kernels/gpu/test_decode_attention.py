"""The Mosaic kernel of decode attention, interpreted, beside attention written out in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.decode_attention.plan import TILE, plan
from pallas_kernels.key_bias import KeyBias, pack
from tests.pallas_kernels.gpu.interpreter import interpreted

pytestmark = pytest.mark.kernels

compiled = jax.jit(decode_attention, static_argnames=("scale", "window", "return_lse", "implementation"))
SCALE = 0.3  # sharper than usual: an error in a score shows


def attention(q, keys, values, lengths, window=None, bias=None):
    """Output and log-sum-exp, key by key as the docstring says, in float64; keys and values in token order."""
    group = q.shape[1] // keys.shape[2]
    out, lse = np.zeros(q.shape), np.full(q.shape[:2], -np.inf)
    for row, length in enumerate(lengths):
        seen = slice(max(0, length - window) if window else 0, length)
        for head in range(q.shape[1]) if length else ():
            scores = keys[row, seen, head // group] @ q[row, head] * SCALE
            if bias is not None:
                scores = scores + bias[row, seen]
            weights = np.exp(scores - scores.max())
            out[row, head] = weights @ values[row, seen, head // group] / weights.sum()
            lse[row, head] = np.log(weights.sum()) + scores.max()
    return out, lse


def check(
    seed,
    lengths,
    *,
    kv_heads=1,
    group=8,
    head_dim=64,
    page_size=64,
    dtype=jnp.bfloat16,
    fp8=False,
    window=None,
    biased=False,
    multiprocessors=1,
):
    """One arena whose pages are dealt at random, with NaN wherever no key or value is."""
    rng = np.random.default_rng(seed)
    batch, width = len(lengths), -(-max(*lengths, 1) // page_size) + 1
    rows, tokens = 2 * batch * width + 1, width * page_size
    ids = rng.permutation(rows)[: 2 * batch * width].reshape(2, batch, width).astype(np.int32)
    q = jnp.asarray(rng.normal(size=(batch, kv_heads * group, head_dim)), dtype)
    kv = rng.normal(size=(2, batch, tokens, kv_heads, head_dim))
    kv[:, np.arange(tokens) >= np.asarray(lengths)[:, None]] = np.nan
    arena = np.full((rows, page_size, kv_heads, head_dim), np.nan)
    arena[ids] = kv.reshape(2, batch, width, page_size, kv_heads, head_dim)
    scales = None
    if fp8:
        scales = np.exp(rng.normal(size=(rows, kv_heads, page_size))).astype(np.float32) / 100
        scales[np.isnan(arena[..., 0]).swapaxes(1, 2)] = np.nan
        arena = arena / scales.swapaxes(1, 2)[..., None]
    pages = jnp.asarray(arena, jnp.float8_e4m3fn if fp8 else dtype)
    stored = np.asarray(pages, np.float64) * (scales.swapaxes(1, 2)[..., None] if fp8 else 1)
    keys, values = stored[ids].reshape(kv.shape)
    chosen = rng.random((batch, tokens)) < 0.3
    value = rng.normal(size=batch).astype(np.float32)
    with interpreted(multiprocessors):
        out, lse = compiled(
            q,
            pages,
            pages,
            jnp.asarray(ids[0]),
            jnp.asarray(lengths, jnp.int32),
            v_page_table=jnp.asarray(ids[1]),
            k_scales=scales,
            v_scales=scales,
            key_bias=KeyBias(pack(jnp.asarray(chosen)), jnp.asarray(value)) if biased else None,
            scale=SCALE,
            window=window,
            return_lse=True,
            implementation="mosaic",
        )
        out, lse = np.asarray(out, np.float64), np.asarray(lse)
    bias = chosen * value[:, None] if biased else None
    expected, expected_lse = attention(np.asarray(q, np.float64), keys, values, lengths, window, bias)
    np.testing.assert_allclose(out, expected, atol=0.003 if dtype == jnp.float16 else 0.02)
    np.testing.assert_allclose(lse, expected_lse, atol=0.002)


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
