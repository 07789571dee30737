"""Decode attention over pages against plain float64 attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import attend, paged
from jaxtyping import TypeCheckError

from pallas_kernels.decode_attention import decode_attention
from tests.pallas_kernels.paged_battery import check_decode

PAGE, DIM, WIDTH = 4, 8, 4
compiled = jax.jit(decode_attention, static_argnames=("scale", "window", "return_lse", "implementation"))
type Attention = Callable[..., jax.Array]
LENGTHS = (0, 1, 3, 4, 5, 8, 16, 13)


def queries(batch: int, heads: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, heads, DIM)).astype(np.float32)


@pytest.fixture(params=["xla", "reference"])
def jitted(request: pytest.FixtureRequest) -> Attention:
    return partial(compiled, implementation=request.param)


@pytest.mark.parametrize("arena", [True, False])
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(1, 1), (4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_agrees_with_plain_attention(
    jitted: Attention, arena: bool, q_heads: int, kv_heads: int, scale: float | None
) -> None:
    case = paged(LENGTHS, page_size=PAGE, kv_heads=kv_heads, head_dim=DIM, width=WIDTH, arena=arena, seed=q_heads)
    q = queries(len(LENGTHS), q_heads)
    k_pages = jnp.asarray(case.k_pages)
    out = jitted(
        jnp.asarray(q),
        k_pages,
        k_pages if arena else jnp.asarray(case.v_pages),
        jnp.asarray(case.k_table),
        jnp.asarray(LENGTHS, jnp.int32),
        v_page_table=jnp.asarray(case.v_table),
        scale=scale,
    )
    assert not np.asarray(out[0]).any(), "a row of length 0 is zero"
    for s, length in enumerate(LENGTHS):
        if length:
            want = attend(q[s], case.keys[s], case.values[s], DIM**-0.5 if scale is None else scale)
            np.testing.assert_allclose(out[s], want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("arena", [True, False])
@pytest.mark.parametrize("window", [1, 3, 4, 6, 13, 100])
def test_a_window_hides_all_keys_before_it_whatever_they_hold(jitted: Attention, arena: bool, window: int) -> None:
    case = paged(LENGTHS, page_size=PAGE, kv_heads=2, head_dim=DIM, width=WIDTH, arena=arena, seed=window)
    q = queries(len(LENGTHS), 4)
    for s, length in enumerate(LENGTHS):
        for position in range(max(0, length - window)):
            case.k_pages[case.k_table[s, position // PAGE], position % PAGE] = np.nan
            case.v_pages[case.v_table[s, position // PAGE], position % PAGE] = np.nan
    out = jitted(
        jnp.asarray(q),
        jnp.asarray(case.k_pages),
        jnp.asarray(case.v_pages),
        jnp.asarray(case.k_table),
        jnp.asarray(LENGTHS, jnp.int32),
        v_page_table=jnp.asarray(case.v_table),
        window=window,
    )
    assert not np.asarray(out[0]).any(), "a row of length 0 is zero"
    for s, length in enumerate(LENGTHS):
        if length:
            first = max(0, length - window)
            want = attend(q[s], case.keys[s][first:], case.values[s][first:], DIM**-0.5)
            np.testing.assert_allclose(out[s], want, atol=2e-6, rtol=1e-5)


def test_a_table_may_leave_out_the_pages_before_the_window(jitted: Attention) -> None:
    case = paged([15], page_size=PAGE, kv_heads=2, head_dim=DIM, width=WIDTH, arena=True, seed=9)
    q, pages = jnp.asarray(queries(1, 4)), jnp.asarray(case.k_pages)
    k_table, v_table = jnp.asarray(case.k_table), jnp.asarray(case.v_table)
    whole = jitted(q, pages, pages, k_table, jnp.asarray([15], jnp.int32), v_page_table=v_table, window=5)
    kept = jitted(q, pages, pages, k_table[:, 2:], jnp.asarray([7], jnp.int32), v_page_table=v_table[:, 2:], window=5)
    np.testing.assert_allclose(kept, whole, atol=1e-6)


def test_a_window_without_keys_is_refused() -> None:
    pages, table = jnp.zeros((1, 4, 1, 8)), jnp.zeros((1, 1), jnp.int32)
    with pytest.raises(ValueError, match="window=0 must be at least 1"):
        decode_attention(jnp.zeros((1, 1, 8)), pages, pages, table, jnp.ones((1,), jnp.int32), window=0)


def test_values_lie_in_the_rows_of_the_keys_where_no_other_table_is_given(jitted: Attention) -> None:
    case = paged([6, 2], page_size=PAGE, kv_heads=2, head_dim=DIM, width=2, arena=False, seed=1)
    values = np.random.default_rng(5).standard_normal(case.k_pages.shape).astype(np.float32)
    arguments = [jnp.asarray(x) for x in (queries(2, 2), case.k_pages, values, case.k_table)]
    lengths = jnp.asarray([6, 2], jnp.int32)
    one = jitted(*arguments, lengths)
    two = jitted(*arguments, lengths, v_page_table=arguments[3])
    np.testing.assert_array_equal(one, two)
    assert np.isfinite(one).all()


def test_a_row_does_not_depend_on_what_stands_beside_it(jitted: Attention) -> None:
    case = paged([5, 9], page_size=PAGE, kv_heads=2, head_dim=DIM, width=3, arena=True, seed=2)
    pages, q = jnp.asarray(case.k_pages), queries(2, 4)
    k_table, v_table = jnp.asarray(case.k_table), jnp.asarray(case.v_table)
    both = jitted(jnp.asarray(q), pages, pages, k_table, jnp.asarray([5, 9], jnp.int32), v_page_table=v_table)
    q[1] = np.nan
    one = jitted(jnp.asarray(q), pages, pages, k_table, jnp.asarray([5, 0], jnp.int32), v_page_table=v_table)
    np.testing.assert_array_equal(both[0], one[0])
    assert not np.asarray(one[1]).any()


def test_bfloat16_stays_bfloat16_and_close(jitted: Attention) -> None:
    case = paged([7], page_size=PAGE, kv_heads=1, head_dim=DIM, width=2, arena=True, seed=3)
    pages, q = jnp.asarray(case.k_pages, jnp.bfloat16), jnp.asarray(queries(1, 2), jnp.bfloat16)
    lengths = jnp.asarray([7], jnp.int32)
    out = jitted(q, pages, pages, jnp.asarray(case.k_table), lengths, v_page_table=jnp.asarray(case.v_table))
    assert out.dtype == jnp.bfloat16
    want = attend(np.asarray(q[0], np.float32), case.keys[0], case.values[0], DIM**-0.5)
    np.testing.assert_allclose(np.asarray(out[0], np.float32), want, atol=0.05)


@pytest.mark.parametrize(
    ("q", "k", "v", "table", "lengths"),
    [
        ((2, 3, 8), (4, 4, 2, 8), (4, 4, 2, 8), (2, 2), (2,)),  # 3 heads over 2
        ((2, 4, 8), (4, 4, 2, 6), (4, 4, 2, 6), (2, 2), (2,)),  # head_dim
        ((2, 4, 8), (4, 4, 2, 8), (4, 5, 2, 8), (2, 2), (2,)),  # page size of the values
        ((2, 4, 8), (4, 4, 2, 8), (4, 4, 2, 8), (3, 2), (2,)),  # rows of the table
        ((2, 4, 8), (4, 4, 2, 8), (4, 4, 2, 8), (2, 2), (3,)),  # rows of the lengths
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], table: tuple[int, ...], lengths: tuple[int, ...]
) -> None:
    # With run-time shape checks on, as in these tests, those speak first.
    with pytest.raises((ValueError, TypeCheckError)):
        decode_attention(
            jnp.zeros(q), jnp.zeros(k), jnp.zeros(v), jnp.zeros(table, jnp.int32), jnp.ones(lengths, jnp.int32)
        )


def test_an_unknown_implementation_is_refused() -> None:
    pages, table = jnp.zeros((1, 4, 1, 8)), jnp.zeros((1, 1), jnp.int32)
    with pytest.raises(ValueError, match="decode_attention: implementation='fast'"):
        decode_attention(jnp.zeros((1, 1, 8)), pages, pages, table, jnp.ones((1,), jnp.int32), implementation="fast")


@pytest.mark.parametrize("options", [{}, {"biased": True}, {"fp8": True}, {"biased": True, "fp8": True, "window": 7}])
def test_bias_scales_and_log_sum_exp_agree_with_float64(jitted: Attention, options: dict[str, Any]) -> None:
    check_decode(jitted, 1, [0, 1, 13, 40], page_size=8, head_dim=16, dtype=jnp.float32, kv_heads=2, group=3, **options)
