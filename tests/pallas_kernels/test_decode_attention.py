"""Decode attention on a CPU beside attention written out in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_attention import decode_attention
from tests.pallas_kernels.paged_battery import case, check_decode

type Attention = Callable[..., Any]
LENGTHS = [0, 1, 3, 4, 5, 8, 16, 13]
PAGES: dict[str, Any] = {"page_size": 4, "head_dim": 8, "dtype": jnp.float32}
compiled = jax.jit(decode_attention, static_argnames=("scale", "window", "return_lse", "implementation"))


@pytest.fixture(params=["xla", "reference"])
def jitted(request: pytest.FixtureRequest) -> Attention:
    return partial(compiled, implementation=request.param)


@pytest.mark.parametrize("separate_values", [False, True])
@pytest.mark.parametrize(("kv_heads", "group"), [(1, 1), (4, 1), (2, 3), (1, 4)])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_agrees_with_plain_attention(
    jitted: Attention, separate_values: bool, kv_heads: int, group: int, scale: float | None
) -> None:
    layout = PAGES | {"kv_heads": kv_heads, "separate_values": separate_values, "spare": 0}
    check_decode(jitted, group, LENGTHS, group=group, scale=scale, **layout)


@pytest.mark.parametrize("separate_values", [False, True])
@pytest.mark.parametrize("window", [1, 3, 4, 6, 13, 100])
def test_a_window_hides_all_keys_before_it_whatever_they_hold(
    jitted: Attention, separate_values: bool, window: int
) -> None:
    layout = PAGES | {"kv_heads": 2, "separate_values": separate_values}
    check_decode(jitted, window, LENGTHS, group=2, window=window, **layout)


def test_a_table_may_leave_out_the_pages_before_the_window(jitted: Attention) -> None:
    check_decode(jitted, 9, [15], kv_heads=2, group=2, window=5, left_out=2, spare=0, **PAGES)


def test_values_lie_in_the_rows_of_the_keys_where_no_other_table_is_given(jitted: Attention) -> None:
    check_decode(jitted, 1, [6, 2], kv_heads=2, group=1, one_table=True, **PAGES)


def test_a_row_does_not_depend_on_what_stands_beside_it(jitted: Attention) -> None:
    c = case(2, [5, 9], kv_heads=2, **PAGES)
    q = c.rng.normal(size=(2, 4, 8)).astype(np.float32)
    both = jitted(jnp.asarray(q), lengths=jnp.asarray([5, 9], jnp.int32), **c.arrays)
    q[1] = np.nan
    one = jitted(jnp.asarray(q), lengths=jnp.asarray([5, 0], jnp.int32), **c.arrays)
    np.testing.assert_array_equal(both[0], one[0])
    assert not np.asarray(one[1]).any()


def test_bfloat16_stays_bfloat16_and_close(jitted: Attention) -> None:
    check_decode(jitted, 3, [7], group=2, **PAGES | {"dtype": jnp.bfloat16})


@pytest.mark.parametrize("options", [{}, {"biased": True}, {"fp8": True}, {"biased": True, "fp8": True, "window": 7}])
def test_bias_scales_and_log_sum_exp_agree_with_float64(jitted: Attention, options: dict[str, Any]) -> None:
    check_decode(jitted, 1, [0, 1, 13, 40], page_size=8, head_dim=16, dtype=jnp.float32, kv_heads=2, group=3, **options)
