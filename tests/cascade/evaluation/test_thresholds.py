"""Chosen thresholds against all combinations tried one by one, and what calibrations change."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from scipy import stats

from jaxdual.cascade.evaluation import thresholds
from jaxdual.cascade.evaluation.calibration import Quality
from jaxdual.cascade.evaluation.chain import Chain
from jaxdual.cascade.evaluation.rules import compared
from jaxdual.cascade.evaluation.thresholds import Goal, calibrated_gate, choose
from jaxdual.cascade.gate import Gate
from tests.cascade.evaluation.synthetic import CHOICES, chain

TWO = chain(count=1200)
THREE = chain((-1.0, 0.5, 3.0), (1000, 3000, 9000), count=400)


def tried(validation: Chain, goal: Goal, points: int) -> tuple[float, float]:
    """Cost and accuracy of the best, by a ledger for each combination."""
    templates = [Gate(CHOICES)] * (len(validation.tiers) - 1)
    last = len(validation.tiers) - 1
    largest, whole = validation.tiers[last].correct, validation.alone(last).flops().sum()
    found = []
    for gates in itertools.product(*thresholds._grids(validation, templates, points)):
        ledger = validation.ledger(gates)
        gain = validation.answered(ledger.routes).astype(float) - largest
        bound = gain.mean() - stats.norm.ppf(goal.certainty) * gain.std() / len(gain) ** 0.5
        cost = ledger.flops().sum() / whole
        if goal.budget is None and bound >= -goal.epsilon - 1e-12:
            found.append((cost, -gain.mean()))
        elif goal.budget is not None and cost <= goal.budget:
            found.append((-gain.mean(), cost))
    best = min(found)
    return (best[0], -best[1]) if goal.budget is None else (best[1], -best[0])


@pytest.mark.parametrize(("validation", "points"), [(TWO, 8), (THREE, 4)], ids=["two tiers", "three tiers"])
@pytest.mark.parametrize("goal", [Goal(), Goal(epsilon=0.03, certainty=0.5), Goal(budget=0.7)])
def test_the_best_combination_is_found(validation: Chain, points: int, goal: Goal) -> None:
    chosen = choose(validation, [Gate(CHOICES)] * (len(validation.tiers) - 1), goal, points)
    cost, gain = tried(validation, goal, points)
    assert chosen.cost.value == pytest.approx(cost)
    assert chosen.difference.value == pytest.approx(gain, abs=1e-12)
    ledger = validation.ledger(chosen.gates)
    assert chosen.accuracy.value == validation.answered(ledger.routes).mean()


def test_less_certainty_costs_less() -> None:
    careful, bold = (choose(TWO, [Gate(CHOICES)], Goal(certainty=certainty)) for certainty in (0.99, 0.5))
    assert bold.cost.value < careful.cost.value
    assert careful.difference.value > -0.01


def test_chosen_thresholds_hold_on_other_questions_and_save_compute() -> None:
    every = chain(count=16_000, seed=3)
    chosen = choose(every.of("validation"), [Gate(CHOICES)], Goal())
    test = every.of("test")
    ledger = test.ledger(chosen.gates)
    assert test.answered(ledger.routes).mean() > test.tiers[-1].correct.mean() - 0.01
    assert ledger.saved(test.alone(1))[0] > 0.05


def test_a_budget_below_the_smallest_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"budget=0\.01 is below 0\."):
        choose(TWO, [Gate(CHOICES)], Goal(budget=0.01))
    for fields in ({"epsilon": -0.1}, {"certainty": 0.4}, {"budget": 0.0}):
        with pytest.raises(ValueError, match=f"{next(iter(fields))}="):
            Goal(**fields)


def test_long_chains_have_coarser_grids() -> None:
    long = chain((-2, -1, 0, 1, 3), (100, 300, 1000, 3000, 9000), count=60)
    chosen = choose(long, [Gate(CHOICES)] * 4, Goal())
    assert len(chosen.gates) == 4
    assert chosen.cost.value <= 1.5


@pytest.mark.parametrize("rule", thresholds.RULES)
@pytest.mark.parametrize("calibration", ["none", "platt"])
def test_each_rule_is_chosen_with_its_calibration(rule: thresholds.Rule, calibration: thresholds.Calibration) -> None:
    gate = calibrated_gate(TWO.tiers[0], rule=rule, calibration=calibration, mode="full")
    assert (gate.confidence is None) == (rule == "p_ik")
    assert gate.uses_probe == (rule != "p_t")
    assert (gate.fusion is not None) == (rule == "fusion")
    assert (gate.platt_t is not None) == (calibration == "platt" and rule != "p_ik")
    assert (gate.platt_ik is not None) == (calibration == "platt" and rule != "p_t")
    chosen = choose(TWO, [gate], Goal(epsilon=0.03))
    assert chosen.cost.value <= 1.0001
    assert chosen.difference.value >= -0.03


def test_platt_makes_scores_honest() -> None:
    tier = TWO.tiers[0]
    gate = calibrated_gate(tier, rule="both", calibration="platt", mode="full")
    scores = tier.scores(gate)
    before, after = (Quality.of(p, tier.correct) for p in (scores.p_t, compared(gate, scores).p_t))
    assert after.nll <= before.nll
    assert after.ece < 0.05


def test_temperature_undoes_what_sharpened_logits() -> None:
    """Logits of all letters times 2.5: the temperature that makes their distribution honest is 2.5 times as high."""
    plain = TWO.tiers[0]
    sharp = dataclasses.replace(
        plain, signals=dataclasses.replace(plain.signals, logprobs=plain.signals.logprobs * np.float32(2.5))
    )
    gates = [calibrated_gate(tier, rule="both", calibration="temperature", mode="choices") for tier in (plain, sharp)]
    assert gates[1].confidence.temperature == pytest.approx(2.5 * gates[0].confidence.temperature, rel=1e-3)
    np.testing.assert_allclose(plain.scores(gates[0]).p_t, sharp.scores(gates[1]).p_t, rtol=1e-4)


def test_what_a_tier_lacks_is_said() -> None:
    with pytest.raises(ValueError, match="needs a probe"):
        calibrated_gate(TWO.tiers[1], rule="fusion", calibration="none", mode="full")
    with pytest.raises(ValueError, match="mode is 'full'"):
        calibrated_gate(TWO.tiers[0], rule="both", calibration="temperature", mode="full")
    with pytest.raises(ValueError, match="1 gates of 3 tiers"):
        choose(THREE, [Gate(CHOICES)], Goal())
