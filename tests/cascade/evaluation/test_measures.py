"""Figures against scipy, brute force and the paper's own tables."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from jaxdual.cascade.evaluation import measures


def test_mcnemar_is_that_of_the_papers_table_9() -> None:
    """8B->70B: 14 lost and 9 won; 3B->8B: 11 net losses of 25."""
    found = measures.mcnemar(14, 9)
    assert round(found.exact_p, 4) == 0.4049
    found = measures.mcnemar(18, 7)
    assert (found.statistic, round(found.corrected_p, 4)) == (4.0, 0.0455)


def test_mcnemar_sums_the_binomial_tails() -> None:
    for first, second in ((0, 0), (0, 7), (3, 11), (11, 3), (5, 5)):
        count = first + second
        tail = sum(math.comb(count, k) for k in range(min(first, second) + 1)) / 2**count
        assert measures.mcnemar(first, second).exact_p == pytest.approx(min(1.0, 2 * tail))
    with pytest.raises(ValueError, match="-1"):
        measures.mcnemar(-1, 2)


def test_mcnemar_of_answers_counts_what_only_one_has_right() -> None:
    first, second = np.array([1, 1, 1, 0, 0], bool), np.array([1, 0, 0, 1, 0], bool)
    found = measures.mcnemar_of(first, second)
    assert (found.only_first, found.only_second) == (2, 1)


def test_macro_averages_are_means_over_classes() -> None:
    given, right = np.array([0, 0, 1, 1, 2, 2, 0]), np.array([0, 1, 1, 1, 2, 0, -1])
    found = measures.macro_averages(given, right)
    assert found.precision == pytest.approx((1 / 2 + 1 + 1 / 2) / 3)
    assert found.recall == pytest.approx((1 / 2 + 2 / 3 + 1) / 3)
    assert found.f1 == pytest.approx((1 / 2 + 4 / 5 + 2 / 3) / 3)


def test_performance_difference_is_absolute_and_relative() -> None:
    """The paper's 83.22 beside 83.57: -0.35 points, -0.42 %."""
    points, percent = measures.performance_difference(0.8322, 0.8357)
    assert (round(points, 2), round(percent, 2)) == (-0.35, -0.42)


@pytest.mark.parametrize(("hits", "count"), [(0, 10), (3, 10), (10, 10), (4870, 5000)])
def test_clopper_pearson_is_scipys_exact_interval(hits: int, count: int) -> None:
    wanted = stats.binomtest(hits, count).proportion_ci(0.95, method="exact")
    assert measures.clopper_pearson(hits, count) == pytest.approx((wanted.low, wanted.high))


def test_clopper_pearson_refuses_what_is_no_share() -> None:
    with pytest.raises(ValueError, match="11 of 10"):
        measures.clopper_pearson(11, 10)


def test_bootstrap_of_a_difference_is_paired() -> None:
    """Two columns that differ by a constant have a difference without spread; unpaired draws would have one."""
    column = np.random.default_rng(0).normal(size=400)
    found = measures.bootstrap([column + 1, column], lambda one, other: one - other)
    assert found.value == pytest.approx(1)
    assert found.interval == pytest.approx((1, 1))


def test_bootstrap_of_a_mean_has_the_interval_of_the_normal_distribution() -> None:
    column = np.random.default_rng(0).normal(size=400)
    found = measures.bootstrap([column], lambda mean: mean, resamples=20_000)
    half = 1.96 * column.std() / 20
    assert found.interval == pytest.approx((column.mean() - half, column.mean() + half), abs=0.008)


def test_figures_of_routers() -> None:
    assert measures.gap_recovered(0.8, 0.6, 1.0) == pytest.approx(0.5)
    shares = np.array([1.0, 0.0, 0.5])
    line = np.array([0.9, 0.6, 0.75])
    assert measures.average_gap_recovered(shares, line, 0.6, 0.9) == pytest.approx(0.5)
    above = np.array([0.9, 0.6, 0.9])
    assert measures.average_gap_recovered(shares, above, 0.6, 0.9) == pytest.approx(0.75)
    assert measures.call_performance_threshold(shares, above, 0.6, 0.9, 0.8) == 0.5
    assert math.isnan(measures.call_performance_threshold(shares, above - 0.2, 0.6, 0.9, 0.8))
    assert measures.benefit_per_cost(0.8, 3.0, (0.6, 1.0)) == pytest.approx(0.1)
    assert measures.lift((0.8, 3.0), (0.6, 1.0), (0.9, 11.0)) == pytest.approx(0.1 / 0.03 - 1)
