"""Pruners against references written from their papers, in NumPy and float64."""

from __future__ import annotations

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdual.pruning.admm import admm
from jaxdual.pruning.dsnot import dsnot
from jaxdual.pruning.methods import METHODS, UPDATES, prune_matrix
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
        for name, expected in (("magnitude", size), ("wanda", size * norms)):
            np.testing.assert_allclose(METHODS[name].score(jnp.asarray(w), moments), expected, rtol=1e-5)
        relative = size / size.sum(1, keepdims=True) + size / size.sum(0, keepdims=True)
        found = METHODS["ria"].score(jnp.asarray(w), moments)
        np.testing.assert_allclose(found, relative * norms**0.5, rtol=1e-5)
    # SparseGPT's, as it is before its sweep: what is left of the inverse Hessian behind each column.
    hessian = x.astype(np.float64).T @ x / len(x)
    hessian += 0.01 * np.mean(np.diagonal(hessian)) * np.eye(8)
    left = np.array([np.linalg.inv(hessian[j:, j:])[0, 0] for j in range(8)])
    found = METHODS["sparsegpt"].score(jnp.asarray(w), moments_of(x))
    np.testing.assert_allclose(found, size / np.sqrt(left), rtol=1e-3)


def test_tokens_of_no_weight_do_not_count() -> None:
    x = inputs_of(20, 4)
    weight = np.arange(20) % 3 == 0
    of_some = Moments.none(4, whole=True).with_tokens(jnp.asarray(x), jnp.asarray(weight, jnp.float32))
    both = (dataclasses.astuple(one) for one in (of_some, moments_of(x[weight])))
    for found, wanted in zip(*both, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-3)


def sparsegpt_reference(
    w: np.ndarray, hessian: np.ndarray, pattern: Pattern, block: int, damping: float, scale: np.ndarray
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
            saliency = np.array([scale[j] ** 2 * w[:, j] ** 2 / inverse(j)[0, 0] for j in reach]).T
            for row, of_row in enumerate(saliency):
                kept[row, column + np.argsort(of_row, kind="stable")[: pattern.of - pattern.keep]] = False
        if pattern.share is not None and column % block == 0:
            reach = range(column, min(column + block, inputs))
            saliency = np.array([scale[j] ** 2 * w[:, j] ** 2 / inverse(j)[0, 0] for j in reach]).T
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
@pytest.mark.parametrize("scaled", [False, True])
def test_sparsegpt_takes_the_steps_of_the_optimal_brain_surgeon(text: str, scaled: bool) -> None:
    pattern, block = Pattern.parse(text), 8
    x = inputs_of(200, 24, seed=3)
    w = np.random.default_rng(4).normal(size=(6, 24)).astype(np.float32)
    moments = moments_of(x)
    scale = np.random.default_rng(5).lognormal(0, 0.5, 24).astype(np.float32) if scaled else np.ones(24, np.float32)
    found, kept = sparsegpt(
        jnp.asarray(w), moments, pattern, scale=jnp.asarray(scale) if scaled else None, block=block, damping=0.01
    )
    wanted, expected = sparsegpt_reference(w, np.asarray(moments.hessian), pattern, block, 0.01, scale)
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


@pytest.mark.parametrize("name", METHODS)
def test_scales_of_one_are_no_scales(name: str) -> None:
    x, w = inputs_of(100, 16, seed=13), np.random.default_rng(14).normal(size=(6, 16)).astype(np.float32)
    for text in ("0.5", "2:4"):
        arguments = jnp.asarray(w), moments_of(x), METHODS[name], Pattern.parse(text)
        plain, scaled = prune_matrix(*arguments), prune_matrix(*arguments, scale=jnp.ones(16))
        np.testing.assert_array_equal(plain[0], scaled[0])
        np.testing.assert_array_equal(plain[1], scaled[1])


def test_centred_moments_are_those_of_inputs_less_their_means() -> None:
    x = inputs_of(60, 6, seed=15) + np.arange(6, dtype=np.float32)
    for whole in (True, False):
        found = moments_of(x, whole=whole).centred
        wanted = np.cov(x.astype(np.float64).T, bias=True) * len(x)
        np.testing.assert_allclose(found.second, wanted if whole else np.diagonal(wanted), rtol=2e-3, atol=0.05)
        np.testing.assert_array_equal(found.first, np.zeros(6))
        # An input that never changes has none left, and no less than none.
        for seed in range(20):
            constant = np.random.default_rng(seed).normal(size=6).astype(np.float32) * np.ones((97, 1), np.float32)
            assert (np.asarray(moments_of(constant, whole=whole).centred.squares) >= 0).all()


def test_admm_comes_to_least_squares_over_the_weights_that_stay() -> None:
    x, w = inputs_of(200, 12, seed=16), np.random.default_rng(17).normal(size=(5, 12)).astype(np.float32)
    moments, kept = moments_of(x), np.random.default_rng(18).random((5, 12)) < 0.5
    hessian = np.asarray(moments.hessian, np.float64)
    # The damping is of the Hessian with a diagonal of ones.
    hessian += 0.01 * np.diag(np.diagonal(hessian))
    best = np.zeros_like(w, np.float64)
    for row, stays in enumerate(kept):
        best[row, stays] = np.linalg.solve(hessian[np.ix_(stays, stays)], hessian[stays] @ w[row])

    def error(found: np.ndarray) -> float:
        off = found - w
        return float(np.einsum("oi,ij,oj->", off, hessian, off))

    errors = []
    for iterations in ({"iterations": 1}, {}, {"iterations": 3000}):
        found, same = admm(jnp.asarray(w), jnp.asarray(kept), moments, Pattern.parse("0.5"), **iterations)
        np.testing.assert_array_equal(same, kept)
        assert (np.asarray(found)[~kept] == 0).all()
        errors.append(error(np.asarray(found, np.float64)))
    assert errors[0] > errors[1] > errors[2]
    np.testing.assert_allclose(errors[2], error(best), rtol=1e-2)
    assert errors[1] < min(error(w * kept), 0.5 * (errors[0] + errors[2]))


@pytest.mark.parametrize("text", ["0.5", "2:4"])
def test_dsnot_swaps_as_its_paper_says(text: str) -> None:
    pattern = Pattern.parse(text)
    x = inputs_of(100, 16, seed=19) + np.random.default_rng(20).normal(size=16).astype(np.float32)
    w = np.random.default_rng(21).normal(size=(30, 16)).astype(np.float32)
    moments = moments_of(x, whole=False)
    kept = np.array(pattern.kept(METHODS["wanda"].score(jnp.asarray(w), moments), "row"))
    found, chosen = dsnot(jnp.asarray(w), jnp.asarray(kept), moments, pattern)

    wide = x.astype(np.float64)
    means, variances, norms = wide.mean(0), wide.var(0), np.linalg.norm(wide, axis=0)
    expected, moved = kept.copy(), 0
    for row, stays in zip(w.astype(np.float64), expected, strict=True):
        error = (row * means)[~stays].sum()
        for _ in range(50):
            gone = np.flatnonzero(~stays)
            back = gone[np.argmax(np.sign(error) * (row * means / variances)[gone])]
            may_go = [
                j
                for j in np.flatnonzero(stays)
                if np.sign(error) * row[j] * means[j] <= 0 and (text == "0.5" or j // 4 == back // 4)
            ]
            if not may_go:
                break
            out = min(may_go, key=lambda j: abs(row[j]) * norms[j])
            after = error - row[back] * means[back] + row[out] * means[out]
            if abs(after) >= abs(error):
                break
            stays[back], stays[out], error, moved = True, False, after, moved + 1
    assert moved > 10, "too few to tell"
    np.testing.assert_array_equal(chosen, expected)
    np.testing.assert_array_equal(found, np.where(expected, w, 0))
    assert (np.asarray(chosen).sum(1) == 8).all()
    lost = [np.abs(((w - w * mask) * means).sum(1)).sum() for mask in (kept, np.asarray(chosen))]
    assert lost[1] < lost[0]


@pytest.mark.parametrize("update", UPDATES)
def test_updates_keep_the_pattern(update: str) -> None:
    x, w = inputs_of(100, 16, seed=22), np.random.default_rng(23).normal(size=(6, 16)).astype(np.float32)
    for name in METHODS:
        arguments = jnp.asarray(w), moments_of(x), METHODS[name], Pattern.parse("2:4")
        after, kept = prune_matrix(*arguments, update=UPDATES[update])
        assert (np.asarray(kept).reshape(-1, 4).sum(1) == 2).all()
        assert (np.asarray(after)[~np.asarray(kept)] == 0).all()
