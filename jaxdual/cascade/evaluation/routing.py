"""Cascade routing (Dekoninck et al. 2024): the next model is the one of most expected quality for its cost, skips too.

Whether each model is right is predicted by logistic regressions on the confidences of the models that have run. What a
further model is worth is taken from what can be done behind it, fitted by least squares; both on validation questions.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.special import expit

from jaxdual.cascade.evaluation.baselines import Curve
from jaxdual.cascade.evaluation.calibration import fit_logistic, logit
from jaxdual.cascade.evaluation.chain import Chain

LAMBDAS = np.concatenate([[0.0], np.geomspace(1e-3, 3.0, 40)])  # accuracy that the cost of the largest model is worth

type _Run = tuple[int, ...]  # tiers that have run, in order


@dataclass(frozen=True, slots=True)
class _Models:
    """Fitted to validation questions.

    Attributes:
      quality: of each set of tiers that have run and each tier, weights of the chance that it is right.
      worth: of each set and each tier that could run next, weights of what is to be had behind it, cost taken off.
    """

    quality: dict[tuple[_Run, int], np.ndarray]
    worth: dict[tuple[_Run, int], np.ndarray]


def cascade_routing(validation: Chain, test: Chain) -> Curve:
    """The curve of cascade routing on test questions, fitted to validation questions, over prices of compute."""
    scale = float(test.alone(len(test.tiers) - 1).flops().mean())
    quality = _fit_quality(validation)

    def at(price: float) -> tuple[np.ndarray, np.ndarray, float]:
        return _walk(test, _Models(quality, _fit_worth(validation, quality, price / scale)), price / scale)

    return Curve.of("cascade routing", LAMBDAS, at)


def _sets(tiers: int) -> list[_Run]:
    """Of tiers that have run, the largest sets first."""
    found = [run for size in range(tiers + 1) for run in itertools.combinations(range(tiers), size)]
    return found[::-1]


def _features(chain: Chain, run: _Run) -> Float[np.ndarray, "N F"]:
    columns = [np.ones(len(chain))]
    for place in run:
        tier = chain.tiers[place]
        columns.append(logit(tier.p_t()))
        if tier.p_ik is not None:
            columns.append(logit(tier.p_ik))
    return np.stack(columns, axis=1)


def _fit_quality(chain: Chain) -> dict[tuple[_Run, int], np.ndarray]:
    tiers = range(len(chain.tiers))
    return {
        (run, tier): fit_logistic(_features(chain, run), chain.tiers[tier].correct)
        for run in _sets(len(chain.tiers))
        for tier in tiers
    }


def _fit_worth(
    chain: Chain, quality: dict[tuple[_Run, int], np.ndarray], price: float
) -> dict[tuple[_Run, int], np.ndarray]:
    worth: dict[tuple[_Run, int], np.ndarray] = {}
    best: dict[_Run, np.ndarray] = {}
    for run in _sets(len(chain.tiers)):
        features = _features(chain, run)
        values = [_answer(features, quality, run)[1]] if run else []
        for tier in _next(run, len(chain.tiers)):
            target = best[(*run, tier)] - price * chain.alone(tier).flops()
            worth[run, tier] = np.linalg.lstsq(_bounded(features), target, rcond=None)[0]
            values.append(_bounded(features) @ worth[run, tier])
        best[run] = np.max(values, axis=0)
    return worth


def _walk(chain: Chain, models: _Models, price: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Right answers, costs, and the share that the largest model answers."""
    count, tiers = len(chain), len(chain.tiers)
    correct, cost, by_largest = np.zeros(count), np.zeros(count), 0
    waiting: dict[_Run, np.ndarray] = {(): np.arange(count)}
    for run in _sets(tiers)[::-1]:
        places = waiting.pop(run, np.array([], int))
        if not len(places):
            continue
        features = _features(chain, run)[places]
        options = [(tier, _bounded(features) @ models.worth[run, tier]) for tier in _next(run, tiers)]
        values = np.stack([value for _, value in options], axis=1) if options else np.full((len(places), 1), -np.inf)
        if run:
            answerer, quality = _answer(features, models.quality, run)
            stops = quality >= values.max(axis=1)
            correct[places[stops]] = chain.correct[places[stops], answerer[stops]]
            by_largest += int((answerer[stops] == tiers - 1).sum())
        else:
            stops = np.zeros(len(places), bool)
        chosen = values.argmax(axis=1)
        for option, (tier, _) in enumerate(options):
            going = places[~stops & (chosen == option)]
            cost[going] += chain.alone(tier).flops()[going]
            waiting[(*run, tier)] = np.concatenate([waiting.get((*run, tier), np.array([], int)), going])
    return correct, cost, by_largest / count


def _next(run: _Run, tiers: int) -> range:
    """Larger tiers than any that has run."""
    return range(run[-1] + 1 if run else 0, tiers)


def _answer(
    features: np.ndarray, quality: dict[tuple[_Run, int], np.ndarray], run: _Run
) -> tuple[np.ndarray, np.ndarray]:
    """Whose answer is given of those that have run, and the chance that it is right."""
    chances = np.stack([expit(features @ quality[run, tier]) for tier in run], axis=1)
    best = chances.argmax(axis=1)
    return np.array(run)[best], chances.max(axis=1)


def _bounded(features: np.ndarray) -> np.ndarray:
    """Features for least squares: logits and, since worth is bounded, the probabilities that they are of."""
    return np.concatenate([features, expit(features[:, 1:])], axis=1)
