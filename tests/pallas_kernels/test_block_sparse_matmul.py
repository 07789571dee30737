"""Packing of block-sparse weights, and products with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.block_sparse_matmul import (
    arg_specs,
    block_bytes,
    block_sparse_matmul,
    pack_blocks,
    unpack_blocks,
)


def pruned(rng, inputs, outputs, size, kept):
    """Weights with `kept` blocks of each block of outputs."""
    rank = np.argsort(rng.random((inputs // size, outputs // size)), axis=0)
    there = np.kron(rank < kept, np.ones((size, size)))
    return (rng.normal(size=(inputs, outputs)) * there).astype(np.float32)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from([1, 2, 8]),
    st.integers(0, 4),
    st.sampled_from(["float32", "bfloat16"]),
    st.integers(0, 1000),
)
def test_packed_blocks_come_back_exactly(inputs, outputs, size, kept, dtype, seed):
    kept = min(kept, inputs)
    weights = pruned(np.random.default_rng(seed), inputs * size, outputs * size, size, kept).astype(jnp.dtype(dtype))
    for asked in (None, inputs):
        packed = pack_blocks(weights, size, asked)
        assert packed.indices.shape == (outputs, asked or max(kept, 1))
        assert (np.diff(packed.indices) > 0).all()
        assert packed.blocks.nbytes + packed.indices.nbytes == block_bytes(
            outputs * size, size, packed.indices.shape[1], dtype
        )
        found = unpack_blocks(*map(jnp.asarray, packed), inputs * size)
        np.testing.assert_array_equal(found, weights)


def test_blocks_are_of_inputs_by_outputs_and_as_many_for_all():
    weights = np.zeros((6, 4), np.float32)
    weights[4, 1], weights[0, 2], weights[3, 3] = 1, 2, 3
    packed = pack_blocks(weights, 2)
    assert packed.indices.tolist() == [[0, 2], [0, 1]]
    assert packed.blocks.tolist() == [[[[0, 0], [0, 0]], [[0, 1], [0, 0]]], [[[2, 0], [0, 0]], [[0, 0], [0, 3]]]]


@pytest.mark.parametrize(
    ("shape", "size", "kept", "message"),
    [
        ((6, 4), 4, None, "blocks of 4: 6 inputs and 4 outputs must be multiples"),
        ((6, 4), 0, None, "blocks of 0"),
        ((6,), 2, None, r"weights must be \[K, N\]"),
        ((6, 4), 2, 2, "outputs 0 to 1 have values in 3 of 3 blocks of 2 inputs; 2 are to be kept"),
        ((6, 4), 2, 4, "4 are to be kept"),
    ],
)
def test_what_cannot_be_packed_is_refused(shape, size, kept, message):
    with pytest.raises(ValueError, match=message):
        pack_blocks(np.ones(shape, np.float32), size, kept)


@pytest.mark.parametrize("implementation", ["auto", "xla", "reference"])
@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("kept", [1, 3])
def test_products_are_those_of_the_dense_weights(implementation, rows, kept):
    rng = np.random.default_rng(0)
    weights, x = pruned(rng, 24, 16, 8, kept), jnp.asarray(rng.normal(size=(rows, 24)), jnp.float32)
    found = block_sparse_matmul(x, *map(jnp.asarray, pack_blocks(weights, 8)), implementation=implementation)
    wanted = np.asarray(x, np.float64) @ weights.astype(np.float64)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_products_in_bfloat16_stay_so():
    rng = np.random.default_rng(0)
    weights, x = pruned(rng, 24, 16, 8, 2), jnp.asarray(rng.normal(size=(2, 24)), jnp.bfloat16)
    packed = [jnp.asarray(a) for a in pack_blocks(jnp.asarray(weights, jnp.bfloat16), 8)]
    for implementation in ("xla", "reference"):
        assert block_sparse_matmul(x, *packed, implementation=implementation).dtype == jnp.bfloat16


def test_the_kernel_needs_a_gpu():
    arguments = arg_specs.SPECS["base_up_8_block_64"].make(jax.random.key(0))
    with pytest.raises(NotImplementedError, match="compute capability"):
        block_sparse_matmul(**arguments, implementation="mosaic")


def test_specs_count_what_they_make():
    spec = arg_specs.Spec(rows=3, inputs=64, outputs=32, size=16, kept=2)
    arguments = spec.make(jax.random.key(0))
    assert (np.diff(arguments["indices"]) > 0).all()
    out = block_sparse_matmul(**arguments, **spec.options)
    assert spec.bytes_moved == sum(a.nbytes for a in arguments.values()) + out.nbytes
    assert spec.flops == 2 * 3 * 2 * 16 * 32


FITTING = {"x": jnp.zeros((2, 24)), "blocks": jnp.zeros((2, 1, 8, 8)), "indices": jnp.zeros((2, 1), jnp.int32)}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": jnp.zeros(24)}, r"x must be floating\[M, K\]"),
        ({"x": jnp.zeros((2, 25))}, "blocks of 8: 25 inputs"),
        ({"blocks": jnp.zeros((2, 1, 8, 8), jnp.bfloat16)}, r"blocks must be float32\[P, k, b, b\]: bfloat16"),
        ({"blocks": jnp.zeros((2, 1, 8, 4))}, "blocks must be square"),
        ({"blocks": jnp.zeros((2, 4, 8, 8)), "indices": jnp.zeros((2, 4), jnp.int32)}, "from 1 to K / b"),
        ({"indices": jnp.zeros((2, 2), jnp.int32)}, r"indices must be int32\[2, 1\]"),
        ({"implementation": "cuda"}, "'cuda' is none of"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_wrong_arguments_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        block_sparse_matmul(**FITTING | changed)
