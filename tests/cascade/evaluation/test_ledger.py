"""Both ways to count, against the paper's tables and against one question after the other."""

from __future__ import annotations

import numpy as np
import pytest

from jaxdual.cascade.evaluation.ledger import Ledger, TierCosts, alone
from jaxdual.cascade.evaluation.rules import REFUSALS, Scores, refusals, route
from jaxdual.cascade.gate import Confidence, Gate
from jaxdual.cascade.work import LayerSizes, Work

CHOICES = Confidence("choices", ((1,), (2,), (3,), (4,)))
SIZES = {"3B": 3_000_000_000, "8B": 8_000_000_000, "70B": 70_000_000_000}


def tier(name: str, parameters: int, count: int) -> TierCosts:
    return TierCosts(
        name=name,
        sizes=LayerSizes(lower=parameters),
        prompt_tokens=np.ones(count, int),
        output_tokens=np.ones(count, int),
        judged_tokens=np.ones(count, int),
    )


@pytest.mark.parametrize(
    ("chain", "kept", "paper", "true"),
    [
        (("3B", "8B"), (487, 943), 21.28, -3.44),
        (("3B", "70B"), (487, 943), 32.60, 29.77),
        (("8B", "70B"), (594, 836), 36.79, 30.11),
        (("3B", "8B", "70B"), (487, 198, 745), 44.86, 36.08),
    ],
)
def test_counts_of_the_papers_table_8(chain: tuple[str, ...], kept: tuple[int, ...], paper: float, true: float) -> None:
    count, ends = sum(kept), np.cumsum(kept)
    places = np.arange(count)
    refused = [np.where(places < ends[number], 0, 2) for number in range(len(chain) - 1)]
    tiers = tuple(tier(name, SIZES[name], count) for name in chain)
    ledger = Ledger(tiers, route(refused, count))
    assert np.bincount(ledger.routes.answered_by).tolist() == list(kept)
    found = ledger.saved(alone(tiers, len(tiers) - 1))
    assert (round(100 * found[0], 2), round(100 * found[1], 2)) == (true, paper)


def made(count: int = 200, judged: int = 1) -> tuple[tuple[TierCosts, ...], list[Scores]]:
    rng = np.random.default_rng(0)
    sizes = (LayerSizes(30, 10, 4, 3), LayerSizes(200, 0, 4, 0), LayerSizes(500, 100, 6, 5))
    tiers = tuple(
        TierCosts(
            name=f"tier {number}",
            sizes=one,
            prompt_tokens=rng.integers(5, 20, count),
            output_tokens=rng.integers(judged, judged + 5, count),
            judged_tokens=np.full(count, judged),
            seconds=rng.random(count),
            price_in=1.0 + number,
            price_out=2.0 + number,
        )
        for number, one in enumerate(sizes)
    )
    return tiers, [Scores(rng.random(count), rng.random(count)) for _ in range(2)]


@pytest.mark.parametrize("judged", [1, 3])
def test_all_passes_are_counted_for_each_question(judged: int) -> None:
    tiers, scores = made(judged=judged)
    gate = Gate(CHOICES, tau_ik=0.4, tau_t=0.5)
    ledger = Ledger(tiers, route([refusals(gate, one) for one in scores], 200))
    flops, price, seconds = ledger.flops(), ledger.price(), ledger.seconds()
    totals = [Work() for _ in tiers]
    seen = set()
    for question in range(200):
        wanted_flops, wanted_price, wanted_seconds = 0.0, 0.0, 0.0
        entries = ledger.entries(question)
        for number, one in enumerate(tiers):
            prompt = int(one.prompt_tokens[question])
            early = number < 2 and scores[number].p_ik[question] < 0.4
            late = number < 2 and not early and scores[number].p_t[question] < 0.5
            output = 0 if early else judged if late else int(one.output_tokens[question])
            passed = prompt + max(output - 1, 0)
            work = Work(passed, 0 if early else passed)
            assert entries[number].work == work
            assert entries[number].refused_by == ("p_ik" if early else "p_t" if late else None)
            seen.add(entries[number].refused_by)
            totals[number] += work
            wanted_flops += one.sizes.flops(work)
            wanted_price += (prompt * one.price_in + output * one.price_out) / 1e6
            share = one.sizes.flops(work) / one.sizes.flops(Work(passed, passed))
            wanted_seconds += one.seconds[question] * share
            if not (early or late):
                assert len(entries) == number + 1
                break
        assert flops[question] == wanted_flops
        assert price[question] == pytest.approx(wanted_price)
        assert seconds[question] == pytest.approx(wanted_seconds)
    assert seen == {None, "p_ik", "p_t"}
    assert [ledger.work(number) for number in range(3)] == totals


def test_thresholds_of_0_give_the_smallest_alone_and_above_1_the_passes_of_all() -> None:
    tiers, scores = made()
    smallest, largest = alone(tiers, 0), alone(tiers, 2)
    lenient = Gate(CHOICES, tau_ik=0, tau_t=0)
    ledger = Ledger(tiers, route([refusals(lenient, one) for one in scores], 200))
    assert np.array_equal(ledger.flops(), smallest.flops())
    assert np.array_equal(ledger.paper_flops(), smallest.paper_flops())
    strict = Gate(CHOICES, tau_ik=0, tau_t=1.01)
    ledger = Ledger(tiers, route([refusals(strict, one) for one in scores], 200))
    assert (ledger.routes.answered_by == 2).all()
    assert np.array_equal(ledger.paper_flops(), largest.paper_flops())
    every = sum(one.sizes.parameters * 2 * one.prompt_tokens for one in tiers[:2]) + largest.flops()
    np.testing.assert_array_equal(ledger.flops(), every)
    assert ledger.saved(largest)[0] < 0 == ledger.saved(largest)[1]


def test_a_refusal_by_p_ik_costs_the_lower_layers_alone() -> None:
    tiers, scores = made()
    ledger = Ledger(tiers[:2], route([refusals(Gate(CHOICES, tau_ik=1.01), scores[0])], 200))
    lower, upper, prompt, output = ledger.tokens(0)
    assert np.array_equal(lower, tiers[0].prompt_tokens)
    assert upper.sum() == output.sum() == 0
    assert np.array_equal(prompt, tiers[0].prompt_tokens)
    assert REFUSALS[ledger.routes.refused[0, 0]] == "p_ik"


def test_scaled_tier_keeps_its_tap() -> None:
    tiers, _ = made()
    assert tiers[0].scaled(4000).sizes == LayerSizes(3000, 1000, 4, 3)
    assert tiers[1].scaled(4000).sizes == LayerSizes(4000, 0, 4, 0)


def test_tiers_must_have_the_questions_that_were_routed() -> None:
    tiers, scores = made()
    with pytest.raises(ValueError, match="200 questions of 2 tiers"):
        Ledger(tiers, route([refusals(Gate(CHOICES), scores[0])], 200))
