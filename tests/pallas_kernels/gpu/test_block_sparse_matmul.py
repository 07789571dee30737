"""The Mosaic kernel of the block-sparse product, interpreted, beside the dense product in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_sparse_matmul import arg_specs, block_sparse_matmul, mosaic, pack_blocks
from tests.pallas_kernels.gpu.interpreter import ON_GPU, interpreted, on_hopper
from tests.pallas_kernels.gpu.late_products import late_products
from tests.pallas_kernels.test_block_sparse_matmul import pruned

pytestmark = pytest.mark.kernels

PLAIN = mosaic.Config(warpgroups=1, stages=2, shares=1)


def check(config, *, rows=3, inputs=256, outputs=128, size=64, kept=2, dtype=jnp.bfloat16):
    rng = np.random.default_rng(0)
    weights = jnp.asarray(pruned(rng, inputs, outputs, size, kept) / inputs**0.5, dtype)
    x = jnp.asarray(rng.normal(size=(rows, inputs)), dtype)
    function = jax.jit(mosaic.block_sparse_matmul, static_argnames="config")
    with interpreted(4):
        found = np.asarray(function(x, *map(jnp.asarray, pack_blocks(weights, size)), config=config))
    assert found.shape == (rows, outputs)
    assert found.dtype == dtype
    # Sums are of float32: the error is that of rounding the result once.
    epsilon = float(jnp.finfo(dtype).eps)
    wanted = np.asarray(x, np.float64) @ np.asarray(weights, np.float64)
    np.testing.assert_allclose(found.astype(np.float64), wanted, rtol=epsilon, atol=epsilon / 64)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(("rows", "warpgroups"), [(1, 1), (64, 1), (70, 2), (130, 1)])
def test_rows_and_sizes_of_blocks(size, rows, warpgroups):
    check(mosaic.Config(warpgroups, stages=2, shares=1), rows=rows, size=size)


@pytest.mark.parametrize(("stages", "shares"), [(2, 1), (3, 1), (2, 2), (2, 3)])
def test_more_blocks_than_stages_and_shares_of_them(stages, shares):
    check(mosaic.Config(1, stages, shares), inputs=640, kept=7)


def test_float16():
    check(PLAIN, dtype=jnp.float16)


@pytest.mark.skipif(ON_GPU, reason="changes the interpreter")
def test_operands_are_there_until_products_are_waited_for(monkeypatch):
    with late_products(monkeypatch):
        # Two stages would hide it: the next loads are waited for before what was read too late is seen.
        check(mosaic.Config(1, 3, 1), inputs=512, kept=6)


def test_the_public_function_chooses_the_kernel_and_a_fitting_form():
    arguments = arg_specs.SPECS["base_up_8_block_64"].make(jax.random.key(0))
    with interpreted(4):
        found = jax.jit(block_sparse_matmul)(**arguments)
    wide = {name: a if name == "indices" else a.astype(jnp.float32) for name, a in arguments.items()}
    wanted = block_sparse_matmul(**wide, implementation="reference")
    np.testing.assert_allclose(found.astype(jnp.float32), wanted, rtol=2**-7, atol=2**-12)


@pytest.mark.parametrize("name", arg_specs.SPECS)
def test_every_spec_has_a_form_that_fits(name):
    spec = arg_specs.SPECS[name]
    config = mosaic.default_config(spec.rows, spec.outputs // spec.size, spec.kept, spec.size, 132)
    assert config.stages >= 3
    candidates = mosaic.candidates(spec.size)
    assert len(candidates) >= 6
    assert all(one.shared_bytes(spec.size) <= 226 * 1024 for one in (config, *candidates))


@pytest.mark.parametrize("fields", [{"warpgroups": 3}, {"stages": 1}, {"shares": 0}])
def test_impossible_forms_are_refused(fields):
    ((name, value),) = fields.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        mosaic.Config(**{"warpgroups": 1, "stages": 2, "shares": 1} | fields)


def test_forms_that_no_multiprocessor_holds_are_refused():
    arguments = arg_specs.Spec(rows=8, inputs=256, outputs=128, size=128, kept=1).make(jax.random.key(0))
    with pytest.raises(ValueError, match="are there"), on_hopper():
        mosaic.block_sparse_matmul(**arguments, config=mosaic.Config(2, 8, 1))


@pytest.mark.parametrize(("size", "dtype"), [(32, "bfloat16"), (64, "float32")])
def test_what_the_kernel_cannot_do_is_left_to_another(size, dtype):
    arguments = arg_specs.Spec(rows=2, inputs=128, outputs=128, size=size, kept=2, dtype=dtype).make(jax.random.key(0))
    with on_hopper():
        with pytest.raises(NotImplementedError, match="must be"):
            block_sparse_matmul(**arguments, implementation="mosaic")
        assert block_sparse_matmul(**arguments).shape == (2, 128)
