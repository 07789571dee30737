"""Thresholds and calibrations of a chain's gates, chosen on validation questions."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float
from scipy import stats

from jaxdual.cascade.evaluation.calibration import fit_fusion, fit_platt, fit_temperature
from jaxdual.cascade.evaluation.chain import Chain, Tier
from jaxdual.cascade.evaluation.ledger import Ledger
from jaxdual.cascade.evaluation.measures import Estimate, bootstrap
from jaxdual.cascade.evaluation.rules import NOT_ASKED, Routes, by_thresholds, compared
from jaxdual.cascade.gate import Gate, PtMode
from models.questions import LETTERS

type Rule = Literal["both", "p_t", "p_ik", "fusion"]
RULES: tuple[Rule, ...] = get_args(Rule.__value__)
type Calibration = Literal["none", "platt", "temperature"]
CALIBRATIONS: tuple[Calibration, ...] = get_args(Calibration.__value__)
EPSILON = 0.01
CERTAINTY = 0.9
POINTS = 20  # of a threshold's grid
_MOST_TAILS = 4000  # combinations of the gates behind the first


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What thresholds are chosen for: least true cost at little loss of accuracy, or most accuracy for a budget.

    Attributes:
      epsilon: accuracy that may be lost beside the largest model.
      certainty: that no more is lost, by a one-sided normal bound of the paired difference; 0.5 goes by the difference
        as it was found, which the best of many thresholds flatters.
      budget: true cost as part of the largest model's; None for the least cost.
    """

    epsilon: float = EPSILON
    certainty: float = CERTAINTY
    budget: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon < 1:
            raise ValueError(f"epsilon={self.epsilon} must be in [0, 1)")
        if not 0.5 <= self.certainty < 1:
            raise ValueError(f"certainty={self.certainty} must be in [0.5, 1)")
        if self.budget is not None and not self.budget > 0:
            raise ValueError(f"budget={self.budget} must be above 0")


@dataclass(frozen=True, slots=True)
class Chosen:
    """Gates, and what they come to on the questions they were chosen on: too good, as any best of many.

    Attributes:
      gates: of each tier but the last.
      accuracy: of the chain.
      difference: to the largest model's.
      cost: as part of its true cost.
      considered: combinations of thresholds.
    """

    gates: tuple[Gate, ...]
    accuracy: Estimate
    difference: Estimate
    cost: Estimate
    considered: int


def calibrated_gate(tier: Tier, *, rule: Rule, calibration: Calibration, mode: PtMode) -> Gate:
    """A gate whose scores are calibrated on a tier's questions, with the paper's thresholds.

    Args:
      tier: over validation questions.
      rule: which scores are compared: both, one, or a fusion of them.
      calibration: of both scores by Platt, of the letters' distribution by a temperature, or none.
      mode: of `Confidence`.

    Raises:
      ValueError: a rule that needs a probe without one, a temperature in another mode than "choices", or questions that
        are all answered right or all wrong.
    """
    if rule in ("p_ik", "fusion") and tier.p_ik is None:
        raise ValueError(f"{tier.name}: the rule {rule!r} needs a probe")
    if calibration == "temperature" and (mode != "choices" or tier.signals.header.kind != "choices"):
        raise ValueError(f"a temperature is fitted to the distribution of the letters alone; the mode is {mode!r}")
    temperature = 1.0
    if calibration == "temperature":
        letters = tier.signals.letters("choices")
        right = np.array([LETTERS.find(one) if one else -1 for one in tier.signals.right])
        logits = np.log(np.maximum(letters, 1e-300), out=np.full_like(letters, -np.inf), where=letters > 0)
        temperature = fit_temperature(logits, right)
    mode = mode if tier.signals.header.kind == "choices" else "full"
    confidence = None if rule == "p_ik" else tier.signals.header.confidence(mode, temperature)
    gate = Gate(confidence, uses_probe=rule != "p_t" and tier.p_ik is not None)
    if calibration == "platt":
        gate = dataclasses.replace(
            gate,
            platt_ik=fit_platt(tier.p_ik, tier.correct) if gate.uses_probe and tier.p_ik is not None else None,
            platt_t=None if confidence is None else fit_platt(tier.p_t(mode), tier.correct),
        )
    if rule != "fusion":
        return gate
    found = compared(gate, tier.scores(gate))
    if found.p_ik is None or found.p_t is None:
        raise ValueError(f"{tier.name}: a fusion needs both scores")
    return dataclasses.replace(gate, fusion=fit_fusion(found.p_ik, found.p_t, tier.correct, gate.tau_t))


def choose(chain: Chain, templates: Sequence[Gate], goal: Goal, points: int = POINTS) -> Chosen:
    """The best thresholds for a goal, of all combinations of a grid.

    Args:
      chain: over validation questions.
      templates: gates whose thresholds are to be chosen, one for each tier but the last.
      goal: what is best.
      points: of the grid of each threshold: quantiles of the scores, and the ends.

    Raises:
      ValueError: a goal that no thresholds reach.
    """
    grids = _grids(chain, templates, points)
    found = _totals(chain, grids)
    count = len(chain)
    mean, cost = found.gain / count, found.cost / found.largest_cost
    if goal.budget is None:
        spread = np.sqrt(np.maximum(found.differing / count - mean**2, 0) / count)
        fits = mean - stats.norm.ppf(goal.certainty) * spread >= -goal.epsilon - 1e-12
        best = np.lexsort((-mean, cost, ~fits))[0]
    else:
        fits = cost <= goal.budget + 1e-12
        best = np.lexsort((cost, -mean, ~fits))[0]
    if not fits[best]:
        if goal.budget is None:
            raise ValueError(f"no thresholds keep to epsilon={goal.epsilon}; the best lose {-float(mean.max()):.4f}")
        raise ValueError(f"budget={goal.budget} is below {float(cost.min()):.3f}, the least that these tiers take")
    places = np.unravel_index(best, [len(grid) for grid in grids])
    gates = tuple(grid[int(place)] for grid, place in zip(grids, places, strict=True))
    return _judged(chain, gates, len(mean))


def _judged(chain: Chain, gates: tuple[Gate, ...], considered: int) -> Chosen:
    ledger = chain.ledger(gates)
    right, largest = chain.answered(ledger.routes), chain.tiers[-1].correct
    costs = ledger.flops(), chain.alone(len(chain.tiers) - 1).flops()
    return Chosen(
        gates,
        bootstrap([right], lambda mean: mean),
        bootstrap([right, largest], lambda one, other: one - other),
        bootstrap(costs, lambda one, other: one / other),
        considered,
    )


def _grids(chain: Chain, templates: Sequence[Gate], points: int) -> list[list[Gate]]:
    """Gates to choose from, of each tier; fewer where many tiers make many combinations."""
    if len(templates) != len(chain.tiers) - 1:
        raise ValueError(f"{len(templates)} gates of {len(chain.tiers)} tiers; all but the last have one")
    while True:
        grids = [_grid(tier, gate, points) for tier, gate in zip(chain.tiers, templates, strict=False)]
        if points <= 2 or np.prod([len(grid) for grid in grids[1:]]) <= _MOST_TAILS:
            return grids
        points = max(2, points * 3 // 4)


def _grid(tier: Tier, gate: Gate, points: int) -> list[Gate]:
    found = compared(gate, tier.scores(gate))
    if gate.fusion is not None and found.fused is not None:
        fusion = gate.fusion
        taus = _taus(found.fused, points * points, fusion.tau)
        return [dataclasses.replace(gate, fusion=dataclasses.replace(fusion, tau=tau)) for tau in taus]
    both = found.p_ik is not None and found.p_t is not None
    points = points if both else points * points
    of_ik = [gate.tau_ik] if found.p_ik is None else _taus(found.p_ik, points, gate.tau_ik)
    of_t = [gate.tau_t] if found.p_t is None else _taus(found.p_t, points, gate.tau_t)
    return [dataclasses.replace(gate, tau_ik=one, tau_t=two) for one, two in itertools.product(of_ik, of_t)]


def _taus(scores: Float[np.ndarray, " N"], points: int, more: float) -> list[float]:
    """Quantiles of scores, both ends (0 keeps all, 1 hardly anything), and one more threshold."""
    quantiles = np.quantile(scores, np.linspace(0, 1, points))
    return sorted({0.0, 1.0, more, *(float(one) for one in np.round(quantiles, 6))})


@dataclass(frozen=True, slots=True)
class _Totals:
    """Sums over questions for each combination of gates, flat, the last tier's gates fastest.

    Attributes:
      gain: answers right beyond those of the largest model.
      differing: answers of which either alone is right.
      cost: FLOPs of all passes.
      largest_cost: FLOPs of the largest model alone.
    """

    gain: np.ndarray
    differing: np.ndarray
    cost: np.ndarray
    largest_cost: float


def _totals(chain: Chain, grids: Sequence[Sequence[Gate]]) -> _Totals:
    """Of all combinations: the questions behind a gate go the same way whatever the gates before it are."""
    largest = chain.tiers[-1].correct.astype(np.float64)
    last = _pass_costs(chain, len(chain.tiers) - 1, np.zeros((1, len(chain)), np.int8))
    tails = [np.zeros((1, len(chain))), np.zeros((1, len(chain))), last]  # gain, differing, cost
    for place in reversed(range(len(grids))):
        tier = chain.tiers[place]
        scores = compared(grids[place][0], tier.scores(grids[place][0]))
        codes = np.stack([by_thresholds(gate, scores) for gate in grids[place]])
        stays = (codes == 0).astype(np.float64)
        gain = tier.correct - largest
        own = [stays * gain, stays * np.abs(gain), _pass_costs(chain, place, codes)]
        if place:
            pairs = zip(own, tails, strict=True)
            tails = [(one[:, None] + (1 - stays)[:, None] * tail[None]).reshape(-1, len(chain)) for one, tail in pairs]
        else:
            pairs = zip(own, tails, strict=True)
            sums = [(one.sum(axis=1)[:, None] + (1 - stays) @ tail.T).reshape(-1) for one, tail in pairs]
    return _Totals(sums[0], sums[1], sums[2], float(last.sum()))


def _pass_costs(chain: Chain, tier: int, codes: np.ndarray) -> np.ndarray:
    """FLOPs of one tier's pass over all questions, `[gates, N]`, by what its gate says, `[gates, N]`."""
    known = {}
    for code in np.unique(codes):
        refused = np.full((len(chain), len(chain.tiers)), NOT_ASKED, np.int8)
        refused[:, tier] = code
        known[int(code)] = Ledger(chain.costs, Routes(np.full(len(chain), tier), refused)).flops()
    costs = np.zeros(codes.shape)
    for code, flops in known.items():
        costs = np.where(codes == code, flops, costs)
    return costs
