"""Many questions at once by the same rule as `Gate` has for one."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from jaxdual.cascade.evaluation.rules import REFUSALS, Scores, letter_probabilities, p_t_of, refusals, route
from jaxdual.cascade.gate import Confidence, Fusion, Gate, Platt

CHOICES = Confidence("choices", ((1,), (2,), (3,), (4,)))
_PLATT_IK, _PLATT_T = Platt(1.3, -0.2), Platt(0.7, 0.4)


def verdict(gate: Gate, p_ik: float | None, p_t: float) -> str | None:
    found = gate.after_prompt(p_ik if gate.uses_probe else None)
    return (found or gate.after_answer(p_ik if gate.uses_probe else None, p_t)).refused_by


@pytest.mark.parametrize("probe", [True, False])
@pytest.mark.parametrize(
    "gate",
    [
        Gate(CHOICES),
        Gate(CHOICES, platt_ik=_PLATT_IK, platt_t=_PLATT_T),
        Gate(CHOICES, tau_ik=0, tau_t=0),
        Gate(CHOICES, tau_ik=1.01, tau_t=1.01),
        Gate(CHOICES, uses_probe=False),
        Gate(None),
        Gate(None, platt_ik=_PLATT_IK),
        Gate(CHOICES, fusion=Fusion(0.9, 0.6, -0.3, 0.6)),
        Gate(CHOICES, fusion=Fusion(0.9, 0.6, -0.3, 0.6), platt_ik=_PLATT_IK, platt_t=_PLATT_T),
    ],
)
def test_refusals_are_those_of_the_gate(gate: Gate, probe: bool) -> None:
    rng = np.random.default_rng(0)
    ends = [0.0, 0.5, math.nextafter(0.5, 0), 0.9, math.nextafter(0.9, 0), 1.0, gate.tau_t]
    grid = np.array(list(itertools.product(ends, ends)))
    p_ik, p_t = np.concatenate([grid, rng.random((400, 2))]).T
    codes = refusals(gate, Scores(p_ik if probe else None, p_t))
    wanted = [verdict(gate, one if probe else None, other) for one, other in zip(p_ik, p_t, strict=True)]
    assert [REFUSALS[code] for code in codes] == wanted


@pytest.mark.parametrize("mode", ["full", "choices"])
def test_p_t_of_choices_is_that_of_confidence(mode: str) -> None:
    rng = np.random.default_rng(1)
    logprobs = rng.normal(-3, 2, (50, 4, 2))
    logprobs[:10, 3] = -np.inf  # questions of three choices
    confidence = Confidence("choices", ((1, 5), (2, 6), (3, 7), (4, 8)), mode, 2.5 if mode == "choices" else 1.0)
    wanted = [confidence.letter_probabilities(row.reshape(-1).tolist()) for row in logprobs[10:]]
    found = letter_probabilities(logprobs, confidence.mode, confidence.temperature)
    np.testing.assert_allclose(found[10:], wanted, rtol=1e-12)
    np.testing.assert_allclose(p_t_of(confidence, logprobs)[10:], [max(row) for row in wanted], rtol=1e-12)
    three = Confidence("choices", ((1, 5), (2, 6), (3, 7)), confidence.mode, confidence.temperature)
    wanted = [three.letter_probabilities(row[:3].reshape(-1).tolist()) for row in logprobs[:10]]
    np.testing.assert_allclose(found[:10, :3], wanted, rtol=1e-12)
    assert (found[:10, 3] == 0).all()


def test_p_t_of_an_opening_is_that_of_confidence() -> None:
    confidence = Confidence("opening", ((1, 2), (3,)))
    logprobs = np.log(np.array([[[0.5, 0.25], [0.8, 1e-300]], [[0.1, 0.1], [1.0, 1e-300]]]))
    wanted = [confidence.p_t([row[0].tolist(), row[1, :1].tolist()]) for row in logprobs]
    np.testing.assert_allclose(p_t_of(confidence, logprobs), wanted)
    np.testing.assert_allclose(wanted, [0.6, 0.2])


@pytest.mark.parametrize("tiers", [1, 2, 3])
def test_a_question_goes_to_the_first_tier_that_both_scores_pass(tiers: int) -> None:
    """By the rule of the paper's section 3, one question after the other."""
    rng = np.random.default_rng(tiers)
    count, tau_ik, tau_t = 300, 0.5, 0.9
    p_ik, p_t = rng.random((tiers, count)), rng.random((tiers, count)) ** 0.1
    gate = Gate(CHOICES, tau_ik=tau_ik, tau_t=tau_t)
    routes = route([refusals(gate, Scores(p_ik[tier], p_t[tier])) for tier in range(tiers - 1)], count)
    for question in range(count):
        wanted = tiers - 1
        for tier in range(tiers - 1):
            if not (p_ik[tier, question] < tau_ik or p_t[tier, question] < tau_t):
                wanted = tier
                break
        assert routes.answered_by[question] == wanted
        codes = routes.refused[question].tolist()
        assert codes[wanted] == 0
        assert all(code > 0 for code in codes[:wanted])
        assert all(code == -1 for code in codes[wanted + 1 :])


def test_kept_questions_shrink_with_thresholds_and_with_p_ik() -> None:
    rng = np.random.default_rng(5)
    scores = Scores(rng.random(500), rng.random(500))
    taus = np.linspace(0, 1.01, 12)
    for tau_t, tau_ik in itertools.product(taus, taus):
        with_probe = refusals(Gate(CHOICES, tau_ik=tau_ik, tau_t=tau_t), scores) == 0
        without = refusals(Gate(CHOICES, tau_t=tau_t, uses_probe=False), scores) == 0
        stricter_t = refusals(Gate(CHOICES, tau_ik=tau_ik, tau_t=tau_t + 0.05), scores) == 0
        stricter_ik = refusals(Gate(CHOICES, tau_ik=tau_ik + 0.05, tau_t=tau_t), scores) == 0
        assert not (with_probe & ~without).any()
        assert not (stricter_t & ~with_probe).any()
        assert not (stricter_ik & ~with_probe).any()


def test_gate_that_asks_p_t_needs_it() -> None:
    with pytest.raises(ValueError, match=r"asks P\(T\)"):
        refusals(Gate(CHOICES), Scores(np.ones(3), None))
