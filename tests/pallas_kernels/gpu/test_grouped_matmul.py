"""The Mosaic kernel of the grouped matrix product, interpreted, beside the products in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import arg_specs, gated_grouped_matmul, grouped_matmul, mosaic
from pallas_kernels.grouped_matmul.plan import ALIGNMENT, most_tiles, plan
from tests.pallas_kernels.gpu.interpreter import ON_GPU, interpreted, on_hopper
from tests.pallas_kernels.gpu.late_products import late_products

pytestmark = pytest.mark.kernels

NARROW = mosaic.Config(block_m=16, block_n=64, block_k=64, stages=2)
TALL = mosaic.Config(block_m=128, block_n=64, block_k=64, stages=2)


def product(lhs, rhs, sizes):
    lhs, rhs = (np.asarray(a, np.float64) for a in (lhs, rhs))
    out = np.zeros((lhs.shape[0], rhs.shape[2]))
    ends = np.cumsum(sizes)
    for matrix, size, end in zip(rhs, sizes, ends, strict=True):
        out[end - size : end] = lhs[end - size : end] @ matrix
    return out


def check(seed, sizes, *, behind=0, depth=64, columns=64, gated=False, dtype=jnp.bfloat16, config=NARROW, blocks=2):
    """All that must not matter is NaN: rows behind the last group, and matrices of groups without rows."""
    rng = np.random.default_rng(seed)
    rows, groups = sum(sizes) + behind, len(sizes)
    lhs = rng.normal(size=(rows, depth))
    lhs[sum(sizes) :] = np.nan
    matrices = rng.normal(size=(1 + gated, groups, depth, columns)) / depth**0.5
    matrices[:, np.asarray(sizes) == 0] = np.nan
    lhs, *matrices = (jnp.asarray(a, dtype) for a in (lhs, *matrices))
    function = jax.jit(mosaic.gated_grouped_matmul if gated else mosaic.grouped_matmul, static_argnames="config")
    with interpreted(blocks):
        found = np.asarray(function(lhs, *matrices, jnp.asarray(sizes, jnp.int32), config=config))
    assert found.shape == (rows, columns)
    assert found.dtype == dtype
    wanted, *up = (product(lhs, matrix, sizes) for matrix in matrices)
    if gated:
        wanted = wanted / (1 + np.exp(-wanted)) * up[0]
    # Sums are of float32: the error is that of rounding the result once.
    epsilon = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(found.astype(np.float64), wanted, rtol=epsilon, atol=epsilon / 64)
    assert not found[sum(sizes) :].any()


@pytest.mark.parametrize(("config", "gated"), [(NARROW, False), (TALL, True)])
@pytest.mark.parametrize("sizes", [[0, 37, 0, 5, 90, 1, 0], [8, 16, 24], [1, 1, 1, 2]])
def test_ragged_groups(config, sizes, gated):
    check(0, sizes, gated=gated, config=config)


@pytest.mark.parametrize("block_m", [8, 64])
def test_tiles_of_all_heights(block_m):
    config = mosaic.Config(block_m, block_n=64, block_k=64, stages=2)
    check(1, [block_m, 3, 2 * block_m + 5, 0, block_m - 1], config=config)


def test_groups_around_the_sizes_of_tiles_and_warpgroups():
    check(8, [8, 63, 64, 65, 1, 127, 128, 129], config=TALL)


def test_one_group():
    check(9, [77], config=TALL)


@pytest.mark.parametrize(("sizes", "behind"), [([3, 0, 20], 50), ([0, 0], 33), ([64, 64], 1)])
def test_rows_behind_the_last_group_are_zero(sizes, behind):
    check(2, sizes, behind=behind, config=TALL, gated=True)


@pytest.mark.parametrize(
    ("depth", "columns", "gated"),
    [(192, 160, True), (160, 192, False), (48, 80, True), (16, 16, False), (96, 320, True)],
)
def test_sizes_that_no_block_divides(depth, columns, gated):
    config = mosaic.Config(block_m=32, block_n=128, block_k=128, stages=2)
    check(3, [11, 0, 40], behind=4, depth=depth, columns=columns, gated=gated, config=config, blocks=3)


@pytest.mark.parametrize(("stages", "blocks"), [(2, 1), (3, 3), (5, 2)])
def test_more_steps_than_stages(stages, blocks):
    config = mosaic.Config(block_m=64, block_n=64, block_k=64, stages=stages)
    check(4, [70, 5], depth=448, columns=128, config=config, blocks=blocks)


@pytest.mark.skipif(ON_GPU, reason="changes the interpreter")
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("block_m", [64, 128])
def test_operands_are_there_until_products_are_waited_for(monkeypatch, gated, block_m):
    config = mosaic.Config(block_m=block_m, block_n=64, block_k=64, stages=2)
    with late_products(monkeypatch):
        check(12, [70, 5], depth=448, gated=gated, config=config, blocks=1)


def test_a_group_that_needs_a_tile_more_for_where_it_begins():
    check(13, [5, 12], config=NARROW)


@pytest.mark.parametrize("gated", [False, True])
def test_wide_tiles_of_two_warpgroups(gated):
    config = mosaic.Config(block_m=128, block_n=128 if gated else 256, block_k=64, stages=3)
    check(5, [130, 60, 0, 200], depth=128, columns=256, gated=gated, config=config)


def test_float16():
    check(6, [33, 4], dtype=jnp.float16, gated=True)


def test_large_gates():
    lhs = jnp.full((16, 64), 8, jnp.bfloat16)
    gate = jnp.stack([jnp.full((64, 64), value, jnp.bfloat16) for value in (-8, 8)])
    with interpreted():
        found = jax.jit(mosaic.gated_grouped_matmul)(lhs, gate, abs(gate) / 8, jnp.array([8, 8], jnp.int32))
    np.testing.assert_array_equal(found[:8], 0)
    np.testing.assert_array_equal(found[8:], 4096 * 512)


@pytest.mark.parametrize("gated", [False, True])
def test_public_functions_choose_the_kernel_and_a_fitting_config(gated):
    spec = arg_specs.Spec(tokens=9, top_k=2, experts=4, inputs=192, outputs=160, gated=gated)
    arguments = spec.make(jax.random.key(0))
    function = gated_grouped_matmul if gated else grouped_matmul
    assert spec.function is function
    with interpreted(4):
        found = jax.jit(function)(**arguments)
    wide = {name: a if name == "group_sizes" else a.astype(jnp.float32) for name, a in arguments.items()}
    wanted = function(**wide, implementation="reference")
    np.testing.assert_allclose(found.astype(jnp.float32), wanted, rtol=2**-7, atol=2**-12)


@pytest.mark.parametrize(("rows", "groups"), [(0, 3), (5, 0)])
def test_nothing_to_multiply(rows, groups):
    with interpreted():
        lhs, rhs = jnp.ones((rows, 64), jnp.bfloat16), jnp.ones((groups, 64, 32), jnp.bfloat16)
        found = mosaic.grouped_matmul(lhs, rhs, jnp.zeros(groups, jnp.int32))
    np.testing.assert_array_equal(found, np.zeros((rows, 32)))


@pytest.mark.parametrize("name", arg_specs.SPECS)
def test_every_spec_has_a_config_that_fits(name):
    spec = arg_specs.SPECS[name]
    products = 1 + spec.gated
    config = mosaic.default_config(spec.rows, spec.experts, spec.outputs, products)
    assert config.block_n * products <= 256
    assert config.shared_bytes(products) <= 227 * 1024
    assert config.stages >= 3


@pytest.mark.parametrize("products", [1, 2])
def test_every_candidate_fits_and_tiles_of_few_rows_are_among_them(products):
    candidates = mosaic.candidates(products)
    assert len(set(candidates)) == len(candidates) > 4
    assert sum(config.block_m == 16 for config in candidates) == 2
    for config in candidates:
        assert config.block_n * products <= 256
        assert config.shared_bytes(products) <= 226 * 1024


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_m": 24}, "block_m=24"),
        ({"block_m": 256}, "block_m=256"),
        ({"block_n": 96}, "block_n=96"),
        ({"block_n": 320}, "block_n=320"),
        ({"block_k": 0}, "block_k=0"),
        ({"stages": 1}, "stages=1"),
    ],
)
def test_impossible_tiles_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        mosaic.Config(**{"block_m": 64, "block_n": 64, "block_k": 64, "stages": 2} | fields)


@pytest.mark.parametrize(("block_n", "stages"), [(256, 2), (128, 5)])
def test_tiles_that_no_multiprocessor_holds_are_refused(block_n, stages):
    config = mosaic.Config(block_m=128, block_n=block_n, block_k=64, stages=stages)
    matrices = jnp.zeros((1, 64, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="are there"), on_hopper():
        mosaic.gated_grouped_matmul(matrices[0], matrices, matrices, jnp.zeros(1, jnp.int32), config=config)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [((24, 64), jnp.bfloat16, "K=24"), ((64, 40), jnp.bfloat16, "N=40"), ((64, 64), jnp.float32, "float32")],
)
def test_what_the_kernel_cannot_do_is_left_to_another(shape, dtype, message):
    lhs, rhs, sizes = jnp.ones((8, shape[0]), dtype), jnp.ones((2, *shape), dtype), jnp.array([3, 2], jnp.int32)
    with on_hopper():
        with pytest.raises(NotImplementedError, match=message):
            grouped_matmul(lhs, rhs, sizes, implementation="mosaic")
        found = grouped_matmul(lhs, rhs, sizes)
    np.testing.assert_array_equal(found[:5], shape[0])


def test_a_plan_has_each_row_once():
    rng = np.random.default_rng(7)
    planned = jax.jit(plan, static_argnums=(1, 2))
    for _ in range(25):
        rows, block_m = int(rng.choice([1, 9, 64, 1000])), int(rng.choice([8, 16, 128]))
        groups = int(rng.integers(1, 9))
        shares = rng.multinomial(rows, np.append(rng.dirichlet(np.full(groups, 0.5)), rng.choice([0, 0.2])))[:groups]
        group, start, first, end, (count,) = map(np.asarray, planned(jnp.asarray(shares, jnp.int32), rows, block_m))
        assert count <= len(group) == most_tiles(rows, groups, block_m)
        of_row = np.repeat(np.arange(groups + 1), np.append(shares, rows - shares.sum()))
        seen = np.concatenate([np.full(end[i] - first[i], group[i]) for i in range(count)])
        np.testing.assert_array_equal(seen, of_row)
        np.testing.assert_array_equal(first[1:count], end[: count - 1])
        assert first[0] == 0
        assert not (start[:count] % ALIGNMENT).any()
        assert (start[:count] <= first[:count]).all()
        assert (first[:count] < end[:count]).all()
        assert (end[:count] <= start[:count] + block_m).all()
