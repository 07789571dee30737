"""Prefill attention on a CPU beside causal attention written out in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.prefill_attention import prefill_attention
from tests.pallas_kernels.paged_battery import case, check_prefill

type Attention = Callable[..., Any]
STARTS, COUNTS = [0, 0, 3, 4, 8, 0, 9], [6, 1, 4, 5, 6, 0, 3]
PAGES: dict[str, Any] = {"page_size": 4, "head_dim": 8, "dtype": jnp.float32}
compiled = jax.jit(prefill_attention, static_argnames=("scale", "window", "return_lse", "implementation"))


@pytest.fixture(params=["xla", "reference"])
def jitted(request: pytest.FixtureRequest) -> Attention:
    return partial(compiled, implementation=request.param)


@pytest.mark.parametrize("separate_values", [False, True])
@pytest.mark.parametrize(("kv_heads", "group"), [(1, 1), (4, 1), (2, 3), (1, 4)])
def test_agrees_with_plain_causal_attention_after_a_cached_prefix(
    jitted: Attention, separate_values: bool, kv_heads: int, group: int
) -> None:
    layout = PAGES | {"kv_heads": kv_heads, "separate_values": separate_values, "spare": 0}
    check_prefill(jitted, group, STARTS, COUNTS, chunk=6, group=group, scale=None, **layout)


@pytest.mark.parametrize("separate_values", [False, True])
@pytest.mark.parametrize("window", [1, 3, 4, 6, 11, 100])
def test_a_window_hides_all_keys_before_it(jitted: Attention, separate_values: bool, window: int) -> None:
    layout = PAGES | {"kv_heads": 2, "separate_values": separate_values}
    check_prefill(jitted, window, STARTS, COUNTS, chunk=6, window=window, **layout)


def test_a_table_may_leave_out_the_pages_before_the_window(jitted: Attention) -> None:
    check_prefill(jitted, 9, [12], [3], chunk=3, kv_heads=2, window=5, left_out=2, spare=0, **PAGES)


def test_values_lie_in_the_rows_of_the_keys_where_no_other_table_is_given(jitted: Attention) -> None:
    check_prefill(jitted, 1, [2, 0], [4, 2], chunk=4, kv_heads=2, one_table=True, **PAGES)


def test_scale_is_used(jitted: Attention) -> None:
    check_prefill(jitted, 1, [0], [5], chunk=5, scale=1.9, **PAGES)


def test_bfloat16_stays_bfloat16_and_close(jitted: Attention) -> None:
    check_prefill(jitted, 3, [2], [5], chunk=6, **PAGES | {"dtype": jnp.bfloat16})


@pytest.mark.parametrize("options", [{}, {"biased": True}, {"fp8": True}, {"biased": True, "fp8": True, "window": 7}])
def test_bias_scales_and_log_sum_exp_agree_with_float64(jitted: Attention, options: dict[str, Any]) -> None:
    layout = {"page_size": 8, "head_dim": 16, "dtype": jnp.float32, "kv_heads": 2}
    check_prefill(jitted, 1, [0, 5, 20, 3], [9, 0, 12, 1], chunk=12, **layout, **options)


def test_chunks_give_what_the_whole_prompt_gives(jitted: Attention) -> None:
    c = case(4, [11], kv_heads=2, **PAGES)
    q = jnp.asarray(c.rng.normal(size=(1, 11, 4, 8)), jnp.float32)

    def run(start: int, end: int) -> np.ndarray:
        numbers = {"starts": jnp.asarray([start], jnp.int32), "counts": jnp.asarray([end - start], jnp.int32)}
        return np.asarray(jitted(q[:, start:end], **numbers, **c.arrays))

    parts = [run(0, 5), run(5, 8), run(8, 11)]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), run(0, 11), atol=1e-6)


def test_a_chunk_of_one_token_is_a_decode_step(jitted: Attention) -> None:
    c = case(6, [10], kv_heads=2, **PAGES)
    q = jnp.asarray(c.rng.normal(size=(1, 1, 4, 8)), jnp.float32)
    numbers = jnp.asarray([[9], [1], [10]], jnp.int32)
    out = jitted(q, starts=numbers[0], counts=numbers[1], **c.arrays)
    decoded = jax.jit(decode_attention)(q[:, 0], lengths=numbers[2], **c.arrays)
    np.testing.assert_allclose(out[:, 0], decoded, atol=1e-6)
