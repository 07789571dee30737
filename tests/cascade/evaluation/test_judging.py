"""Reports of chains: their figures against the arrays that they are of, and that JSON can hold them."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from jaxdual.cascade.evaluation import judging
from jaxdual.cascade.evaluation.baselines import curves
from jaxdual.cascade.evaluation.chain import Chain, Tier
from jaxdual.cascade.gate import Fusion, Gate, Platt
from tests.cascade.evaluation.synthetic import CHOICES, chain
from tests.cascade.test_probe import made as made_probe

TWO = chain(count=3000)
GATES = [Gate(CHOICES, tau_ik=0.5, tau_t=0.8)]


def test_report_is_that_of_the_answers() -> None:
    report = json.loads(json.dumps(judging.chain_report(TWO, GATES), allow_nan=False))
    small, large = TWO.tiers
    kept = (small.p_ik >= 0.5) & (small.p_t() >= 0.8)
    right = np.where(kept, small.correct, large.correct)
    assert report["accuracy"] == pytest.approx(right.mean())
    assert report["accuracy_interval"][0] < right.mean() < report["accuracy_interval"][1]
    assert report["pd_points"] == pytest.approx(100 * (right.mean() - large.correct.mean()))
    assert report["pd_percent"] == pytest.approx(100 * (right.mean() / large.correct.mean() - 1))
    assert report["answered"] == [int(kept.sum()), int((~kept).sum())]
    refused = report["refused"][0]
    assert refused["p_ik"] == int((small.p_ik < 0.5).sum())
    assert refused["p_t"] == int(((small.p_ik >= 0.5) & (small.p_t() < 0.8)).sum())
    assert report["mcnemar"]["only_first"] == int((large.correct & ~right).sum())
    assert report["mcnemar"]["only_second"] == int((right & ~large.correct).sum())
    tokens = small.costs.prompt_tokens
    sizes, largest = small.costs.sizes, large.costs.sizes.parameters
    spent = tokens * (sizes.lower + np.where(small.p_ik < 0.5, 0, sizes.upper)) + np.where(kept, 0, tokens * largest)
    assert report["saved"]["value"] == pytest.approx(1 - spent.sum() / (tokens * largest).sum())
    by_paper = np.where(kept, sizes.parameters, largest).sum() / (len(kept) * largest)
    assert report["saved_by_paper"]["value"] == pytest.approx(1 - by_paper)
    assert report["cost"] == pytest.approx(1 - report["saved"]["value"])
    assert report["tokens"][0] == {
        "lower": int(tokens.sum()),
        "upper": int(tokens[small.p_ik >= 0.5].sum()),
        "prompt": int(tokens.sum()),
        "output": int((small.p_ik >= 0.5).sum()),
    }


def test_intervals_hold_what_a_sample_of_questions_is_drawn_from() -> None:
    """Of samples of a large population, about 95 % of intervals have its difference and its saving in them."""
    population = chain(count=20_000, seed=9)
    whole = judging.chain_report(population, GATES)
    rng, inside = np.random.default_rng(0), {"difference": 0, "saved": 0, "saved_by_paper": 0}
    for _ in range(40):
        sample = judging.chain_report(population.taken(rng.choice(20_000, 600, replace=False)), GATES)
        for name in inside:
            low, high = sample[name]["interval"]
            inside[name] += low <= whole[name]["value"] <= high
    assert all(count >= 33 for count in inside.values()), inside


def test_ends_of_thresholds_are_the_models_themselves() -> None:
    lenient = judging.chain_report(TWO, [Gate(CHOICES, tau_ik=0, tau_t=0)])
    assert lenient["accuracy"] == TWO.tiers[0].correct.mean()
    assert lenient["pgr"] == 0
    strict = judging.chain_report(TWO, [Gate(CHOICES, tau_ik=0, tau_t=1.01)])
    assert strict["accuracy"] == TWO.tiers[1].correct.mean()
    assert strict["saved"]["value"] == pytest.approx(-1000 / 8750)
    assert strict["saved_by_paper"]["value"] == 0
    assert strict["mcnemar"]["exact_p"] == 1


def test_tiers_tell_of_both_confidences_before_and_after_calibration() -> None:
    gate = dataclasses.replace(GATES[0], platt_ik=Platt(0.5, 0.1), platt_t=Platt(2.0, -0.1))
    report = json.loads(json.dumps(judging.tier_report(TWO.tiers[0], gate), allow_nan=False))
    assert report["p_t"]["auroc"] == pytest.approx(report["calibrated"]["p_t"]["auroc"])
    assert report["p_t"]["ece"] != report["calibrated"]["p_t"]["ece"]
    assert report["p_ik"]["quality"]["auroc"] > 0.7
    assert report["p_t"]["risk_at_coverage"]["1.0"] == pytest.approx(1 - report["accuracy"])
    assert report["p_t"]["risk_at_coverage"]["0.1"] < 0.1
    last = judging.tier_report(TWO.tiers[1], None)
    assert last["p_ik"] is None
    assert "gate" not in last


def test_ways_are_compared_at_equal_cost() -> None:
    found = judging.at_equal_cost(TWO, GATES, curves(TWO))
    cost = judging.chain_report(TWO, GATES)["cost"]
    for name in ("random model", "random gate", "P(T)", "margin"):
        assert found[name]["cost"] == pytest.approx(cost, abs=1e-9), name
    low, high = found["random gate"]["ahead"]["interval"]
    assert 0.03 < low < found["random gate"]["ahead"]["value"] < high


def test_sweep_lies_above_the_line() -> None:
    points = judging.sweep(TWO, GATES)
    assert [point["tau_t"] for point in points] == list(judging.SWEPT)
    costs = [point["cost"] for point in points]
    assert costs == sorted(costs)
    middle = next(point for point in points if point["tau_t"] == 0.8)
    small, large = (tier.correct.mean() for tier in TWO.tiers)
    part = (middle["cost"] - 1000 / 8750) / (1 - 1000 / 8750)
    assert middle["above_line"]["value"] == pytest.approx(middle["accuracy"] - small - part * (large - small))
    assert middle["above_line"]["interval"][0] > 0


def test_other_questions_are_told_of_beside_the_usual_ones() -> None:
    harder = chain((-4.0, 1.0), count=2000, seed=5)
    report = judging.other_questions(harder, TWO, GATES)
    assert report["kept"] < report["kept_usually"]
    assert report["fall"] == pytest.approx(1 - report["kept"] / report["kept_usually"])
    assert report["kept_interval"][0] < report["kept"] < report["kept_interval"][1]


def test_sizes_may_be_assumed() -> None:
    assumed = TWO.with_parameters([1000, 2700])
    report, before = judging.chain_report(assumed, GATES), judging.chain_report(TWO, GATES)
    assert report["accuracy"] == before["accuracy"]
    assert report["saved"]["value"] < before["saved"]["value"]
    assert assumed.tiers[1].costs.sizes.parameters == 2700


def test_gates_without_a_score() -> None:
    both = judging.chain_report(TWO, GATES)["kept"][0]
    for score in ("p_ik", "p_t"):
        report = judging.chain_report(TWO, judging.without(GATES, score))
        assert report["kept"][0] > both
        assert report["refused"][0][score] == 0
    fused = [dataclasses.replace(GATES[0], fusion=Fusion(1.0, 1.0, 0.0, 0.9))]
    assert judging.chain_report(TWO, fused)["refused"][0]["fusion"] > 0


def test_curve_report_has_the_figures_of_routers() -> None:
    found = {curve.name: judging.curve_report(TWO, curve) for curve in curves(TWO)}
    assert found["random gate"]["apgr"] == pytest.approx(0.5, abs=0.01)
    assert found["P(T)"]["apgr"] > 0.6
    assert found["P(T)"]["cpt"]["80"] < found["random gate"]["cpt"]["80"]
    json.dumps(found, allow_nan=False)


def test_chains_need_tiers_of_the_same_questions_and_probes_of_their_models() -> None:
    with pytest.raises(ValueError, match="1 tiers"):
        Chain(TWO.tiers[:1])
    with pytest.raises(ValueError, match="different ids"):
        Chain((TWO.tiers[0], TWO.tiers[1].taken(np.arange(10))))
    with pytest.raises(ValueError, match="2 gates of 2 tiers"):
        TWO.ledger(GATES * 2)
    signals = TWO.tiers[0].signals
    header = dataclasses.replace(signals.header, fingerprint="ab" * 32)
    fitting = dataclasses.replace(signals, header=header, hidden=np.zeros((len(TWO), 12), np.float32))
    assert Tier.of(fitting, made_probe()).p_ik.shape == (len(TWO),)
    for other in (made_probe(fingerprint="cd" * 32), made_probe(tap=2)):
        with pytest.raises(ValueError, match="the probe is of tiny"):
            Tier.of(fitting, other)
