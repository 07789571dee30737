"""Grouped matrix product and expert permutation against loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.grouped_matmul import arg_specs, combine, dispatch, gated_grouped_matmul, grouped_matmul
from pallas_kernels.grouped_matmul.xla import MAX_BLOCK_ROWS, block_rows

IMPLEMENTATIONS = ("xla", "reference")
ROWS, DEPTH, WIDTH = 40, 5, 3


def product(lhs: jax.Array, rhs: jax.Array, sizes: list[int]) -> np.ndarray:
    lhs, rhs = np.asarray(lhs, np.float64), np.asarray(rhs, np.float64)
    out = np.zeros((lhs.shape[0], rhs.shape[2]))
    row = 0
    for group, size in enumerate(sizes):
        for _ in range(size):
            out[row] = lhs[row] @ rhs[group]
            row += 1
    return out


def inputs(rows: int, groups: int, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    shapes = ((rows, DEPTH), (groups, DEPTH, WIDTH))
    lhs, rhs = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    return lhs, rhs


@pytest.mark.parametrize("implementation", ["auto", *IMPLEMENTATIONS])
@pytest.mark.parametrize(
    "sizes",
    [
        [10, 10, 10, 10],
        [40, 0, 0, 0],
        [0, 0, 0, 40],
        [0, 17, 0, 23],
        [0, 0, 0, 0],
        [1, 2, 3, 4],
        [0, 11, 12, 0],
    ],
)
def test_each_row_meets_the_matrix_of_its_group(implementation: str, sizes: list[int]) -> None:
    lhs, rhs = inputs(ROWS, len(sizes))
    found = grouped_matmul(lhs, rhs, jnp.array(sizes, jnp.int32), implementation=implementation)
    np.testing.assert_allclose(found, product(lhs, rhs, sizes), atol=1e-5)
    assert not np.asarray(found)[sum(sizes) :].any()


_jitted = jax.jit(grouped_matmul, static_argnames="implementation")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=3, max_size=3), st.integers(0, 100))
def test_any_group_sizes(sizes: list[int], seed: int) -> None:
    lhs, rhs = inputs(37, 3, seed)
    found = _jitted(lhs, rhs, jnp.array(sizes, jnp.int32))
    np.testing.assert_allclose(found, product(lhs, rhs, sizes), atol=1e-5)


@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (1, 8), (7, 3), (130, 1), (300, 2), (0, 4)])
def test_rows_that_are_no_multiple_of_the_block(rows: int, groups: int) -> None:
    lhs, rhs = inputs(rows, groups)
    sizes = np.bincount(np.random.default_rng(1).integers(0, groups, rows), minlength=groups)
    found = grouped_matmul(lhs, rhs, jnp.array(sizes, jnp.int32))
    np.testing.assert_allclose(found, product(lhs, rhs, list(sizes)), atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "groups", "block"), [(1, 64, 1), (16, 64, 1), (64, 8, 8), (65, 8, 16), (10_000, 2, MAX_BLOCK_ROWS)]
)
def test_a_block_is_an_even_share_up_to_the_maximum(rows: int, groups: int, block: int) -> None:
    assert block_rows(rows, groups) == block


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_bad_row_spoils_no_other(implementation: str) -> None:
    lhs, rhs = inputs(ROWS, 4)
    sizes = jnp.array([9, 0, 20, 5], jnp.int32)
    clean = np.asarray(grouped_matmul(lhs, rhs, sizes, implementation=implementation))
    lhs = lhs.at[12].set(np.nan).at[36].set(np.inf)
    spoilt = np.asarray(grouped_matmul(lhs, rhs, sizes, implementation=implementation))
    others = np.arange(ROWS) != 12
    np.testing.assert_array_equal(spoilt[others], clean[others])
    assert np.isnan(spoilt[12]).all()


def test_bfloat16_stays_bfloat16() -> None:
    lhs, rhs = (jnp.asarray(x, jnp.bfloat16) for x in inputs(ROWS, 4))
    sizes = jnp.array([9, 0, 20, 5], jnp.int32)
    for implementation in IMPLEMENTATIONS:
        found = grouped_matmul(lhs, rhs, sizes, implementation=implementation)
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(found.astype(np.float32), product(lhs, rhs, [9, 0, 20, 5]), atol=0.1)


@pytest.mark.parametrize("implementation", ["auto", *IMPLEMENTATIONS])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gated_product_is_that_of_two_products(implementation: str, dtype: str) -> None:
    lhs, gate = (a.astype(dtype) for a in inputs(ROWS, 4))
    up = inputs(ROWS, 4, seed=1)[1].astype(dtype)
    sizes = jnp.array([9, 0, 20, 5], jnp.int32)
    found = gated_grouped_matmul(lhs, gate, up, sizes, implementation=implementation)
    left, right = (grouped_matmul(lhs, a, sizes, implementation=implementation) for a in (gate, up))
    np.testing.assert_array_equal(found, jax.nn.silu(left) * right)
    wanted = product(lhs, gate, [9, 0, 20, 5])
    wanted = wanted / (1 + np.exp(-wanted)) * product(lhs, up, [9, 0, 20, 5])
    np.testing.assert_allclose(found.astype(np.float32), wanted, atol=1e-4 if dtype == "float32" else 0.2)


def test_the_kernel_needs_a_gpu() -> None:
    lhs, rhs = (a.astype(jnp.bfloat16) for a in inputs(ROWS, 4))
    sizes = jnp.array([9, 0, 20, 5], jnp.int32)
    with pytest.raises(NotImplementedError, match="compute capability"):
        grouped_matmul(lhs, rhs, sizes, implementation="mosaic")
    with pytest.raises(NotImplementedError, match="compute capability"):
        gated_grouped_matmul(lhs, rhs, rhs, sizes, implementation="mosaic")


def test_specs_count_what_they_make() -> None:
    spec = arg_specs.Spec(tokens=50, top_k=2, experts=4, inputs=8, outputs=16, gated=True)
    arguments = spec.make(jax.random.key(0))
    assert arguments["group_sizes"].sum() == spec.rows == len(arguments["lhs"]) == 100
    assert spec.function(**arguments, **spec.options).shape == (100, 16)
    # All four experts have rows: four times two matrices, and rows in and out.
    assert spec.bytes_moved == 2 * (4 * 2 * 8 * 16 + 100 * (8 + 16))
    assert spec.flops == 2 * 2 * 100 * 8 * 16


def test_the_reference_has_the_gradients_of_the_formula() -> None:
    lhs, rhs = inputs(6, 2)
    sizes = jnp.array([2, 3], jnp.int32)

    def total(lhs, rhs):
        return grouped_matmul(lhs, rhs, sizes, implementation="reference").sum()

    to_lhs, to_rhs = jax.grad(total, (0, 1))(lhs, rhs)
    np.testing.assert_allclose(
        to_lhs, np.stack([rhs[g].sum(1) for g in (0, 0, 1, 1, 1)] + [np.zeros(DEPTH)]), atol=1e-5
    )
    wanted = np.stack([lhs[:2].sum(0), lhs[2:5].sum(0)])
    np.testing.assert_allclose(to_rhs, np.broadcast_to(wanted[:, :, None], rhs.shape), atol=1e-5)


FITTING = {"lhs": jnp.zeros((4, 2)), "rhs": jnp.zeros((3, 2, 5)), "group_sizes": jnp.zeros(3, jnp.int32)}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lhs": jnp.zeros(4)}, r"lhs must be floating\[M, K\]: float32\[4\]"),
        ({"lhs": jnp.zeros((4, 2), int)}, r"lhs must be floating\[M, K\]: int32\[4, 2\]"),
        ({"lhs": jnp.zeros((4, 2), bool)}, "lhs must be floating.*bool"),
        ({"rhs": jnp.zeros((3, 5, 2))}, r"rhs must be float32\[E, 2, N\]: float32\[3, 5, 2\]"),
        ({"rhs": jnp.zeros((2, 2))}, r"rhs must be float32\[E, 2, N\]"),
        ({"rhs": jnp.zeros((3, 2, 5), jnp.bfloat16)}, r"rhs must be float32\[E, 2, N\]: bfloat16"),
        ({"group_sizes": jnp.zeros(2, jnp.int32)}, r"group_sizes must be int32\[3\]: int32\[2\]"),
        ({"group_sizes": jnp.zeros(3)}, r"group_sizes must be int32\[3\]: float32\[3\]"),
        ({"implementation": "cuda"}, r"'cuda' is none of \['auto', 'mosaic', 'cudnn', 'xla', 'reference'\]"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_wrong_arguments_are_refused(changed, message) -> None:
    with pytest.raises(ValueError, match=message):
        grouped_matmul(**FITTING | changed)


@pytest.mark.parametrize("up", [jnp.zeros((2, 5, 4)), jnp.zeros((2, 5, 3), jnp.bfloat16)])
@pytest.mark.usefixtures("unchecked_shapes")
def test_gate_and_up_that_differ_are_refused(up) -> None:
    with pytest.raises(ValueError, match=r"up must be float32\[2, 5, 3\]"):
        gated_grouped_matmul(jnp.zeros((4, 5)), jnp.zeros((2, 5, 3)), up, jnp.zeros(2, jnp.int32))


def test_cudnn_has_no_grouped_product() -> None:
    with pytest.raises(NotImplementedError, match="grouped_matmul has no form named 'cudnn', only"):
        grouped_matmul(**FITTING, implementation="cudnn")


def test_dispatch_sorts_by_expert_and_combine_undoes_it() -> None:
    x = jnp.arange(6, dtype=jnp.float32).reshape(3, 2)
    experts = jnp.array([[2, 0], [0, 1], [2, 1]])
    rows, sizes, order = dispatch(x, experts, 4)
    np.testing.assert_array_equal(sizes, [2, 2, 2, 0])
    np.testing.assert_array_equal(order, [1, 2, 3, 5, 0, 4])
    np.testing.assert_array_equal(rows, x[np.array([0, 1, 1, 2, 0, 2])])
    weights = jnp.array([[0.25, 0.5], [1.0, 2.0], [3.0, 0.0]])
    scaled = rows * np.repeat([1.0, 10.0, 100.0], 2)[:, None]
    wanted = x * np.array([[0.25 * 100 + 0.5 * 1], [1.0 * 1 + 2.0 * 10], [3.0 * 100]])
    np.testing.assert_allclose(combine(scaled, order, weights), wanted)


@pytest.mark.parametrize(
    ("x", "experts", "num_experts", "message"),
    [
        (jnp.zeros(3), jnp.zeros((3, 2), int), 4, r"x must be floating\[T, D\]: float32\[3\]"),
        (jnp.zeros((3, 2)), jnp.zeros((2, 2), int), 4, r"experts must be integer\[3, k\]: int32\[2, 2\]"),
        (jnp.zeros((3, 2)), jnp.zeros((3, 2)), 4, r"experts must be integer\[3, k\]: float32"),
        (jnp.zeros((3, 2)), jnp.zeros((3, 0), int), 4, r"must have an expert.*\[3, 0\]"),
        (jnp.zeros((3, 2)), jnp.zeros((3, 2), int), 0, "num_experts=0"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_misshapen_choices_are_refused(x, experts, num_experts, message) -> None:
    with pytest.raises(ValueError, match=message):
        dispatch(x, experts, num_experts)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rows": jnp.zeros(6)}, r"rows must be floating\[M, D\]"),
        ({"order": jnp.arange(5)}, r"order must be int32\[6\]: int32\[5\]"),
        ({"order": jnp.zeros(6)}, r"order must be int32\[6\]: float32\[6\]"),
        ({"weights": jnp.zeros(6)}, r"weights must be floating\[T, k\]"),
        ({"weights": jnp.zeros((2, 2))}, r"6 entries, one a row: float32\[2, 2\]"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_results_that_do_not_fit_their_weights_are_refused(changed, message) -> None:
    with pytest.raises(ValueError, match=message):
        combine(**{"rows": jnp.zeros((6, 2)), "order": jnp.arange(6), "weights": jnp.zeros((3, 2))} | changed)
