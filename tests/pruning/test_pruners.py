"""Pruners against references written from their papers, in NumPy and float64."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdual.pruning import scores
from jaxdual.pruning.moments import Moments
from jaxdual.pruning.pattern import Pattern
from jaxdual.pruning.sparsegpt import sparsegpt

PATTERNS = ["0.5", "0.3", "2:4", "4:8", "1:4"]
BLOCKS = ["0.5@4", "0.25@2", "0.75@8"]


def inputs_of(tokens: int, inputs: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(tokens, inputs)) @ rng.normal(size=(inputs, inputs)) * rng.lognormal(size=inputs)).astype(
        np.float32
    )


def moments_of(x: np.ndarray, *, whole: bool = True) -> Moments:
    first, second = np.split(x, [len(x) // 3])
    return Moments.none(x.shape[1], whole=whole).with_tokens(jnp.asarray(first)).with_tokens(jnp.asarray(second))


@pytest.mark.parametrize(
    "text",
    [
        "0",
        "1",
        "1.5",
        "-0.5",
        "nan",
        "4:4",
        "0:4",
        "5:4",
        "2:",
        ":4",
        "half",
        "2:4:8",
        "",
        "0.5@",
        "@64",
        "0.5@0",
        "2:4@8",
        "1@64",
    ],
)
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be a share between 0 and 1, or N:M"):
        Pattern.parse(text)


@given(
    text=st.sampled_from(PATTERNS),
    scope=st.sampled_from(["row", "matrix"]),
    outputs=st.integers(1, 5),
    groups=st.integers(1, 4),
    seed=st.integers(0, 100),
)
@settings(max_examples=60, deadline=None)
def test_exactly_as_many_weights_go_as_the_pattern_says(
    text: str, scope: str, outputs: int, groups: int, seed: int
) -> None:
    pattern = Pattern.parse(text)
    assert str(pattern) == text
    # Many equal scores.
    score = np.random.default_rng(seed).integers(0, 3, (outputs, groups * 8)).astype(np.float32)
    kept = np.asarray(pattern.kept(jnp.asarray(score), scope))
    assert (~kept).sum() == pattern.removed(outputs, groups * 8, scope)  # type: ignore[arg-type]
    if pattern.share is None:
        units = zip(score.reshape(-1, pattern.of), kept.reshape(-1, pattern.of), strict=True)
        assert (kept.reshape(-1, pattern.of).sum(1) == pattern.keep).all()
    elif scope == "row":
        units = zip(score, kept, strict=True)
    else:
        units = zip([score], [kept], strict=True)
    for values, stays in units:
        assert not stays.any() or stays.all() or values[stays].min() >= values[~stays].max()


@given(outputs=st.integers(1, 3), inputs=st.integers(1, 5), seed=st.integers(0, 100), text=st.sampled_from(BLOCKS))
@settings(max_examples=20, deadline=None)
def test_whole_blocks_go_and_as_many_of_all_outputs(outputs: int, inputs: int, seed: int, text: str) -> None:
    pattern = Pattern.parse(text)
    assert str(pattern) == text
    size = pattern.block
    score = np.random.default_rng(seed).normal(size=(outputs * size, inputs * size)).astype(np.float32)
    kept = np.asarray(pattern.kept(jnp.asarray(score), "matrix"))
    assert (~kept).sum() == pattern.removed(*score.shape, "row")
    blocks = kept.reshape(outputs, size, inputs, size)
    assert (blocks.all(axis=(1, 3)) == blocks.any(axis=(1, 3))).all()
    energy = (score.astype(np.float64) ** 2).reshape(blocks.shape).sum(axis=(1, 3))
    for stays, of_outputs in zip(blocks.any(axis=(1, 3)), energy, strict=True):
        assert (~stays).sum() == int(inputs * float(pattern.share or 0))
        assert stays.all() or of_outputs[stays].min() >= of_outputs[~stays].max() * (1 - 1e-6)


def test_blocks_need_sizes_that_they_divide() -> None:
    pattern = Pattern.parse("0.5@8")
    pattern.check("o of layer 1", 16, 24)
    with pytest.raises(ValueError, match=r"pattern 0.5@8: o of layer 1 has 12 inputs, which are no multiple of 8"):
        pattern.check("o of layer 1", 12)
    with pytest.raises(ValueError, match=r"o of layer 1 has 20 outputs, which are no multiple of 8"):
        pattern.check("o of layer 1", 16, 20)
    with pytest.raises(ValueError, match="the matrix has 20 outputs"):
        pattern.kept(jnp.ones((20, 16)), "row")


def test_scores_are_those_of_their_papers() -> None:
    x = inputs_of(50, 8)
    w = np.random.default_rng(1).normal(size=(5, 8)).astype(np.float32)
    norms = np.linalg.norm(x.astype(np.float64), axis=0)
    size = np.abs(w).astype(np.float64)
    for whole in (True, False):
        moments = moments_of(x, whole=whole)
        np.testing.assert_allclose(scores.magnitude(jnp.asarray(w), moments), size, rtol=1e-6)
        np.testing.assert_allclose(scores.wanda(jnp.asarray(w), moments), size * norms, rtol=1e-5)
        relative = size / size.sum(1, keepdims=True) + size / size.sum(0, keepdims=True)
        np.testing.assert_allclose(scores.ria(jnp.asarray(w), moments), relative * norms**0.5, rtol=1e-5)


def test_tokens_of_no_weight_do_not_count() -> None:
    x = inputs_of(20, 4)
    weight = np.arange(20) % 3 == 0
    of_some = Moments.none(4, whole=True).with_tokens(jnp.asarray(x), jnp.asarray(weight, jnp.float32))
    for found, wanted in zip(of_some, moments_of(x[weight]), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-3)


def sparsegpt_reference(
    w: np.ndarray, hessian: np.ndarray, pattern: Pattern, block: int, damping: float
) -> tuple[np.ndarray, np.ndarray]:
    """Optimal brain surgeon's step for each weight, the inverse of what is left computed anew each time."""
    w = w.astype(np.float64).copy()
    hessian = hessian.astype(np.float64) + damping * np.mean(np.diagonal(hessian)) * np.eye(len(hessian))
    outputs, inputs = w.shape
    kept = np.ones(w.shape, bool)

    def inverse(column: int) -> np.ndarray:
        return np.linalg.inv(hessian[column:, column:])

    for column in range(inputs):
        # Of columns within reach, what [H^-1]_jj is once all to their left are done.
        if pattern.share is None and column % pattern.of == 0:
            reach = range(column, column + pattern.of)
            saliency = np.array([w[:, j] ** 2 / inverse(j)[0, 0] for j in reach]).T
            for row, of_row in enumerate(saliency):
                kept[row, column + np.argsort(of_row, kind="stable")[: pattern.of - pattern.keep]] = False
        if pattern.share is not None and column % block == 0:
            reach = range(column, min(column + block, inputs))
            saliency = np.array([w[:, j] ** 2 / inverse(j)[0, 0] for j in reach]).T
            order = np.argsort(saliency.reshape(-1), kind="stable")[: int(saliency.size * pattern.share)]
            rows, columns = np.unravel_index(order, saliency.shape)
            kept[rows, column + columns] = False
        left = inverse(column)
        for row in range(outputs):
            if not kept[row, column]:
                w[row, column:] -= w[row, column] / left[0, 0] * left[0]
                w[row, column] = 0
    return w, kept


@pytest.mark.parametrize("text", PATTERNS)
def test_sparsegpt_takes_the_steps_of_the_optimal_brain_surgeon(text: str) -> None:
    pattern, block = Pattern.parse(text), 8
    x = inputs_of(200, 24, seed=3)
    w = np.random.default_rng(4).normal(size=(6, 24)).astype(np.float32)
    moments = moments_of(x)
    found, kept = sparsegpt(jnp.asarray(w), moments, pattern, block=block, damping=0.01)
    wanted, expected = sparsegpt_reference(w, np.asarray(moments.hessian), pattern, block, 0.01)
    np.testing.assert_array_equal(kept, expected)
    np.testing.assert_allclose(found, wanted, atol=2e-3)
    assert (np.asarray(found)[~np.asarray(kept)] == 0).all()


def test_sparsegpt_beats_the_same_mask_without_the_update() -> None:
    x, pattern = inputs_of(300, 32, seed=5), Pattern.parse("0.5")
    w = np.random.default_rng(6).normal(size=(8, 32)).astype(np.float32)
    found, kept = sparsegpt(jnp.asarray(w), moments_of(x), pattern, block=16)
    errors = [np.square(x @ (np.asarray(one) - w).T).mean() for one in (found, w * np.asarray(kept))]
    assert errors[0] < errors[1]


def test_sparsegpt_makes_nothing_of_inputs_that_are_always_zero() -> None:
    x = inputs_of(60, 8, seed=7)
    x[:, 3] = 0
    w = np.random.default_rng(8).normal(size=(4, 8)).astype(np.float32)
    found, _ = sparsegpt(jnp.asarray(w), moments_of(x), Pattern.parse("2:4"))
    assert np.isfinite(found).all()
    assert (np.asarray(found)[:, 3] == 0).all()


def test_scales_of_one_change_nothing_and_others_the_choice() -> None:
    x, w = inputs_of(100, 16, seed=9), np.random.default_rng(10).normal(size=(4, 16)).astype(np.float32)
    moments, pattern = moments_of(x), Pattern.parse("2:4")
    plain, scaled = (sparsegpt(jnp.asarray(w), moments, pattern, scale=scale) for scale in (None, jnp.ones(16)))
    np.testing.assert_array_equal(plain[0], scaled[0])
    large = jnp.asarray(np.where(np.arange(16) % 4 < 2, 1e4, 1.0), jnp.float32)
    _, kept = sparsegpt(jnp.asarray(w), moments, pattern, scale=large)
    assert np.asarray(kept).reshape(4, 4, 4)[:, :, :2].all()


def brute_force(w: np.ndarray, hessian: np.ndarray, kept: int) -> float:
    """Least error of a row with so many weights, over all choices, each with its best values."""
    best = np.inf
    for chosen in itertools.combinations(range(len(w)), kept):
        part = list(chosen)
        values = np.linalg.solve(hessian[np.ix_(part, part)], hessian[part] @ w)
        off = w.copy()
        off[part] -= values
        best = min(best, float(off @ hessian @ off))
    return best


def test_sparsegpt_is_near_the_best_choice_of_all() -> None:
    x = inputs_of(100, 8, seed=11)
    w = np.random.default_rng(12).normal(size=(20, 8)).astype(np.float32)
    moments = moments_of(x)
    hessian = np.asarray(moments.hessian, np.float64)
    found, kept = sparsegpt(jnp.asarray(w), moments, Pattern.parse("4:8"), damping=1e-6)
    off = np.asarray(found, np.float64) - w
    errors = np.einsum("oi,ij,oj->o", off, hessian, off)
    best = [brute_force(row.astype(np.float64), hessian, 4) for row in w]
    plain = np.einsum("oi,ij,oj->o", w * ~np.asarray(kept), hessian, w * ~np.asarray(kept))
    assert (errors >= np.array(best) * 0.999).all(), "nothing is better than the best"
    assert errors.sum() < plain.sum()
