"""Interleaved Head Attention of chunks on a CPU beside the paper's forward pass written out in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.iha_decode import iha_decode
from pallas_kernels.iha_prefill import arg_specs, iha_prefill, virtual
from pallas_kernels.paged import Pages
from pallas_kernels.prefill_attention import prefill_attention
from pallas_kernels.prefill_attention import xla as xla_attention
from pallas_kernels.pseudo_heads import PseudoHeads
from tests.pallas_kernels.iha_battery import check_prefill, mixing
from tests.pallas_kernels.paged_battery import case

type Attention = Callable[..., Any]
STARTS, COUNTS = [0, 0, 3, 4, 8, 0, 7], [5, 1, 4, 5, 3, 0, 3]
LAYOUT: dict[str, Any] = {"page_size": 4}
compiled = jax.jit(iha_prefill, static_argnames=("scale", "implementation"))


@pytest.fixture(params=["xla", "reference"])
def jitted(request: pytest.FixtureRequest) -> Attention:
    return partial(compiled, implementation=request.param)


@pytest.mark.parametrize("pseudo_heads", [1, 2, 3, 4])
@pytest.mark.parametrize("window", [None, 1, 2, 3, 7])
@pytest.mark.parametrize("mask", ["flat", "token"])
def test_agrees_with_the_forward_pass_after_a_cached_prefix(
    jitted: Attention, mask: str, window: int | None, pseudo_heads: int
) -> None:
    options = {"mask": mask, "window": window, "pseudo_heads": pseudo_heads} | LAYOUT
    check_prefill(jitted, pseudo_heads, STARTS, COUNTS, chunk=5, group=1, **options)


@pytest.mark.parametrize(("kv_heads", "group"), [(1, 1), (1, 4), (4, 1), (2, 3)])
def test_heads_and_groups(jitted: Attention, kv_heads: int, group: int) -> None:
    check_prefill(jitted, group, STARTS, COUNTS, chunk=5, kv_heads=kv_heads, group=group, **LAYOUT)


@pytest.mark.parametrize("mask", ["flat", "token"])
def test_without_rotations(jitted: Attention, mask: str) -> None:
    check_prefill(jitted, 1, STARTS, COUNTS, chunk=5, mask=mask, rotated=False, window=3, **LAYOUT)


@pytest.mark.parametrize(("mask", "left_out"), [("flat", 1), ("token", 2)])
def test_a_table_may_leave_out_the_pages_before_the_window(jitted: Attention, mask: str, left_out: int) -> None:
    # The first token stands at position 12 and sees back to position 8, or 7 where pseudo keys are in order.
    check_prefill(jitted, 9, [12], [3], chunk=3, mask=mask, window=5, left_out=left_out, spare=0, **LAYOUT)


@pytest.mark.parametrize(
    "options", [{"separate_values": True}, {"one_table": True}, {"spare": 0}, {"scale": None}, {"scale": 1.9}]
)
def test_where_values_are_and_how_scores_are_scaled(jitted: Attention, options: dict[str, Any]) -> None:
    check_prefill(jitted, 2, STARTS, COUNTS, chunk=5, **LAYOUT, **options)


def test_bfloat16_stays_bfloat16_and_close(jitted: Attention) -> None:
    check_prefill(jitted, 3, [2], [4], chunk=5, dtype=jnp.bfloat16, **LAYOUT)


@pytest.mark.parametrize("mask", ["flat", "token"])
@pytest.mark.parametrize("window", [None, 2])
def test_float64_is_computed_in_float64(jitted: Attention, mask: str, window: int | None) -> None:
    with jax.enable_x64(True):
        options = {"mask": mask, "window": window, "pseudo_heads": 3, "dtype": jnp.float64} | LAYOUT
        check_prefill(jitted, 4, STARTS, COUNTS, chunk=5, **options)


@pytest.mark.parametrize("mask", ["flat", "token"])
@pytest.mark.parametrize("window", [None, 3])
def test_one_pseudo_head_of_its_own_head_is_prefill_attention(jitted: Attention, mask: Any, window: int | None) -> None:
    c = case(5, np.add(STARTS, COUNTS), kv_heads=2, head_dim=8, page_size=4, dtype=jnp.float32)
    q = jnp.asarray(c.rng.normal(size=(len(STARTS), 5, 6, 8)), jnp.float32)
    numbers = {"starts": jnp.asarray(STARTS, jnp.int32), "counts": jnp.asarray(COUNTS, jnp.int32)}
    alpha = jnp.repeat(jnp.eye(2), 3, axis=1)[:, :, None]
    pseudo = PseudoHeads(alpha, alpha, jnp.ones((1, 4)), jnp.zeros((1, 4)), mask=mask, window=window)
    out = jitted(q=q[:, :, :, None], pseudo=pseudo, **numbers, **c.arrays)
    expected = prefill_attention(q, window=window, implementation="reference", **numbers, **c.arrays)
    np.testing.assert_allclose(out[:, :, :, 0], expected, atol=1e-6)


@pytest.mark.parametrize("mask", ["flat", "token"])
def test_chunks_and_steps_give_what_the_whole_prompt_gives(jitted: Attention, mask: str) -> None:
    c = case(4, [11], kv_heads=2, head_dim=8, page_size=4, dtype=jnp.float32)
    q = jnp.asarray(c.rng.normal(size=(1, 11, 4, 3, 8)), jnp.float32)
    pseudo = mixing(6, 2, 4, 3, 8, mask=mask, window=4).pseudo(jnp.float32)

    def run(start: int, end: int) -> np.ndarray[Any, Any]:
        numbers = {"starts": jnp.asarray([start], jnp.int32), "counts": jnp.asarray([end - start], jnp.int32)}
        return np.asarray(jitted(q=q[:, start:end], pseudo=pseudo, **numbers, **c.arrays))

    last = iha_decode(q[:, 10], lengths=jnp.asarray([11], jnp.int32), pseudo=pseudo, **c.arrays)
    parts = [run(0, 5), run(5, 8), run(8, 10), np.asarray(last)[:, None]]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), run(0, 11), atol=1e-6)


def test_a_sequence_is_the_same_whatever_stands_beside_it(jitted: Attention) -> None:
    c = case(8, [16, 16, 16], kv_heads=2, head_dim=8, page_size=4, dtype=jnp.float32)
    q = np.random.default_rng(1).normal(size=(3, 5, 4, 2, 8))
    pseudo = mixing(6, 2, 4, 2, 8, window=3).pseudo(jnp.float32)
    found = []
    for starts, counts in (([7, 0, 0], [3, 1, 2]), ([7, 0, 9], [3, 0, 0]), ([7, 11, 5], [3, 5, 5])):
        q[1:] = c.rng.normal(size=q[1:].shape)
        numbers = {"starts": jnp.asarray(starts, jnp.int32), "counts": jnp.asarray(counts, jnp.int32)}
        found.append(np.asarray(jitted(q=jnp.asarray(q, jnp.float32), pseudo=pseudo, **numbers, **c.arrays))[0])
    assert (found[0] == found[1]).all()
    assert (found[0] == found[2]).all()


def test_numbers_that_fit_no_table_are_brought_into_bounds(jitted: Attention) -> None:
    c = case(5, [8], kv_heads=2, head_dim=8, page_size=4, spare=0, dtype=jnp.float32)
    q = jnp.asarray(c.rng.normal(size=(1, 5, 4, 2, 8)), jnp.float32)
    pseudo = mixing(6, 2, 4, 2, 8).pseudo(jnp.float32)
    beyond, within = (
        jitted(q=q, starts=jnp.asarray([6], jnp.int32), counts=jnp.asarray([n], jnp.int32), pseudo=pseudo, **c.arrays)
        for n in (5, 2)
    )
    assert (beyond == within).all()
    assert not np.asarray(beyond)[:, 2:].any()


@partial(jax.jit, static_argnames="scale")
def by_virtual_sequences(
    q: Any, k_pages: Any, v_pages: Any, page_table: Any, v_page_table: Any, starts: Any, counts: Any, **others: Any
) -> Any:
    """The form of GPUs, whose kernel XLA stands in for."""
    keys, values = Pages(k_pages, page_table), Pages(v_pages, v_page_table)
    return virtual.iha_prefill(xla_attention.prefill_attention, q, keys, values, starts, counts, **others)


@pytest.mark.parametrize(("window", "pseudo_heads"), [(None, 2), (None, 3), (1, 2), (2, 3), (3, 4), (100, 2), (3, 1)])
@pytest.mark.parametrize("mask", ["flat", "token"])
def test_a_virtual_sequence_gives_the_same(mask: str, window: int | None, pseudo_heads: int) -> None:
    options = {"mask": mask, "window": window, "pseudo_heads": pseudo_heads} | LAYOUT
    check_prefill(by_virtual_sequences, pseudo_heads, STARTS, COUNTS, chunk=5, group=1, **options)


@pytest.mark.parametrize("mask", ["flat", "token"])
def test_a_virtual_sequence_of_some_heads_at_a_time(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virtual, "group_sizes", lambda *_: (1, 2))
    jax.clear_caches()  # of programs that were traced with other groups
    check_prefill(by_virtual_sequences, 5, STARTS, COUNTS, chunk=5, group=2, mask=mask, window=3, **LAYOUT)
    jax.clear_caches()


def test_a_virtual_sequence_keeps_tables_that_leave_pages_out() -> None:
    check_prefill(by_virtual_sequences, 9, [12], [3], chunk=3, window=5, left_out=1, spare=0, **LAYOUT)


def test_groups_are_the_most_that_fit() -> None:
    # A key of 8 numbers of 2 bytes: 64 bytes of each raw or pseudo head.
    assert virtual.group_sizes(6, 4, 8, 2, 2, 2, limit=6 * (2 + 8) * 64) == (6, 4)
    assert virtual.group_sizes(6, 4, 8, 2, 2, 2, limit=6 * (2 + 8) * 64 - 1) == (6, 2)
    assert virtual.group_sizes(6, 4, 8, 2, 2, 2, limit=6 * (2 + 2) * 64) == (6, 1)
    assert virtual.group_sizes(6, 4, 8, 2, 2, 2, limit=5 * (2 + 2) * 64) == (3, 2)
    assert virtual.group_sizes(6, 4, 8, 2, 2, 2, limit=3) == (1, 1)


def test_no_large_window_overflows() -> None:
    assert virtual.window_of(2**31 - 1, 4, 4000) is None
    assert virtual.window_of(999, 4, 4000) == 3996


FITTING: dict[str, Any] = {
    "q": jnp.zeros((2, 5, 4, 3, 8)),
    "k_pages": jnp.zeros((4, 4, 2, 8)),
    "v_pages": jnp.zeros((4, 4, 2, 8)),
    "page_table": jnp.zeros((2, 2), jnp.int32),
    "starts": jnp.ones(2, jnp.int32),
    "counts": jnp.ones(2, jnp.int32),
    "pseudo": mixing(0, 2, 4, 3, 8).pseudo(jnp.float32),
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": jnp.zeros((2, 5, 4, 8))}, r"q must be floating\[seqs, chunk, q_heads, pseudo, head_dim\]"),
        ({"q": jnp.zeros((2, 5, 4, 2, 8))}, r"q must be floating\[seqs, chunk, q_heads, 3, head_dim\]"),
        ({"q": jnp.zeros((2, 5, 6, 3, 8))}, r"alpha_k must be floating\[2, 6, pseudo\]: float32\[2, 4, 3\]"),
        ({"starts": jnp.ones(3, jnp.int32)}, r"starts must be int32\[2\]: int32\[3\]"),
        ({"counts": jnp.ones(2)}, r"counts must be int32\[2\]: float32\[2\]"),
        ({"pseudo": None}, "pseudo must be a PseudoHeads, not a NoneType"),
        ({"scale": True}, "scale=True must be a finite number"),
        ({"implementation": "fast"}, "iha_prefill: implementation='fast' is none of"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_wrong_arguments_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        iha_prefill(**FITTING | changed)


@pytest.mark.parametrize("implementation", ["auto", "reference"])
@pytest.mark.parametrize("axis", [0, 1])
def test_no_queries_give_an_empty_result(axis: int, implementation: str) -> None:
    empty: dict[str, Any] = {"q": FITTING["q"][:, :0]}
    if axis == 0:
        empty = {name: FITTING[name][:0] for name in ("q", "page_table", "starts", "counts")}
    assert iha_prefill(**FITTING | empty, implementation=implementation).shape == empty["q"].shape


def test_only_gpus_make_pseudo_pages_first() -> None:
    for implementation in ("mosaic", "cudnn"):
        with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU"):
            iha_prefill(**FITTING, implementation=implementation)


def test_specs_are_what_they_count() -> None:
    spec = arg_specs.Spec(
        seqs=2, chunk=3, prefix=2, q_heads=4, kv_heads=2, head_dim=8, pseudo_heads=3, page_size=8, window=4
    )
    arguments = spec.make(jax.random.key(0))
    assert compiled(**arguments).shape == arguments["q"].shape
    assert spec.bytes_moved == 2 * (2 * 5 * 2 + 2 * 3 * 4 * 3) * 8 * 2
    seen = 3 + 4 + 4
    assert spec.flops == 2 * 4 * 3 * (seen * 3 * (2 * 8) * 2 + 5 * 2 * (2 * 8) * 2)
