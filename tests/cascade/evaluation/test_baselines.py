"""Other ways to answer: their ends, their costs, and where they stand to each other."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from jaxdual.cascade.evaluation import baselines
from jaxdual.cascade.evaluation.baselines import Curve
from jaxdual.cascade.evaluation.chain import Chain
from jaxdual.cascade.evaluation.ledger import Ledger
from jaxdual.cascade.evaluation.routing import LAMBDAS, cascade_routing
from jaxdual.cascade.evaluation.rules import Scores, route
from jaxdual.cascade.gate import Gate
from tests.cascade.evaluation.synthetic import CHOICES, chain

TWO = chain(count=3000)
THREE = chain((-1.0, 0.5, 3.0), (100, 1000, 9000), count=3000, seed=1)


def curve(of: Chain, name: str) -> Curve:
    return next(one for one in baselines.curves(of) if one.name == name)


@pytest.mark.parametrize("of", [TWO, THREE], ids=["two tiers", "three tiers"])
def test_gates_of_one_score_go_from_the_largest_behind_all_to_the_smallest_alone(of: Chain) -> None:
    for name in ("P(T)", "P(IK)", "margin", "entropy", "random gate"):
        points = curve(of, name).points
        assert points[0] == pytest.approx((of.alone(0).flops().mean(), of.tiers[0].correct.mean())), name
        assert points[-1][1] == pytest.approx(of.tiers[-1].correct.mean()), name
        whole = [of.alone(place).flops().mean() for place in range(len(of.tiers))]
        below = [tier.costs.sizes.lower / tier.costs.sizes.parameters for tier in of.tiers[:-1]]
        early = sum(cost * part for cost, part in zip(whole, below, strict=False)) + whole[-1]
        assert points[-1][0] == pytest.approx(early if name == "P(IK)" else sum(whole)), name


def test_a_gate_of_p_t_is_the_gates_own_at_its_threshold() -> None:
    found = curve(TWO, "P(T)")
    for place, share in ((25, 0.25), (60, 0.6)):
        tau = np.sort(TWO.tiers[0].p_t())[::-1][round(share * len(TWO)) - 1]
        ledger = TWO.ledger([Gate(CHOICES, tau_t=float(tau), uses_probe=False)])
        point = len(found.levels) - 1 - place  # the cheapest, which keeps all, first
        assert found.levels[point] == pytest.approx(share)
        assert np.array_equal(found.cost[point], ledger.flops())
        assert np.array_equal(found.correct[point], TWO.answered(ledger.routes))


def test_random_gate_is_what_random_scores_come_to() -> None:
    rng, wanted = np.random.default_rng(0), []
    for _ in range(40):
        scores = [Scores(None, rng.random(len(THREE))) for _ in range(2)]
        codes = [np.where(one.p_t > 0.4, 0, 2) for one in scores]

        ledger = Ledger(THREE.costs, route(codes, len(THREE)))
        wanted.append((ledger.flops().mean(), THREE.answered(ledger.routes).mean()))
    found = curve(THREE, "random gate")
    point = int(np.argmin(np.abs(found.levels - 0.6)))
    assert found.points[point] == pytest.approx(np.mean(wanted, axis=0), rel=0.01)
    assert found.largest[point] == pytest.approx(0.16)


def test_confidence_is_worth_more_than_chance_and_less_than_hindsight() -> None:
    for of in (TWO, THREE):
        found = {one.name: one for one in baselines.curves(of)}
        cost = float(np.mean([found["P(T)"].points[0][0], found["P(T)"].points[-1][0]]))
        accuracy = {name: one.at_cost(cost)[0].mean() for name, one in found.items()}
        assert accuracy["P(T)"] > accuracy["random gate"] + 0.03
        assert accuracy["margin"] > accuracy["random model"]
        assert accuracy["random model"] >= accuracy["random gate"]
        correct, flops = baselines.oracle(of)
        assert correct.mean() >= max(accuracy.values())
        assert flops.mean() < cost


def test_oracle_asks_the_smallest_that_is_right() -> None:
    correct, cost = baselines.oracle(THREE)
    flops = [THREE.alone(place).flops() for place in range(3)]
    for question in range(200):
        right = [place for place in range(3) if THREE.tiers[place].correct[question]]
        assert correct[question] == bool(right)
        assert cost[question] == flops[right[0] if right else 0][question]


def test_models_that_a_mixture_beats_are_no_part_of_the_random_model() -> None:
    weak = Chain((TWO.tiers[0], dataclasses.replace(TWO.tiers[0], costs=TWO.tiers[0].costs.scaled(4000)), TWO.tiers[1]))
    assert curve(weak, "random model").levels.tolist() == [0, 2]
    line = curve(TWO, "random model")
    cost = np.mean([one for one, _ in line.points])
    assert line.at_cost(float(cost))[0].mean() == pytest.approx(TWO.correct.mean())


def test_at_cost_draws_between_points_and_stops_at_ends() -> None:
    made = Curve.of(
        "made",
        np.array([2.0, 1.0]),
        lambda level: (np.array([level - 1, 0.0]), np.array([level * 10, level * 30]), level - 1),
    )
    assert made.points == [(20.0, 0.0), (40.0, 0.5)]
    correct, cost = made.at_cost(25.0)
    assert correct.tolist() == [0.25, 0.0]
    assert cost.tolist() == [12.5, 37.5]
    assert made.at_cost(5.0)[1].mean() == 20.0
    assert made.at_cost(100.0)[1].mean() == 40.0


def test_margin_and_entropy_are_those_of_letters() -> None:
    letters = TWO.tiers[0].signals.letters()
    row = sorted(letters[0])
    assert baselines.margin(TWO.tiers[0])[0] == pytest.approx(row[-1] - row[-2])
    shares = letters[0] / letters[0].sum()
    assert baselines.negative_entropy(TWO.tiers[0])[0] == pytest.approx((shares * np.log(shares)).sum())


def test_p_true_costs_its_pass() -> None:
    first = TWO.tiers[0]
    asked = dataclasses.replace(
        first.signals, p_true=first.correct.astype(np.float64), p_true_tokens=np.full(len(TWO), 30)
    )
    of = Chain((dataclasses.replace(first, signals=asked), TWO.tiers[1]))
    found = curve(of, "P(True)")
    extra = 2 * first.costs.sizes.parameters * 30
    assert found.points[0][0] == pytest.approx(of.alone(0).flops().mean() + extra)
    assert found.points[-1][0] == pytest.approx(of.alone(0).flops().mean() + extra + of.alone(1).flops().mean())
    # A perfect score: with all right ones kept, nothing is lost.
    kept = found.at_cost(found.points[-1][0] * 0.6)[0].mean()
    assert kept > curve(of, "P(T)").at_cost(found.points[-1][0] * 0.6)[0].mean()


def test_cascade_routing_goes_from_the_most_accurate_to_the_smallest() -> None:
    every = chain((-1.0, 0.5, 3.0), (100, 1000, 9000), count=12_000, seed=2)
    validation, test = every.of("validation"), every.of("test")
    found = cascade_routing(validation, test)
    assert len(found.levels) == len(LAMBDAS)
    assert found.points[0] == pytest.approx((test.alone(0).flops().mean(), test.tiers[0].correct.mean()))
    assert found.points[-1][1] > test.tiers[-1].correct.mean() - 0.02
    middle = float(np.mean([found.points[0][0], found.points[-1][0]]))
    rival = {one.name: one.at_cost(middle)[0].mean() for one in baselines.curves(test)}
    assert found.at_cost(middle)[0].mean() > rival["random model"] + 0.03
    assert found.at_cost(middle)[0].mean() > rival["P(T)"] - 0.01


def test_cascade_routing_without_a_price_is_never_worse_than_what_it_can_have() -> None:
    """At no price every model runs that helps; at a high one only the smallest."""
    every = chain(count=8000, seed=4)
    found = cascade_routing(every.of("validation"), every.of("test"))
    free = int(np.argmin(found.levels))
    assert found.correct[free].mean() >= every.of("test").tiers[-1].correct.mean() - 0.005
    dear = int(np.argmax(found.levels))
    assert found.largest[dear] == 0
