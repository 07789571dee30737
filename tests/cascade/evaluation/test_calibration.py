"""Calibration figures by brute force, and fits that find what data was drawn from."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import expit

from jaxdual.cascade.evaluation import calibration
from jaxdual.cascade.evaluation.rules import softmax


def test_calibration_error_is_the_mean_gap_of_equal_bins() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.random(150)
    correct = rng.random(150) < confidence**2
    order = sorted(range(150), key=lambda place: confidence[place])
    total = 0.0
    for begin in range(0, 150, 10):
        part = order[begin : begin + 10]
        total += abs(sum(confidence[place] for place in part) - sum(bool(correct[place]) for place in part)) / 150
    assert calibration.expected_calibration_error(confidence, correct) == pytest.approx(total)


def test_calibration_error_of_fewer_questions_than_bins() -> None:
    assert calibration.expected_calibration_error(np.array([1.0, 0.5]), np.array([True, False])) == pytest.approx(0.25)


def test_auroc_counts_pairs_and_halves_ties() -> None:
    rng = np.random.default_rng(1)
    confidence, correct = rng.integers(0, 8, 80) / 8, rng.random(80) < 0.4
    pairs = [(one, other) for one in confidence[correct] for other in confidence[~correct]]
    wanted = sum((one > other) + 0.5 * (one == other) for one, other in pairs) / len(pairs)
    assert calibration.auroc(confidence, correct) == pytest.approx(wanted)
    assert math.isnan(calibration.auroc(confidence, np.ones(80, bool)))


def test_quality_has_brier_and_likelihood() -> None:
    confidence, correct = np.array([0.9, 0.2, 0.6, 1.0]), np.array([True, False, False, True])
    found = calibration.Quality.of(confidence, correct)
    assert found.brier == pytest.approx((0.01 + 0.04 + 0.36) / 4)
    assert found.nll == pytest.approx(-(math.log(0.9) + math.log(0.8) + math.log(0.4)) / 4, abs=1e-9)
    assert (found.count, found.base_rate) == (4, 0.5)


def test_risk_coverage_answers_the_surest_first() -> None:
    coverage, risk = calibration.risk_coverage(np.array([0.2, 0.9, 0.5]), np.array([False, True, False]))
    np.testing.assert_allclose(coverage, [1 / 3, 2 / 3, 1])
    np.testing.assert_allclose(risk, [0, 1 / 2, 2 / 3])


def drawn_letters(seed: int, count: int = 40_000) -> tuple[np.ndarray, np.ndarray]:
    """Logits of four letters, and right letters drawn from their own softmax."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (count, 4))
    right = (rng.random((count, 1)) > softmax(logits, 1.0).cumsum(axis=1)).sum(axis=1)
    return logits, np.minimum(right, 3)


@pytest.mark.parametrize("factor", [2.5, 1.0, 0.4])
def test_temperature_finds_the_factor_of_logits(factor: float) -> None:
    logits, right = drawn_letters(0)
    temperature = calibration.fit_temperature(logits * factor, right)
    assert temperature == pytest.approx(factor, rel=0.03)
    assert np.array_equal(softmax(logits, temperature).argmax(axis=1), logits.argmax(axis=1))


def test_temperature_never_raises_the_likelihood_and_is_the_best_of_a_grid() -> None:
    for seed in range(10):
        logits, right = drawn_letters(seed, 12)
        temperature = calibration.fit_temperature(logits, right)
        found = calibration.letter_nll(logits, right, temperature)
        assert found <= calibration.letter_nll(logits, right, 1.0)
        assert found <= min(calibration.letter_nll(logits, right, one) for one in np.geomspace(0.02, 50, 200)) + 1e-9


def test_temperature_leaves_out_questions_without_a_right_letter_and_letters_that_are_not_there() -> None:
    logits, right = drawn_letters(0, 4000)
    more = np.concatenate([logits, -logits])
    assert calibration.fit_temperature(more, np.concatenate([right, np.full(4000, -1)])) == pytest.approx(
        calibration.fit_temperature(logits, right)
    )
    wider = np.concatenate([logits, np.full((4000, 1), -np.inf)], axis=1)
    assert calibration.fit_temperature(wider, right) == pytest.approx(calibration.fit_temperature(logits, right))
    with pytest.raises(ValueError, match="right letter"):
        calibration.fit_temperature(logits, np.full(4000, -1))


def test_platt_and_fusion_find_their_weights() -> None:
    rng = np.random.default_rng(2)
    p_t, p_ik = rng.beta(2, 1, 60_000), rng.beta(2, 2, 60_000)
    correct = rng.random(60_000) < expit(0.6 * calibration.logit(p_t) - 0.5)
    platt = calibration.fit_platt(p_t, correct)
    assert (platt.slope, platt.intercept) == (pytest.approx(0.6, abs=0.03), pytest.approx(-0.5, abs=0.03))
    correct = rng.random(60_000) < expit(0.7 * calibration.logit(p_t) + 0.4 * calibration.logit(p_ik) + 0.3)
    fusion = calibration.fit_fusion(p_ik, p_t, correct, 0.8)
    assert (fusion.p_t, fusion.p_ik) == (pytest.approx(0.7, abs=0.03), pytest.approx(0.4, abs=0.03))
    assert (fusion.intercept, fusion.tau) == (pytest.approx(0.3, abs=0.03), 0.8)


def test_platt_makes_overconfidence_honest() -> None:
    rng = np.random.default_rng(3)
    honest = rng.random(20_000)
    correct, sure = rng.random(20_000) < honest, expit(3 * calibration.logit(honest))
    platt = calibration.fit_platt(sure, correct)
    repaired = np.array([platt(float(one)) for one in sure])
    assert calibration.expected_calibration_error(sure, correct) > 0.1
    assert calibration.expected_calibration_error(repaired, correct) < 0.02


def test_fits_need_right_and_wrong_answers() -> None:
    with pytest.raises(ValueError, match="3 of 3 answers"):
        calibration.fit_platt(np.array([0.1, 0.2, 0.3]), np.ones(3, bool))
    separable = calibration.fit_platt(np.array([0.1, 0.2, 0.8, 0.9]), np.array([False, False, True, True]))
    assert math.isfinite(separable.slope)
