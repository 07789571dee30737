"""Prefill attention over pages against plain causal float64 attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Paged, attend, paged
from jaxtyping import TypeCheckError

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.prefill_attention import prefill_attention
from tests.pallas_kernels.paged_battery import check_prefill

PAGE, DIM, WIDTH, CHUNK = 4, 8, 4, 6
STARTS = (0, 0, 3, 4, 8, 0, 9)
COUNTS = (6, 1, 4, 5, 6, 0, 3)
compiled = jax.jit(prefill_attention, static_argnames=("scale", "window", "return_lse", "implementation"))
type Attention = Callable[..., Any]
LENGTHS = tuple(start + count for start, count in zip(STARTS, COUNTS, strict=True))


def queries(heads: int, seqs: int = len(STARTS), chunk: int = CHUNK) -> np.ndarray:
    return np.random.default_rng(heads).standard_normal((seqs, chunk, heads, DIM)).astype(np.float32)


@pytest.fixture(params=["xla", "reference"])
def jitted(request: pytest.FixtureRequest) -> Attention:
    return partial(compiled, implementation=request.param)


@pytest.fixture
def run(jitted: Attention) -> Attention:
    """Calls with a `Paged` case, and returns numpy."""

    def call(q: np.ndarray, case: Paged, starts: Sequence[int], counts: Sequence[int], **more: Any) -> np.ndarray:
        k_pages = jnp.asarray(case.k_pages)
        out = jitted(
            jnp.asarray(q),
            k_pages,
            k_pages if case.v_pages is case.k_pages else jnp.asarray(case.v_pages),
            jnp.asarray(case.k_table),
            jnp.asarray(starts, jnp.int32),
            jnp.asarray(counts, jnp.int32),
            v_page_table=jnp.asarray(case.v_table),
            **more,
        )
        return np.asarray(out)

    return call


@pytest.mark.parametrize("arena", [True, False])
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(1, 1), (4, 4), (6, 2), (4, 1)])
def test_agrees_with_plain_causal_attention_after_a_cached_prefix(
    run: Attention, arena: bool, q_heads: int, kv_heads: int
) -> None:
    case = paged(LENGTHS, page_size=PAGE, kv_heads=kv_heads, head_dim=DIM, width=WIDTH, arena=arena, seed=q_heads)
    q = queries(q_heads)
    for s, count in enumerate(COUNTS):
        q[s, count:] = np.nan  # padded queries may hold anything
    out = run(q, case, STARTS, COUNTS)
    for s, (start, count) in enumerate(zip(STARTS, COUNTS, strict=True)):
        for i in range(count):
            seen = start + i + 1
            want = attend(q[s, i], case.keys[s][:seen], case.values[s][:seen], DIM**-0.5)
            np.testing.assert_allclose(out[s, i], want, atol=2e-6, rtol=1e-5)
        assert not out[s, count:].any(), "padded queries give zero"


@pytest.mark.parametrize("arena", [True, False])
@pytest.mark.parametrize("window", [1, 3, 4, 6, 11, 100])
def test_a_window_hides_all_keys_before_it(run: Attention, arena: bool, window: int) -> None:
    case = paged(LENGTHS, page_size=PAGE, kv_heads=2, head_dim=DIM, width=WIDTH, arena=arena, seed=window)
    q = queries(4)
    for s, start in enumerate(STARTS):
        for position in range(max(0, start - window + 1)):  # no query of the chunk sees these
            case.k_pages[case.k_table[s, position // PAGE], position % PAGE] = np.nan
            case.v_pages[case.v_table[s, position // PAGE], position % PAGE] = np.nan
    out = run(q, case, STARTS, COUNTS, window=window)
    for s, (start, count) in enumerate(zip(STARTS, COUNTS, strict=True)):
        for i in range(count):
            seen = slice(max(0, start + i + 1 - window), start + i + 1)
            want = attend(q[s, i], case.keys[s][seen], case.values[s][seen], DIM**-0.5)
            np.testing.assert_allclose(out[s, i], want, atol=2e-6, rtol=1e-5)
        assert not out[s, count:].any(), "padded queries give zero"


def test_a_table_may_leave_out_the_pages_before_the_window(jitted: Attention) -> None:
    case = paged([15], page_size=PAGE, kv_heads=2, head_dim=DIM, width=WIDTH, arena=True, seed=9)
    q, pages = jnp.asarray(queries(4, 1, 3)), jnp.asarray(case.k_pages)
    k_table, v_table, counts = jnp.asarray(case.k_table), jnp.asarray(case.v_table), jnp.asarray([3], jnp.int32)
    whole = jitted(q, pages, pages, k_table, jnp.asarray([12], jnp.int32), counts, v_page_table=v_table, window=5)
    kept = jitted(
        q, pages, pages, k_table[:, 2:], jnp.asarray([4], jnp.int32), counts, v_page_table=v_table[:, 2:], window=5
    )
    np.testing.assert_allclose(kept, whole, atol=1e-6)


def test_a_window_without_keys_is_refused() -> None:
    pages, table, one = jnp.zeros((1, 4, 1, 8)), jnp.zeros((1, 1), jnp.int32), jnp.ones((1,), jnp.int32)
    with pytest.raises(ValueError, match="window=0 must be at least 1"):
        prefill_attention(jnp.zeros((1, 1, 1, 8)), pages, pages, table, one, one, window=0)


def test_scale_is_used(run: Attention) -> None:
    case = paged([5], page_size=PAGE, kv_heads=1, head_dim=DIM, width=2, arena=True, seed=1)
    q = queries(2, 1, 5)
    out = run(q, case, (0,), (5,), scale=1.9)
    np.testing.assert_allclose(out[0, 4], attend(q[0, 4], case.keys[0], case.values[0], 1.9), atol=2e-6, rtol=1e-5)


def test_chunks_give_what_the_whole_prompt_gives(run: Attention) -> None:
    case = paged([11], page_size=PAGE, kv_heads=2, head_dim=DIM, width=3, arena=True, seed=4)
    q = queries(4, 1, 11)
    whole = run(q, case, (0,), (11,))
    parts = [run(q[:, start:end], case, (start,), (end - start,)) for start, end in ((0, 5), (5, 8), (8, 11))]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-6)


def test_a_chunk_of_one_token_is_a_decode_step(run: Attention) -> None:
    case = paged([10], page_size=PAGE, kv_heads=2, head_dim=DIM, width=3, arena=True, seed=6)
    q, pages = queries(4, 1, 1), jnp.asarray(case.k_pages)
    out = run(q, case, (9,), (1,))
    decoded = jax.jit(decode_attention)(
        jnp.asarray(q[:, 0]),
        pages,
        pages,
        jnp.asarray(case.k_table),
        jnp.asarray([10], jnp.int32),
        v_page_table=jnp.asarray(case.v_table),
    )
    np.testing.assert_allclose(out[:, 0], decoded, atol=1e-6)


@pytest.mark.parametrize(
    ("q", "k", "v", "table", "starts", "counts"),
    [
        ((2, 5, 3, 8), (4, 4, 2, 8), (4, 4, 2, 8), (2, 2), (2,), (2,)),
        ((2, 5, 4, 8), (4, 4, 2, 6), (4, 4, 2, 6), (2, 2), (2,), (2,)),
        ((2, 5, 4, 8), (4, 4, 2, 8), (4, 5, 2, 8), (2, 2), (2,), (2,)),
        ((2, 5, 4, 8), (4, 4, 2, 8), (4, 4, 2, 8), (3, 2), (2,), (2,)),
        ((2, 5, 4, 8), (4, 4, 2, 8), (4, 4, 2, 8), (2, 2), (1,), (2,)),
        ((2, 5, 4, 8), (4, 4, 2, 8), (4, 4, 2, 8), (2, 2), (2,), (1,)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    q: tuple[int, ...],
    k: tuple[int, ...],
    v: tuple[int, ...],
    table: tuple[int, ...],
    starts: tuple[int, ...],
    counts: tuple[int, ...],
) -> None:
    with pytest.raises((ValueError, TypeCheckError)):
        prefill_attention(
            jnp.zeros(q),
            jnp.zeros(k),
            jnp.zeros(v),
            jnp.zeros(table, jnp.int32),
            jnp.zeros(starts, jnp.int32),
            jnp.ones(counts, jnp.int32),
        )


@pytest.mark.parametrize("options", [{}, {"biased": True}, {"fp8": True}, {"biased": True, "fp8": True, "window": 7}])
def test_bias_scales_and_log_sum_exp_agree_with_float64(jitted: Attention, options: dict[str, Any]) -> None:
    check_prefill(
        jitted,
        1,
        [0, 5, 20, 3],
        [9, 0, 12, 1],
        chunk=12,
        page_size=8,
        head_dim=16,
        dtype=jnp.float32,
        kv_heads=2,
        **options,
    )
