"""The Mosaic kernel of prefill attention, interpreted, beside attention written out in float64."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.paged import Pages
from pallas_kernels.prefill_attention import mosaic, prefill_attention
from tests.pallas_kernels.gpu.interpreter import ON_GPU, interpreted
from tests.pallas_kernels.paged_battery import check_prefill

pytestmark = pytest.mark.kernels


@functools.partial(jax.jit, static_argnames=("scale", "window", "return_lse", "config"))
def attention(q, k_pages, v_pages, page_table, starts, counts, *, v_page_table, return_lse, **others):
    keys, values = Pages(k_pages, page_table), Pages(v_pages, v_page_table)
    return mosaic.prefill_attention(q, keys, values, starts, counts, **others)


def check(*arguments, turns=True, stages=2, **options):
    for registers in (True, False) if ON_GPU else (False,):
        config = mosaic.Config(stages=stages, registers=registers, turns=turns)
        with interpreted():
            check_prefill(functools.partial(attention, config=config), *arguments, **options)


@pytest.mark.parametrize("page_size", [16, 32, 64, 128, 256])
def test_pages_of_all_sizes(page_size):
    check(0, [70], [100], page_size=page_size)


@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), [(2, 2, 32), (1, 4, 128), (1, 1, 80)])
def test_heads_groups_and_head_sizes(kv_heads, group, head_dim):
    check(1, [3], [128], kv_heads=kv_heads, group=group, head_dim=head_dim)


@pytest.mark.parametrize(("starts", "counts"), [([0, 5], [1, 0]), ([127, 0], [2, 128]), ([256], [64])])
def test_ragged_chunks_behind_cached_prefixes(starts, counts):
    check(2, starts, counts)


def test_a_chunk_of_several_blocks():
    check(3, [40, 0], [200, 130], chunk=200, group=1)


def test_more_tiles_than_stages():
    check(4, [500], [40], stages=2)
    check(4, [500], [40], stages=3, turns=False)


@pytest.mark.parametrize("window", [1, 64, 130])
def test_windows(window):
    check(5, [300], [120], window=window)


def test_a_bias_of_some_keys():
    check(6, [150], [90], biased=True)


def test_float16():
    check(7, [0], [77], dtype=jnp.float16)


def test_what_the_kernel_cannot_do_is_said():
    pages = jnp.zeros((2, 64, 1, 64), jnp.bfloat16)
    numbers = jnp.zeros(1, jnp.int32)
    table = jnp.zeros((1, 1), jnp.int32)

    def run(q, pages=pages):
        with interpreted():
            prefill_attention(q, pages, pages, table, numbers, numbers, implementation="mosaic")

    with pytest.raises(NotImplementedError, match="float32"):
        run(jnp.zeros((1, 8, 1, 64), jnp.float32))
    with pytest.raises(NotImplementedError, match="head_dim=24"):
        run(jnp.zeros((1, 8, 1, 24), jnp.bfloat16), pages[..., :24])
    with pytest.raises(NotImplementedError, match="page_size=24"):
        run(jnp.zeros((1, 8, 1, 64), jnp.bfloat16), pages[:, :24])
