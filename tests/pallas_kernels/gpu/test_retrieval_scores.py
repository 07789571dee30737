"""The Mosaic kernel of retrieval scores, interpreted, beside probabilities written out in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import tuning
from pallas_kernels.retrieval_scores import mosaic, retrieval_scores
from tests.pallas_kernels.gpu.interpreter import interpreted, on_hopper
from tests.pallas_kernels.gpu.late_products import late_products
from tests.pallas_kernels.paged_battery import check_scores

pytestmark = pytest.mark.kernels

compiled = jax.jit(retrieval_scores, static_argnames=("scale", "implementation"))


def check(*arguments, multiprocessors=1, **options):
    with interpreted(multiprocessors):
        check_scores(functools.partial(compiled, implementation="mosaic"), *arguments, **options)


@pytest.mark.parametrize("page_size", [8, 16, 32, 64, 128])
def test_pages_of_all_sizes(page_size):
    check(0, [70, 1], kv_heads=2, page_size=page_size)


@pytest.mark.parametrize(("kv_heads", "group"), [(2, 1), (3, 4), (1, 12), (1, 16)])
def test_heads_and_groups(kv_heads, group):
    check(group, [70], kv_heads=kv_heads, group=group, multiprocessors=2)


@pytest.mark.parametrize("head_dim", [16, 32, 80, 96, 128, 192, 256])
def test_head_sizes(head_dim):
    check(head_dim, [70], head_dim=head_dim)


@pytest.mark.parametrize("lengths", [[0, 130, 1], [64, 63], [0, 0], [128]])
def test_ragged_lengths(lengths):
    check(1, lengths, kv_heads=2)


@pytest.mark.parametrize("looked_at", [0.0, 0.1, 1.0])
def test_heads_that_differ_from_row_to_row(looked_at):
    check(2, [70, 30, 100], kv_heads=4, group=2, looked_at=looked_at)


def test_float16():
    check(3, [100], dtype=jnp.float16, scale=None)


@pytest.mark.parametrize(("page_size", "head_dim"), [(16, 64), (64, 128), (128, 32)])
def test_pages_of_8_bits_with_scales(page_size, head_dim):
    check(4, [130, 0, 9], kv_heads=2, page_size=page_size, head_dim=head_dim, fp8=True)


@pytest.mark.parametrize("multiprocessors", [1, 3, 132])
def test_a_long_row_is_split_and_more_tiles_than_stages_are_loaded(multiprocessors):
    check(5, [9 * 64 + 5, 10], kv_heads=2, multiprocessors=multiprocessors)


def test_a_table_that_is_no_whole_number_of_tiles():
    check(6, [40], kv_heads=2, page_size=16, spare=0)


def test_keys_and_queries_are_there_until_products_are_waited_for(monkeypatch):
    with late_products(monkeypatch):
        check(8, [9 * 64 + 5, 10], kv_heads=2)


@pytest.mark.parametrize("config", mosaic.CANDIDATES)
def test_every_form_that_tuning_tries(config):
    # A function of its own: one that was traced before would not be traced again.
    @functools.partial(jax.jit, static_argnames="scale")
    def scores(**arguments):
        return retrieval_scores(**arguments, implementation="mosaic")

    with interpreted(), tuning.trying(config) as chosen_for:
        check_scores(scores, 7, [17 * 64 + 9], kv_heads=2)
    assert [operation for operation, _ in chosen_for] == ["retrieval_scores"]


def test_scores_of_nobody_are_zero_where_nothing_was_found():
    """A padding row: no keys, no weights, and -inf for the sums, as attention returns it."""
    pages = jnp.zeros((2, 64, 1, 64), jnp.bfloat16)
    with interpreted():
        found = compiled(
            jnp.zeros((1, 4, 64), jnp.bfloat16),
            pages,
            jnp.zeros((1, 2), jnp.int32),
            jnp.zeros(1, jnp.int32),
            jnp.full((1, 4), -jnp.inf),
            jnp.ones((1, 4)),
            implementation="mosaic",
        )
    np.testing.assert_array_equal(found, np.zeros((1, 128)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": jnp.float32}, "float32"),
        ({"head_dim": 24}, "head_dim=24"),
        ({"head_dim": 272}, "head_dim=272"),
        ({"page_size": 24}, "page_size=24"),
        ({"group": 65}, "65 query heads"),
        ({"kv_heads": 64, "head_dim": 128}, "kv_heads=64, group=1 and head_dim=128 exceed 65536 bytes"),
        ({"batch": 0}, "no queries"),
    ],
)
def test_what_the_kernel_cannot_do_is_left_to_another(fields, message):
    shape = {"batch": 1, "kv_heads": 1, "group": 1, "head_dim": 64, "page_size": 64, "dtype": jnp.bfloat16} | fields
    batch, kv_heads, group, head_dim, page_size, dtype = shape.values()
    heads = jnp.zeros((batch, kv_heads * group))
    arguments = {
        "q": jnp.zeros((*heads.shape, head_dim), dtype),
        "k_pages": jnp.zeros((1, page_size, kv_heads, head_dim), dtype),
        "page_table": jnp.zeros((batch, 1), jnp.int32),
        "lengths": jnp.full(batch, page_size, jnp.int32),
        "lse": heads,
        "weights": heads + 1,
    }
    with on_hopper():
        with pytest.raises(NotImplementedError, match=message):
            retrieval_scores(**arguments, implementation="mosaic")
        np.testing.assert_array_equal(
            retrieval_scores(**arguments), np.full((batch, page_size), float(kv_heads * group))
        )


@pytest.mark.parametrize("fields", [{"stages": 0}, {"blocks": 0}])
def test_impossible_forms_are_refused(fields):
    with pytest.raises(ValueError, match="must be at least 1"):
        mosaic.Config(**fields)
