"""Retrieval scores on a CPU beside probabilities written out in float64."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.retrieval_scores import arg_specs, retrieval_scores
from tests.pallas_kernels.paged_battery import SCALE, case, check_scores

LENGTHS = [0, 1, 3, 4, 5, 8, 16, 13]
LAYOUT: dict[str, Any] = {"page_size": 4, "head_dim": 8, "dtype": jnp.float32}
compiled = jax.jit(retrieval_scores, static_argnames=("scale", "implementation"))
in_xla = partial(compiled, implementation="xla")


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("kv_heads", "group"), [(1, 1), (4, 1), (2, 3), (1, 4)])
@pytest.mark.parametrize("scale", [None, SCALE])
def test_agrees_with_plain_probabilities(kv_heads: int, group: int, scale: float | None, fp8: bool) -> None:
    check_scores(in_xla, group, LENGTHS, kv_heads=kv_heads, group=group, scale=scale, fp8=fp8, **LAYOUT)


@pytest.mark.parametrize("looked_at", [0.0, 1.0])
def test_all_heads_or_none_are_looked_at(looked_at: float) -> None:
    check_scores(in_xla, 5, LENGTHS, kv_heads=2, looked_at=looked_at, **LAYOUT)


def test_bfloat16() -> None:
    check_scores(in_xla, 6, [7, 20], kv_heads=2, **LAYOUT | {"dtype": jnp.bfloat16})


def test_after_attention_has_found_the_sums_probabilities_add_up_to_the_weights() -> None:
    c = case(1, LENGTHS, kv_heads=2, **LAYOUT)
    q, lengths = jnp.asarray(c.rng.normal(size=(8, 4, 8)), jnp.float32), jnp.asarray(LENGTHS, jnp.int32)
    weights = jnp.asarray(c.rng.random((8, 4)), jnp.float32)
    _, lse = decode_attention(q, lengths=lengths, return_lse=True, **c.arrays)
    found = compiled(q, c.arrays["k_pages"], c.arrays["page_table"], lengths, lse, weights)
    np.testing.assert_allclose(found.sum(axis=1), weights.sum(axis=1) * (lengths > 0), atol=1e-5)


def test_specs_count_keys_of_the_heads_that_are_looked_at() -> None:
    spec = arg_specs.Spec(heads=(0, 1, 5), batch=2, context=24, q_heads=8, kv_heads=4, head_dim=16, page_size=16)
    arguments = spec.make(jax.random.key(0))
    assert np.flatnonzero(arguments["weights"][1]).tolist() == [0, 1, 5]
    assert retrieval_scores(**arguments, **spec.options).shape == (2, 32)
    # Of key/value heads 0 and 2; scores of two pages.
    assert spec.bytes_moved == 2 * (24 * 2 * 16 * 2 + 32 * 4)
    assert spec.flops == 2 * 2 * 24 * 3 * 16


@pytest.mark.parametrize("fp8", [False, True])
def test_sums_of_specs_are_about_those_of_their_scores(fp8: bool) -> None:
    spec = dataclasses.replace(arg_specs.SPECS["small_batch_8_context_1k"], fp8=fp8)
    found = retrieval_scores(**spec.make(jax.random.key(1)))
    np.testing.assert_allclose(found.sum(axis=1), np.ones(8), atol=0.3)


def test_shapes_that_do_not_fit_are_refused(unchecked_shapes: None) -> None:
    c = case(0, [6, 9], kv_heads=2, **LAYOUT)
    good: dict[str, Any] = {
        "q": jnp.zeros((2, 4, 8)),
        "k_pages": c.arrays["k_pages"],
        "page_table": c.arrays["page_table"],
        "lengths": jnp.zeros(2, jnp.int32),
        "lse": jnp.zeros((2, 4)),
        "weights": jnp.zeros((2, 4)),
    }
    for name, value, message in (
        ("q", jnp.zeros((2, 3, 8)), "q_heads=3 must be a multiple of kv_heads=2"),
        ("lse", jnp.zeros((2, 3)), r"lse must be float32\[2, 4\]"),
        ("weights", jnp.zeros((1, 4)), r"weights must be float32\[2, 4\]"),
        ("lengths", jnp.zeros(3, jnp.int32), r"lengths must be int32\[2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            retrieval_scores(**good | {name: value})
    with pytest.raises(NotImplementedError, match="has no form named 'cudnn'"):
        retrieval_scores(**good, implementation="cudnn")
