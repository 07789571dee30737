"""Retrieval scores on a CPU beside probabilities written out in float64."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.retrieval_scores import retrieval_scores
from tests.pallas_kernels.paged_battery import SCALE, Case, case

LENGTHS = [0, 1, 3, 4, 5, 8, 16, 13]
LAYOUT: dict[str, Any] = {"page_size": 4, "head_dim": 8, "dtype": jnp.float32}
compiled = jax.jit(retrieval_scores, static_argnames=("scale", "implementation"))


def scored(c: Case, q: np.ndarray, weights: np.ndarray, lengths: list[int], scale: float | None) -> np.ndarray:
    """As a decode step has it: after the attention whose sums it takes."""
    ends = jnp.asarray(lengths, jnp.int32)
    _, lse = decode_attention(jnp.asarray(q), lengths=ends, scale=scale, return_lse=True, **c.arrays)
    pages = {name: c.arrays[name] for name in ("k_pages", "page_table", "k_scales") if name in c.arrays}
    return np.asarray(
        compiled(jnp.asarray(q), lengths=ends, lse=lse, weights=jnp.asarray(weights), scale=scale, **pages)
    )


def probabilities(c: Case, q: np.ndarray, weights: np.ndarray, lengths: list[int], scale: float) -> np.ndarray:
    seqs, heads, _ = q.shape
    group = heads // c.keys.shape[2]
    out = np.zeros((seqs, c.keys.shape[1]))
    for seq, length in enumerate(lengths):
        for head in range(heads if length else 0):
            scores = c.keys[seq, :length, head // group] @ q[seq, head].astype(np.float64) * scale
            shares = np.exp(scores - scores.max())
            out[seq, :length] += weights[seq, head] * shares / shares.sum()
    return out


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("kv_heads", "group"), [(1, 1), (4, 1), (2, 3), (1, 4)])
@pytest.mark.parametrize("scale", [None, SCALE])
def test_agrees_with_plain_probabilities(kv_heads: int, group: int, scale: float | None, fp8: bool) -> None:
    c = case(group, LENGTHS, kv_heads=kv_heads, fp8=fp8, **LAYOUT)
    q = c.rng.normal(size=(len(LENGTHS), kv_heads * group, 8)).astype(np.float32)
    weights = np.where(c.rng.random(q.shape[:2]) < 0.5, c.rng.random(q.shape[:2]), 0).astype(np.float32)
    found = scored(c, q, weights, LENGTHS, scale)
    want = probabilities(c, q, weights, LENGTHS, 8**-0.5 if scale is None else scale)
    np.testing.assert_allclose(found, want, atol=2e-6)
    np.testing.assert_allclose(found.sum(axis=1), weights.sum(axis=1) * (np.array(LENGTHS) > 0), atol=1e-5)


def test_heads_without_weight_may_see_anything() -> None:
    c = case(0, [6, 9], kv_heads=2, **LAYOUT)
    q = c.rng.normal(size=(2, 4, 8)).astype(np.float32)
    weights = np.array([[0, 1, 0, 0], [0, 0, 0, 0]], np.float32)
    want = scored(c, q, weights, [6, 9], None)
    q[weights == 0] = np.nan
    np.testing.assert_allclose(scored(c, q, weights, [6, 9], None), want, atol=1e-6)
    assert not want[1].any()


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
    with pytest.raises(NotImplementedError, match="has no form named 'mosaic'"):
        retrieval_scores(**good, implementation="mosaic")
