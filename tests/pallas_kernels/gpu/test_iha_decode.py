"""The Mosaic kernel of Interleaved Head Attention's decode, interpreted, beside the forward pass in float64."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import tuning
from pallas_kernels.decode_attention.plan import TILE
from pallas_kernels.iha_decode import iha_decode, mosaic
from tests.pallas_kernels.gpu.interpreter import interpreted
from tests.pallas_kernels.iha_battery import check_decode

pytestmark = pytest.mark.kernels

compiled = jax.jit(iha_decode, static_argnames=("scale", "implementation"))


def check(*arguments, multiprocessors=1, **options):
    layout = {"head_dim": 16, "page_size": 16, "dtype": jnp.bfloat16, "scale": 0.15} | options
    with interpreted(multiprocessors):
        check_decode(functools.partial(compiled, implementation="mosaic"), *arguments, **layout)


@pytest.mark.parametrize(
    ("mask", "window", "pseudo_heads"),
    [("flat", None, 2), ("flat", 1, 3), ("flat", 66, 2), ("token", None, 3), ("token", 2, 2)],
)
def test_masks_and_windows(mask, pseudo_heads, window):
    check(1, [70, 1, 0, 2, 64], mask=mask, window=window, pseudo_heads=pseudo_heads, group=1)


@pytest.mark.parametrize(
    ("kv_heads", "group", "pseudo_heads"),
    [
        (1, 1, 1),  # one row of 8
        (1, 4, 3),  # 48 rows, of which 36 are real
        (3, 2, 4),  # 96 rows in two blocks, the second not full
        (8, 1, 4),  # 128 rows
    ],
)
def test_heads_and_groups(kv_heads, group, pseudo_heads):
    options = {"kv_heads": kv_heads, "group": group, "pseudo_heads": pseudo_heads}
    check(pseudo_heads, [5, 66], window=3, multiprocessors=2, **options)


@pytest.mark.parametrize("page_size", [8, 64, 128])
def test_pages_of_all_sizes(page_size):
    check(0, [67, 1], page_size=page_size, window=65)


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_head_sizes(head_dim):
    check(head_dim, [66], head_dim=head_dim, group=1, window=2, scale=0.05)


def test_float16():
    check(2, [70], dtype=jnp.float16, rotated=False)


def test_a_table_may_leave_out_the_pages_before_the_window():
    check(9, [90], window=5, left_out=5, spare=0)


@pytest.mark.parametrize("multiprocessors", [1, 4])
def test_a_long_row_is_split_and_more_tiles_than_stages_are_loaded(multiprocessors):
    check(6, [2 * TILE + 5, 10], multiprocessors=multiprocessors)


@pytest.mark.parametrize("config", mosaic.CANDIDATES)
def test_every_form_that_tuning_tries(config):
    # A function of its own: one that was traced before would not be traced again.
    @functools.partial(jax.jit, static_argnames="scale")
    def attention(**arguments):
        return iha_decode(**arguments, implementation="mosaic")

    with interpreted(), tuning.trying(config) as chosen_for:
        options = {"head_dim": 16, "page_size": 16, "dtype": jnp.bfloat16, "scale": 0.15}
        check_decode(attention, 7, [2 * TILE + 9], kv_heads=3, group=1, **options)
    assert [operation for operation, _ in chosen_for] == ["iha_decode"]


@pytest.mark.parametrize(("window", "mask"), [(1, "flat"), (3, "flat"), (3, "token")])
def test_pseudo_pages_where_the_pages_are_too_small_for_the_kernel(window, mask):
    with tuning.trying(None) as chosen_for:
        check(3, [37, 1, 0, 5], page_size=4, window=window, mask=mask, pseudo_heads=2, group=1)
    assert {operation for operation, _ in chosen_for} <= {"decode_attention"}
