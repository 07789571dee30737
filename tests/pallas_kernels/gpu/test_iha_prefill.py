"""Interleaved Head Attention of chunks by the Mosaic kernel of prefill attention, interpreted, beside float64."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import tuning
from pallas_kernels.iha_prefill import iha_prefill
from pallas_kernels.prefill_attention.mosaic import Config
from tests.pallas_kernels.gpu.interpreter import ON_GPU, interpreted
from tests.pallas_kernels.iha_battery import check_prefill

pytestmark = pytest.mark.kernels


def check(*arguments, **options):
    # A function of its own: one that was traced in another form would not be traced again.
    @functools.partial(jax.jit, static_argnames="scale")
    def attention(**arrays):
        return iha_prefill(**arrays, implementation="mosaic")

    layout = {"head_dim": 16, "page_size": 16, "dtype": jnp.bfloat16, "scale": 0.15, "group": 1} | options
    # The interpreter can't multiply from registers.
    with interpreted(), tuning.trying(None if ON_GPU else Config(registers=False)):
        check_prefill(attention, *arguments, **layout)


@pytest.mark.parametrize(("mask", "window", "pseudo_heads"), [("flat", None, 2), ("flat", 3, 3), ("token", 5, 2)])
def test_masks_and_windows(mask, window, pseudo_heads):
    check(1, [0, 40, 3], [20, 3, 0], chunk=20, mask=mask, window=window, pseudo_heads=pseudo_heads)


@pytest.mark.parametrize("page_size", [4, 64])
def test_pages_of_any_size(page_size):
    check(2, [9], [6], chunk=7, page_size=page_size)


def test_a_table_may_leave_out_the_pages_before_the_window():
    check(9, [90], [3], chunk=3, window=5, left_out=5, spare=0)
