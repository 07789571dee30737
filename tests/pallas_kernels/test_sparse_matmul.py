"""Packing of N:M weights, and products with packed ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.sparse_matmul import arg_specs, pack, packed_bytes, sparse_matmul, unpack, xla
from pallas_kernels.sparse_matmul.packing import in_order

PATTERNS = [(2, 4), (4, 8), (1, 2), (1, 4), (3, 8), (7, 8), (5, 16)]


def pruned(rng, inputs, outputs, keep, of, fewer=0.0):
    """Weights of a pattern; a share `fewer` of what it leaves is zero as well."""
    rank = np.argsort(rng.random((inputs // of, of, outputs)), axis=1)
    weights = rng.normal(size=rank.shape) * (rank < keep) * (rng.random(rank.shape) >= fewer)
    return weights.reshape(inputs, outputs).astype(np.float32)


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(PATTERNS),
    st.integers(1, 4),
    st.integers(1, 9),
    st.sampled_from(["float32", "bfloat16", "float16"]),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.integers(0, 1000),
)
def test_packed_weights_come_back_exactly(pattern, words, outputs, dtype, fewer, seed):
    weights = pruned(np.random.default_rng(seed), 16 * words, outputs, *pattern, fewer).astype(jnp.dtype(dtype))
    packed = pack(weights, *pattern)
    assert packed.values.dtype == weights.dtype
    assert packed.values.nbytes + packed.mask.nbytes == packed_bytes(16 * words, outputs, *pattern, dtype)
    values, mask = map(jnp.asarray, packed)
    np.testing.assert_array_equal(unpack(values, mask, pattern[1]), weights)
    np.testing.assert_array_equal(in_order(jnp.stack(xla.planes(values, mask, pattern[1]))), weights)


def test_the_form_is_a_bit_for_each_weight_and_values_in_their_order():
    weights = np.zeros((16, 1), np.float32)
    weights[[1, 3, 4, 5, 8], 0] = 1, 2, 3, 4, 5
    packed = pack(weights, 2, 4)
    # Groups with fewer than two values take their first inputs as well.
    assert packed.mask.tolist() == [[0b0011_0011_0011_1010]]
    assert packed.values[:, 0, 0].tolist() == [1, 2, 3, 4, 5, 0, 0, 0]


@pytest.mark.parametrize(("keep", "of"), [(2, 4), (4, 8)])
def test_packed_bytes_are_nine_sixteenths(keep, of):
    assert packed_bytes(4096, 14336, keep, of, "bfloat16") == 4096 * 14336 * 2 * 9 // 16


def test_weights_that_do_not_follow_the_pattern_are_refused():
    weights = np.zeros((32, 3), np.float32)
    weights[24:27, 2] = 1
    with pytest.raises(ValueError, match="don't follow 2:4: output 2 has 3 values among its inputs 24 to 27"):
        pack(weights, 2, 4)
    assert pack(weights, 4, 8).values.shape == (8, 3, 2)


@pytest.mark.parametrize(
    ("shape", "keep", "of", "message"),
    [
        ((32, 3), 2, 3, "pattern 2:3 can't be packed"),
        ((32, 3), 4, 4, "pattern 4:4 can't be packed"),
        ((24, 3), 2, 4, "24 inputs can't be packed: they must be a multiple of 16"),
        ((32,), 2, 4, r"weights must be \[K, N\]"),
    ],
)
def test_what_cannot_be_packed_is_refused(shape, keep, of, message):
    with pytest.raises(ValueError, match=message):
        pack(np.zeros(shape, np.float32), keep, of)


@pytest.mark.parametrize("implementation", ["auto", "xla", "reference"])
@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_products_are_those_of_the_dense_weights(implementation, rows, pattern):
    rng = np.random.default_rng(0)
    weights, x = pruned(rng, 64, 5, *pattern), jnp.asarray(rng.normal(size=(rows, 64)), jnp.float32)
    values, mask = map(jnp.asarray, pack(weights, *pattern))
    found = sparse_matmul(x, values, mask, of=pattern[1], implementation=implementation)
    wanted = np.asarray(x, np.float64) @ weights.astype(np.float64)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    # Equal to the last bit where all sums are exact in float32.
    whole, x = np.rint(weights * 8).astype(np.float32), jnp.rint(x * 8)
    packed = map(jnp.asarray, pack(whole, *pattern))
    found = sparse_matmul(x, *packed, of=pattern[1], implementation=implementation)
    np.testing.assert_array_equal(found, np.asarray(x) @ whole)


def test_many_rows_give_what_the_reference_does_to_the_last_bit():
    rng = np.random.default_rng(1)
    values, mask = map(jnp.asarray, pack(pruned(rng, 64, 5, 2, 4), 2, 4))
    x = jnp.asarray(rng.normal(size=(xla.MAX_PLANE_ROWS + 1, 64)), jnp.float32)
    found, wanted = (sparse_matmul(x, values, mask, of=4, implementation=name) for name in ("xla", "reference"))
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("rows", [3, 70])
def test_products_in_bfloat16_are_rounded_once(rows):
    rng = np.random.default_rng(2)
    weights = jnp.asarray(pruned(rng, 256, 5, 2, 4), jnp.bfloat16)
    x = jnp.asarray(rng.normal(size=(rows, 256)), jnp.bfloat16)
    found = sparse_matmul(x, *map(jnp.asarray, pack(weights, 2, 4)), of=4)
    assert found.dtype == jnp.bfloat16
    wanted = np.asarray(x, np.float64) @ np.asarray(weights, np.float64)
    np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=2**-8, atol=2**-8)


def test_infinite_weights_spoil_no_other():
    weights = np.zeros((16, 2), np.float32)
    weights[:2, 0] = np.inf, 1
    weights[2, 1] = 3
    values, mask = map(jnp.asarray, pack(weights, 2, 4))
    np.testing.assert_array_equal(in_order(jnp.stack(xla.planes(values, mask, 4))), weights)


def test_the_kernel_needs_a_gpu():
    arguments = arg_specs.SPECS["base_up_8"].make(jax.random.key(0))
    with pytest.raises(NotImplementedError, match="compute capability"):
        sparse_matmul(**arguments, of=4, implementation="mosaic")


@pytest.mark.parametrize("pattern", [(2, 4), (4, 8)])
def test_specs_make_weights_of_their_pattern_and_count_them(pattern):
    keep, of = pattern
    spec = arg_specs.Spec(rows=3, inputs=64, outputs=8, keep=keep, of=of)
    arguments = spec.make(jax.random.key(0))
    weights = unpack(arguments["values"], arguments["mask"], of)
    assert (np.asarray(weights != 0).reshape(64 // of, of, 8).sum(axis=1) == keep).all()
    out = sparse_matmul(**arguments, **spec.options)
    assert spec.bytes_moved == sum(a.nbytes for a in arguments.values()) + out.nbytes
    assert spec.flops == 2 * 3 * 64 * 8


FITTING = {"x": jnp.zeros((2, 32)), "values": jnp.zeros((8, 5, 2)), "mask": jnp.zeros((5, 2), jnp.uint16), "of": 4}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": jnp.zeros(32)}, r"x must be floating\[M, K\]"),
        ({"x": jnp.zeros((2, 24))}, "24 inputs can't be packed"),
        ({"of": 3}, "pattern 1:3 can't be packed"),
        ({"mask": jnp.zeros((5, 3), jnp.uint16)}, r"mask must be uint16\[N, 2\]"),
        ({"mask": jnp.zeros((5, 2), jnp.int16)}, r"mask must be uint16\[N, 2\]: int16"),
        ({"values": jnp.zeros((8, 4, 2))}, r"values must be float32\[V, 5, 2\]"),
        ({"values": jnp.zeros((8, 5, 2), jnp.bfloat16)}, r"values must be float32\[V, 5, 2\]: bfloat16"),
        ({"values": jnp.zeros((6, 5, 2))}, r"values must have N \* 4 planes for N of 4"),
        ({"values": jnp.zeros((16, 5, 2))}, "N below 4"),
        ({"implementation": "cuda"}, "'cuda' is none of"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_wrong_arguments_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        sparse_matmul(**FITTING | changed)
