"""A probe learns what can be known from states, and nothing where there is nothing to know."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from scipy.special import expit

from jaxdual.cascade.evaluation.calibration import auroc, negative_log_likelihood
from jaxdual.cascade.evaluation.train import ProbeFigures, Recipe, Trained, p_ik_of, train_probe

HIDDEN = 8
RECIPE = Recipe(rate=1e-3, epochs=6)


def drawn(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """States, and labels that go by one direction of them; one channel is massive, one never changes."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(count, HIDDEN)).astype(np.float32)
    correct = rng.random(count) < expit(2.5 * hidden[:, 2] + 0.5)
    hidden[:, 0] = hidden[:, 0] * 300 + 2000
    hidden[:, 1] = 7
    return hidden, correct


TRAIN, VALIDATION, TEST = drawn(0, 4000), drawn(1, 800), drawn(2, 2000)


@pytest.fixture(scope="module")
def trained() -> Trained:
    return train_probe(TRAIN, VALIDATION, RECIPE)


def test_probe_is_nearly_as_good_as_what_labels_were_drawn_by(trained: Trained) -> None:
    hidden, correct = TEST
    best = auroc(expit(2.5 * hidden[:, 2] + 0.5), correct)
    assert auroc(p_ik_of(trained.parameters, hidden), correct) > best - 0.02
    figures = ProbeFigures.of(p_ik_of(trained.parameters, hidden), correct)
    assert figures.quality.ece < 0.05
    assert figures.accuracy > 0.75


def test_shuffled_labels_teach_nothing() -> None:
    control = train_probe(TRAIN, VALIDATION, dataclasses.replace(RECIPE, shuffled_labels=True))
    assert 0.4 < auroc(p_ik_of(control.parameters, TEST[0]), TEST[1]) < 0.6


def test_the_epoch_of_the_least_validation_loss_is_kept() -> None:
    """On few questions with random labels, more epochs only make validation worse."""
    hidden, correct = TRAIN[0][:256], np.random.default_rng(0).random(256) < 0.5
    trained = train_probe((hidden, correct), VALIDATION, Recipe(rate=1e-2, epochs=6))
    losses = [epoch.validation for epoch in trained.epochs]
    assert trained.best == 1 + int(np.argmin(losses)) < 6
    found = negative_log_likelihood(p_ik_of(trained.parameters, VALIDATION[0]), VALIDATION[1])
    assert found == pytest.approx(min(losses), rel=1e-4)
    assert trained.epochs[-1].train < trained.epochs[0].train


def test_seed_makes_the_probe(trained: Trained) -> None:
    again = train_probe(TRAIN, VALIDATION, RECIPE)
    other = train_probe(TRAIN, VALIDATION, dataclasses.replace(RECIPE, seed=1))
    pairs = zip(jax.tree.leaves(trained.parameters), jax.tree.leaves(again.parameters), strict=True)
    assert all(np.array_equal(one, two) for one, two in pairs)
    assert not np.array_equal(trained.parameters.kernels[0], other.parameters.kernels[0])


def test_inputs_are_standardised_by_train_questions(trained: Trained) -> None:
    hidden = TRAIN[0].astype(np.float64)
    np.testing.assert_allclose(trained.parameters.mean, hidden.mean(axis=0), rtol=1e-4, atol=1e-6)
    deviation = np.where(hidden.std(axis=0) > 0, hidden.std(axis=0), 1)
    np.testing.assert_allclose(trained.parameters.deviation, deviation, rtol=1e-4)


def test_states_must_be_finite() -> None:
    hidden = TRAIN[0][:4].copy()
    hidden[1, 2] = np.inf
    with pytest.raises(ValueError, match="train questions are not finite"):
        train_probe((hidden, TRAIN[1][:4]), VALIDATION, RECIPE)


def test_figures_of_a_probe() -> None:
    figures = ProbeFigures.of(np.array([0.9, 0.6, 0.4, 0.5]), np.array([True, False, True, True]))
    assert figures.accuracy == 0.5
    assert figures.f1 == pytest.approx(2 * 2 / (3 + 3))
    assert figures.macro_f1 == pytest.approx((2 / 3 + 0) / 2)
