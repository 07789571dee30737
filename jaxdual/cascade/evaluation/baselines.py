"""Other ways to spend the same compute on the same questions, as curves of cost and accuracy.

Thresholds of these curves are swept on the questions that they are judged by, which flatters them: a chain that is
ahead is so in spite of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from jaxdual.cascade.evaluation.chain import Chain, Tier
from jaxdual.cascade.evaluation.ledger import Ledger, pass_flops
from jaxdual.cascade.evaluation.rules import route

LEVELS = 101


@dataclass(frozen=True, slots=True)
class Curve:
    """Points of a way to answer, question by question, the cheapest first.

    Attributes:
      name: of the way.
      levels: what was swept.
      correct: `[points, N]`, chance to be right.
      cost: `[points, N]`, FLOPs of all passes.
      largest: `[points]`, share of questions that the largest model answers.
    """

    name: str
    levels: Float[np.ndarray, " P"]
    correct: Float[np.ndarray, "P N"]
    cost: Float[np.ndarray, "P N"]
    largest: Float[np.ndarray, " P"]

    @classmethod
    def of(cls, name: str, levels: np.ndarray, at: Callable[[float], tuple[np.ndarray, np.ndarray, float]]) -> Curve:
        """Sweeps levels, `at` each of which is correctness, cost and the share that the largest model answers."""
        points = [at(float(level)) for level in levels]
        order = np.argsort([cost.mean() for _, cost, _ in points], kind="stable")
        columns = zip(*(points[place] for place in order), strict=True)
        correct, cost, largest = (np.array(column, np.float64) for column in columns)
        return cls(name, np.asarray(levels, np.float64)[order], correct, cost, largest)

    @property
    def points(self) -> list[tuple[float, float]]:
        """Mean cost and accuracy of each."""
        return [
            (float(cost), float(right))
            for cost, right in zip(self.cost.mean(axis=1), self.correct.mean(axis=1), strict=True)
        ]

    def at_cost(self, wanted: float) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
        """Chance to be right and cost of each question at a mean cost: a draw between the points on both sides of it;
        beyond an end, that end."""
        means = self.cost.mean(axis=1)
        above = int(np.searchsorted(means, wanted))
        if above in (0, len(means)):
            end = min(above, len(means) - 1)
            return self.correct[end], self.cost[end]
        part = (wanted - means[above - 1]) / (means[above] - means[above - 1])
        ends = (self.correct, self.cost)
        correct, cost = (one[above - 1] + part * (one[above] - one[above - 1]) for one in ends)
        return correct, cost


def curves(chain: Chain) -> list[Curve]:
    """All that these tiers' signals allow, but for cascade routing, which is fitted to validation questions."""
    found = [models_at_random(chain), random_gate(chain)]
    gated = chain.tiers[:-1]
    found.append(signal_gate(chain, "P(T)", lambda tier: tier.p_t()))
    if all(tier.p_ik is not None for tier in gated):
        found.append(signal_gate(chain, "P(IK)", _p_ik, early=True))
    if gated[0].signals.header.kind == "choices":
        found.append(signal_gate(chain, "margin", margin))
        found.append(signal_gate(chain, "entropy", negative_entropy))
    if all(tier.signals.p_true is not None for tier in gated):
        found.append(signal_gate(chain, "P(True)", _p_true, extra=_p_true_flops))
    return found


def models_at_random(chain: Chain) -> Curve:
    """Single models, and draws between neighbours on the upper hull of their points: what needs no signal at all. Of
    two tiers it is the straight line between them."""
    ledgers = [chain.alone(tier) for tier in range(len(chain.tiers))]
    accuracies = chain.correct.mean(axis=0)
    points = [(float(one.flops().mean()), float(right)) for one, right in zip(ledgers, accuracies, strict=True)]
    kept = _upper_hull(points)

    def at(place: float) -> tuple[np.ndarray, np.ndarray, float]:
        tier = int(place)
        return chain.tiers[tier].correct, ledgers[tier].flops(), float(tier == len(points) - 1)

    return Curve.of("random model", np.array(kept), at)


def random_gate(chain: Chain) -> Curve:
    """The chain with gates that keep a share of questions by chance: the smaller models run all the same."""

    def at(share: float) -> tuple[np.ndarray, np.ndarray, float]:
        reached, correct, cost = 1.0, np.zeros(len(chain)), np.zeros(len(chain))
        for place, tier in enumerate(chain.tiers):
            answers = reached * (share if place < len(chain.tiers) - 1 else 1.0)
            correct += answers * tier.correct
            cost += reached * chain.alone(place).flops()
            reached -= answers
        return correct, cost, (1 - share) ** (len(chain.tiers) - 1)

    return Curve.of("random gate", np.linspace(0, 1, LEVELS), at)


def signal_gate(
    chain: Chain,
    name: str,
    score: Callable[[Tier], Float[np.ndarray, " N"]],
    *,
    early: bool = False,
    extra: Callable[[Tier], Float[np.ndarray, " N"]] | None = None,
) -> Curve:
    """The chain with gates of one score: each tier keeps the same share of its surest questions.

    Args:
      chain: of tiers.
      name: of the score.
      score: more where a tier is surer.
      early: it is known at the tap, so that a refusal leaves the upper layers out.
      extra: FLOPs that it costs besides.
    """
    scores = [score(tier) for tier in chain.tiers[:-1]]
    order = [np.argsort(-one, kind="stable") for one in scores]

    def at(share: float) -> tuple[np.ndarray, np.ndarray, float]:
        kept = round(share * len(chain))
        refused = [np.full(len(chain), 1 if early else 2) for _ in scores]
        for codes, places in zip(refused, order, strict=True):
            codes[places[:kept]] = 0
        routes = route(refused, len(chain))
        cost = Ledger(chain.costs, routes).flops()
        if extra is not None:
            for place, tier in enumerate(chain.tiers[:-1]):
                cost = cost + np.where(routes.refused[:, place] >= 0, extra(tier), 0)
        return chain.answered(routes), cost, float((routes.answered_by == len(chain.tiers) - 1).mean())

    return Curve.of(name, np.linspace(0, 1, LEVELS), at)


def oracle(chain: Chain) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """Chance to be right and cost of each question where it goes to the smallest model that is right at once, and to
    the smallest of all where none is."""
    correct = chain.correct
    chosen = np.where(correct.any(axis=1), correct.argmax(axis=1), 0)
    cost = np.stack([chain.alone(tier).flops() for tier in range(len(chain.tiers))], axis=1)
    return correct.any(axis=1).astype(np.float64), cost[np.arange(len(chain)), chosen]


def margin(tier: Tier) -> Float[np.ndarray, " N"]:
    """Probability of the likeliest letter beyond that of the next."""
    ordered = np.sort(tier.signals.letters(), axis=1)
    above: np.ndarray = ordered[:, -1] - ordered[:, -2]
    return above


def negative_entropy(tier: Tier) -> Float[np.ndarray, " N"]:
    """Of the letters' own distribution, in nats."""
    shares = tier.signals.letters("choices")
    found: np.ndarray = (shares * np.log(np.maximum(shares, 1e-300))).sum(axis=1)
    return found


def _p_ik(tier: Tier) -> np.ndarray:
    if tier.p_ik is None:
        raise ValueError(f"{tier.name} has no probe")
    return tier.p_ik


def _p_true(tier: Tier) -> np.ndarray:
    if tier.signals.p_true is None:
        raise ValueError(f"{tier.name}: P(True) was not taken")
    return tier.signals.p_true


def _p_true_flops(tier: Tier) -> np.ndarray:
    if tier.signals.p_true_tokens is None:
        raise ValueError(f"{tier.name}: P(True) was not taken")
    tokens = tier.signals.p_true_tokens
    return pass_flops(tier.costs.sizes, tokens, tokens)


def _upper_hull(points: list[tuple[float, float]]) -> list[int]:
    """Places of the points on the upper hull from the cheapest to the most accurate."""
    hull: list[int] = []
    for place in sorted(range(len(points)), key=lambda one: (points[one][0], -points[one][1])):
        if hull and points[place][1] <= points[hull[-1]][1]:
            continue
        while len(hull) > 1 and _slope(points, hull[-2], hull[-1]) <= _slope(points, hull[-2], place):
            hull.pop()
        hull.append(place)
    return hull


def _slope(points: list[tuple[float, float]], one: int, other: int) -> float:
    rise, run = points[other][1] - points[one][1], points[other][0] - points[one][0]
    return rise / run if run else np.inf
