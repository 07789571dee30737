"""Figures of answers: how often they are right, whether two ways to answer differ, and what a router is worth."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from scipy import stats

type Interval = tuple[float, float]
LEVEL = 0.95  # of all intervals
RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class McNemar:
    """Whether two ways to answer the same questions differ by more than chance.

    Attributes:
      only_first, only_second: questions that only one of them answers right.
      exact_p: two-sided, of the binomial distribution.
      statistic, corrected_p: chi-squared of one degree of freedom with continuity correction (Edwards 1948).
    """

    only_first: int
    only_second: int
    exact_p: float
    statistic: float
    corrected_p: float


@dataclass(frozen=True, slots=True)
class Averages:
    """Macro averages over the answers that were right or given; 0 where a class has no share."""

    precision: float
    recall: float
    f1: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its interval, bootstrapped over questions."""

    value: float
    interval: Interval


def macro_averages(given: Int[np.ndarray, " N"], right: Int[np.ndarray, " N"]) -> Averages:
    """Precision, recall and F1 of each answer, averaged.

    Args:
      given, right: numbers of the answers; questions whose right answer is below 0 are left out.
    """
    given, right = given[right >= 0], right[right >= 0]
    rows = []
    for answer in np.union1d(given, right):
        hits = int(((given == answer) & (right == answer)).sum())
        chosen, there = int((given == answer).sum()), int((right == answer).sum())
        rows.append((_share(hits, chosen), _share(hits, there), _share(2 * hits, chosen + there)))
    return Averages(*(float(one) for one in np.mean(rows, axis=0))) if rows else Averages(0.0, 0.0, 0.0)


def performance_difference(accuracy: float, of_largest: float) -> tuple[float, float]:
    """PD of the paper both ways: in points of a hundred, and in percent of the largest model's accuracy."""
    return 100 * (accuracy - of_largest), 100 * (accuracy / of_largest - 1) if of_largest else math.nan


def mcnemar(only_first: int, only_second: int) -> McNemar:
    """McNemar's test of questions that one way answers right and the other wrong.

    Raises:
      ValueError: a count below 0.
    """
    if min(only_first, only_second) < 0:
        raise ValueError(f"counts {only_first} and {only_second} must be at least 0")
    count = only_first + only_second
    if not count:
        return McNemar(0, 0, 1.0, 0.0, 1.0)
    exact = float(stats.binomtest(only_first, count).pvalue)
    statistic = max(0, abs(only_first - only_second) - 1) ** 2 / count
    return McNemar(only_first, only_second, exact, statistic, float(stats.chi2.sf(statistic, 1)))


def mcnemar_of(first: Bool[np.ndarray, " N"], second: Bool[np.ndarray, " N"]) -> McNemar:
    """McNemar's test of two ways to answer the same questions."""
    return mcnemar(int((first & ~second).sum()), int((second & ~first).sum()))


def clopper_pearson(hits: int, count: int, level: float = LEVEL) -> Interval:
    """Exact interval of a share.

    Raises:
      ValueError: more hits than questions, or none of these.
    """
    if not 0 <= hits <= count or not count:
        raise ValueError(f"{hits} of {count}: hits must be 0 to the count, which must be at least 1")
    tail = (1 - level) / 2
    low = 0.0 if not hits else float(stats.beta.ppf(tail, hits, count - hits + 1))
    high = 1.0 if hits == count else float(stats.beta.ppf(1 - tail, hits + 1, count - hits))
    return low, high


def bootstrap(
    columns: Sequence[Shaped[np.ndarray, " N"]],
    figure: Callable[..., np.ndarray],
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Estimate:
    """A figure of means over questions, with the interval of paired draws: all columns of the same questions.

    Args:
      columns: of each question.
      figure: of the means of all columns, arrays of one mean or of one for each draw.
    """
    count = len(columns[0])
    stacked = np.stack([np.asarray(column, np.float64) for column in columns], axis=1)
    drawn = figure(*(_draws(count, seed, resamples) @ stacked / count).T)
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(drawn, (tail, 100 - tail))
    return Estimate(float(figure(*stacked.mean(axis=0))), (float(low), float(high)))


def gap_recovered(accuracy: float, small: float, large: float) -> float:
    """PGR: part of the way from the small model's accuracy to the large one's (RouteLLM, Ong et al. 2024)."""
    return (accuracy - small) / (large - small) if large != small else math.nan


def average_gap_recovered(
    shares: Float[np.ndarray, " P"], accuracies: Float[np.ndarray, " P"], small: float, large: float
) -> float:
    """APGR: mean of PGR over shares of questions for the large model, from none to all, by trapezoids."""
    order = np.argsort(shares, kind="stable")
    recovered = (accuracies[order] - small) / (large - small)
    return float(np.trapezoid(recovered, shares[order]) / (shares.max() - shares.min()))


def call_performance_threshold(
    shares: Float[np.ndarray, " P"], accuracies: Float[np.ndarray, " P"], small: float, large: float, wanted: float
) -> float:
    """CPT(x): least share of questions for the large model at which PGR reaches `wanted`; nan where none does."""
    recovered = (accuracies - small) / (large - small)
    reached = shares[recovered >= wanted]
    return float(reached.min()) if len(reached) else math.nan


def benefit_per_cost(accuracy: float, cost: float, small: tuple[float, float]) -> float:
    """IBC: accuracy gained over the small model's for each unit of cost beyond its (AutoMix, Madaan et al. 2023).

    Args:
      accuracy, cost: of the router.
      small: accuracy and cost of the small model alone.
    """
    return (accuracy - small[0]) / (cost - small[1]) if cost != small[1] else math.nan


def lift(router: tuple[float, float], small: tuple[float, float], large: tuple[float, float]) -> float:
    """IBC lift: how much a router's IBC is above that of the line from the small model to the large one, relatively.

    Args:
      router, small, large: accuracy and cost of each.
    """
    line = benefit_per_cost(large[0], large[1], small)
    return (benefit_per_cost(router[0], router[1], small) - line) / line if line else math.nan


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


@functools.lru_cache(maxsize=2)
def _draws(count: int, seed: int, resamples: int) -> Float[np.ndarray, "draws N"]:
    """How often each question is in each draw; kept, since drawing takes longer than all else."""
    rng, every = np.random.default_rng(seed), np.empty((resamples, count))
    for row in every:
        row[:] = np.bincount(rng.integers(0, count, count), minlength=count)
    return every
