"""The Mosaic kernel of the product with packed weights, interpreted, beside the dense product in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.sparse_matmul import arg_specs, mosaic, pack, sparse_matmul
from tests.pallas_kernels.gpu.interpreter import ON_GPU, interpreted, on_hopper
from tests.pallas_kernels.gpu.late_products import late_products
from tests.pallas_kernels.test_sparse_matmul import pruned

pytestmark = pytest.mark.kernels


def form(warpgroups=1, words=16, stages=2, shares=1):
    """The interpreter takes operands from shared memory only."""
    return mosaic.Config(warpgroups, words, stages, shares, registers=ON_GPU)


def check(config, *, rows=3, inputs=256, outputs=64, pattern=(2, 4), dtype=jnp.bfloat16, seed=0):
    rng = np.random.default_rng(seed)
    weights = jnp.asarray(pruned(rng, inputs, outputs, *pattern, fewer=0.1) / inputs**0.5, dtype)
    x = jnp.asarray(rng.normal(size=(rows, inputs)), dtype)
    values, mask = map(jnp.asarray, pack(weights, *pattern))
    function = jax.jit(mosaic.sparse_matmul, static_argnames=("of", "config"))
    with interpreted(4):
        found = np.asarray(function(x, values, mask, of=pattern[1], config=config))
    assert found.shape == (rows, outputs)
    assert found.dtype == dtype
    # Sums are of float32: the error is that of rounding the result once.
    epsilon = float(jnp.finfo(dtype).eps)
    wanted = np.asarray(x, np.float64) @ np.asarray(weights, np.float64)
    np.testing.assert_allclose(found.astype(np.float64), wanted, rtol=epsilon, atol=epsilon / 64)


@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (1, 4), (1, 2), (7, 8), (5, 16)])
def test_patterns(pattern):
    check(form(), pattern=pattern)


@pytest.mark.parametrize("rows", [1, 8, 9, 64])
def test_rows(rows):
    check(form(), rows=rows)


@pytest.mark.parametrize(("outputs", "warpgroups"), [(8, 1), (72, 1), (200, 2)])
def test_outputs_that_no_tile_divides(outputs, warpgroups):
    check(form(warpgroups), outputs=outputs)


@pytest.mark.parametrize(("stages", "words"), [(2, 16), (3, 32)])
def test_more_steps_than_stages(stages, words):
    check(form(words=words, stages=stages), inputs=2048)


@pytest.mark.parametrize("shares", [2, 3, 7])
def test_shares_of_the_inputs(shares):
    check(form(shares=shares), inputs=1280, outputs=72, pattern=(4, 8))


def test_float16():
    check(form(warpgroups=2), outputs=128, dtype=jnp.float16)


@pytest.mark.skipif(ON_GPU, reason="changes the interpreter")
def test_operands_are_there_until_products_are_waited_for(monkeypatch):
    with late_products(monkeypatch):
        # Two stages would hide it: the next loads are waited for before what was read too late is seen.
        check(form(stages=3), inputs=1536)


def test_values_and_bits_of_all_kinds():
    """Zeros, infinities and the sign bit are moved as they are."""
    weights = np.zeros((256, 64), np.float32)
    weights[15::16], weights[12::16], weights[14::64, 3], weights[14::64, 5] = -1, 0.5, np.inf, -np.inf
    weights[12::16, 3:6:2] = 0
    values, mask = map(jnp.asarray, pack(jnp.asarray(weights, jnp.bfloat16), 2, 4))
    function = jax.jit(mosaic.sparse_matmul, static_argnames=("of", "config"))
    with interpreted():
        found = np.asarray(function(jnp.ones((8, 256), jnp.bfloat16), values, mask, of=4, config=form()), np.float32)
    wanted = np.full((8, 64), -8.0)
    wanted[:, 3], wanted[:, 5] = np.inf, -np.inf
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.skipif(not ON_GPU, reason="the default form takes operands from registers")
def test_the_public_function_chooses_the_kernel():
    spec = arg_specs.SPECS["base_up_8"]
    arguments = spec.make(jax.random.key(0))
    found = jax.jit(sparse_matmul, static_argnames="of")(**arguments, of=spec.of)
    wanted = sparse_matmul(**arguments, of=spec.of, implementation="reference")
    np.testing.assert_allclose(found.astype(jnp.float32), wanted.astype(jnp.float32), rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("name", arg_specs.SPECS)
def test_every_spec_has_a_form_that_fits_and_fills_the_device(name):
    spec = arg_specs.SPECS[name]
    rows = -(-spec.rows // 8) * 8
    config = mosaic.default_config(rows, spec.inputs // 16, spec.outputs, spec.planes, spec.of, 132)
    assert config.shared_bytes(spec.planes, rows, spec.of) <= 226 * 1024
    assert spec.inputs // 16 % config.words == 0
    if spec.inputs >= 4096:
        assert -(-spec.outputs // (64 * config.warpgroups)) * config.shares >= 100
    candidates = mosaic.candidates(spec.planes, spec.rows, spec.of)
    assert len(candidates) >= 3
    assert all(one.shared_bytes(spec.planes, rows, spec.of) <= 226 * 1024 for one in candidates)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"warpgroups": 3}, "warpgroups=3"),
        ({"words": 64}, "words=64"),
        ({"words": 32, "warpgroups": 2}, "words=32"),
        ({"stages": 1}, "stages=1"),
        ({"shares": 0}, "shares=0"),
    ],
)
def test_impossible_forms_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        mosaic.Config(**{"warpgroups": 1, "words": 16, "stages": 2, "shares": 1} | fields)


def test_forms_that_no_multiprocessor_holds_are_refused():
    arguments = arg_specs.Spec(rows=64, inputs=256, outputs=64).make(jax.random.key(0))
    with pytest.raises(ValueError, match="are there"), on_hopper():
        mosaic.sparse_matmul(**arguments, of=4, config=mosaic.Config(2, 16, 9, 1))


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "dtype", "message"),
    [
        (1, 128, 64, "bfloat16", "K=128"),
        (1, 256, 12, "bfloat16", "N=12"),
        (65, 256, 64, "bfloat16", "M=65"),
        (1, 256, 64, "float32", "float32"),
    ],
)
def test_what_the_kernel_cannot_do_is_left_to_another(rows, inputs, outputs, dtype, message):
    arguments = arg_specs.Spec(rows=rows, inputs=inputs, outputs=outputs, dtype=dtype).make(jax.random.key(0))
    with on_hopper():
        with pytest.raises(NotImplementedError, match=message):
            sparse_matmul(**arguments, of=4, implementation="mosaic")
        found = sparse_matmul(**arguments, of=4)
    assert found.shape == (rows, outputs)
