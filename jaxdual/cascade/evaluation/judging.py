"""What a chain of tiers is worth on test questions: accuracy, compute by both counts, and others at equal compute."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxdual.cascade.evaluation import measures
from jaxdual.cascade.evaluation.baselines import Curve, oracle
from jaxdual.cascade.evaluation.calibration import Quality, risk_coverage
from jaxdual.cascade.evaluation.chain import Chain, Tier
from jaxdual.cascade.evaluation.ledger import Ledger
from jaxdual.cascade.evaluation.measures import Estimate, bootstrap
from jaxdual.cascade.evaluation.rules import REFUSALS, compared
from jaxdual.cascade.evaluation.train import ProbeFigures
from jaxdual.cascade.gate import Gate

SWEPT = (0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99)  # of tau_T
_COVERAGES = (0.1, 0.25, 0.5, 0.75, 1.0)


def tier_report(tier: Tier, gate: Gate | None) -> dict[str, Any]:
    """One model alone, and how good its confidences are: as they come, and as its gate compares them."""
    count, right = len(tier.signals), int(tier.correct.sum())
    report: dict[str, Any] = {
        "name": tier.name,
        "parameters": tier.costs.sizes.parameters,
        "tap": tier.costs.sizes.tap,
        "layers": tier.costs.sizes.layers,
        "accuracy": right / count,
        "accuracy_interval": measures.clopper_pearson(right, count),
        "macro": dataclasses.asdict(_macro(tier.signals.given, tier.signals.right)),
        "p_t": _quality(tier.p_t(), tier.correct),
        "p_ik": None if tier.p_ik is None else dataclasses.asdict(ProbeFigures.of(tier.p_ik, tier.correct)),
    }
    if tier.signals.p_true is not None:
        report["p_true"] = _quality(tier.signals.p_true, tier.correct)
    if gate is not None:
        scores = compared(gate, tier.scores(gate))
        report["gate"] = gate_report(gate)
        report["calibrated"] = {
            name: None if score is None else _quality(score, tier.correct)
            for name, score in (("p_ik", scores.p_ik), ("p_t", scores.p_t), ("fused", scores.fused))
        }
    return report


def chain_report(chain: Chain, gates: Sequence[Gate]) -> dict[str, Any]:
    """The chain with these gates, beside its largest model; intervals of 95 %."""
    ledger, last = chain.ledger(gates), len(chain.tiers) - 1
    right, largest = chain.answered(ledger.routes), chain.tiers[last].correct
    accuracy, of_largest = float(right.mean()), float(largest.mean())
    points, percent = measures.performance_difference(accuracy, of_largest)
    kept = np.bincount(ledger.routes.answered_by, minlength=last + 1)
    alone = chain.alone(last)
    return {
        "gates": [gate_report(gate) for gate in gates],
        "accuracy": accuracy,
        "accuracy_interval": measures.clopper_pearson(int(right.sum()), len(chain)),
        "macro": dataclasses.asdict(_macro(chain.given(ledger.routes), chain.tiers[0].signals.right)),
        "largest_accuracy": of_largest,
        "pd_points": points,
        "pd_percent": percent,
        "difference": _estimate(bootstrap([right, largest], lambda one, other: one - other)),
        "mcnemar": dataclasses.asdict(measures.mcnemar_of(largest, right)),
        "answered": kept.tolist(),
        "kept": [float(share) for share in kept / len(chain)],
        "refused": [_refused(ledger, tier) for tier in range(last)],
        **savings(ledger, alone),
        "cost": float(ledger.flops().sum() / alone.flops().sum()),
        "tokens": [_tokens(ledger, tier) for tier in range(last + 1)],
        "price": {"chain": float(ledger.price().sum()), "largest": float(alone.price().sum())},
        "seconds": {"chain": float(ledger.seconds().sum()), "largest": float(alone.seconds().sum())},
        **_router_figures(chain, accuracy, float(ledger.flops().mean())),
    }


def savings(ledger: Ledger, largest: Ledger) -> dict[str, Any]:
    """Compute saved beside the largest model, of all passes and by the paper's count, each with its interval."""

    def saved(cost: np.ndarray, of_largest: np.ndarray) -> np.ndarray:
        part: np.ndarray = 1 - cost / of_largest
        return part

    return {
        "saved": _estimate(bootstrap([ledger.flops(), largest.flops()], saved)),
        "saved_by_paper": _estimate(bootstrap([ledger.paper_flops(), largest.paper_flops()], saved)),
    }


def at_equal_cost(chain: Chain, gates: Sequence[Gate], curves: Sequence[Curve]) -> dict[str, Any]:
    """Accuracy of other ways at the chain's true cost, and how much the chain's is above it, over the same draws."""
    ledger = chain.ledger(gates)
    right, cost = chain.answered(ledger.routes).astype(np.float64), float(ledger.flops().mean())
    found = {}
    for curve in curves:
        other, other_cost = curve.at_cost(cost)
        found[curve.name] = {
            "accuracy": float(other.mean()),
            "cost": float(other_cost.mean() / chain.alone(len(chain.tiers) - 1).flops().mean()),
            "ahead": _estimate(bootstrap([right, other], lambda one, two: one - two)),
        }
    return found


def curve_report(chain: Chain, curve: Curve) -> dict[str, Any]:
    """A curve's points, costs as parts of the largest model's, and what RouteLLM's figures make of it."""
    scale = float(chain.alone(len(chain.tiers) - 1).flops().mean())
    small, large = float(chain.tiers[0].correct.mean()), float(chain.tiers[-1].correct.mean())
    accuracies = curve.correct.mean(axis=1)
    shares, first = np.unique(curve.largest, return_index=True)
    whole = len(shares) > 1 and large != small
    return {
        "points": [
            {"level": float(level), "cost": cost / scale, "accuracy": accuracy, "largest": float(share)}
            for level, (cost, accuracy), share in zip(curve.levels, curve.points, curve.largest, strict=True)
        ],
        "apgr": measures.average_gap_recovered(shares, accuracies[first], small, large) if whole else None,
        "cpt": {
            str(wanted): _number(
                measures.call_performance_threshold(shares, accuracies[first], small, large, wanted / 100)
            )
            for wanted in (50, 80)
        }
        if whole
        else None,
    }


def sweep(chain: Chain, gates: Sequence[Gate], taus: Sequence[float] = SWEPT) -> list[dict[str, Any]]:
    """The chain over thresholds of P(T), and how far each point is above the line between the smallest and the largest
    model; behind the line's end, above the largest model."""
    costs = [float(chain.alone(tier).flops().mean()) for tier in (0, len(chain.tiers) - 1)]
    small, large = chain.tiers[0].correct, chain.tiers[-1].correct
    found = []
    for tau in taus:
        swept = [dataclasses.replace(gate, tau_t=tau, fusion=None) for gate in gates]
        ledger = chain.ledger(swept)
        right, cost = chain.answered(ledger.routes), ledger.flops()
        beyond = float(cost.mean()) - costs[0]
        part = min(1.0, beyond / (costs[1] - costs[0])) if costs[1] > costs[0] else 1.0
        line = small + part * (large.astype(np.float64) - small)
        found.append(
            {
                "tau_t": tau,
                "kept": float((ledger.routes.answered_by < len(chain.tiers) - 1).mean()),
                "accuracy": float(right.mean()),
                "cost": float(cost.mean()) / costs[1],
                "above_line": _estimate(bootstrap([right, line], lambda one, other: one - other)),
                **savings(ledger, chain.alone(len(chain.tiers) - 1)),
            }
        )
    return found


def other_questions(chain: Chain, usual: Chain, gates: Sequence[Gate]) -> dict[str, Any]:
    """What the gates do to questions of another kind, beside the usual ones.

    Args:
      chain: over those questions.
      usual: over test questions.
      gates: of both.
    """
    ledger, before = chain.ledger(gates), usual.ledger(gates)
    kept = ledger.routes.answered_by < len(chain.tiers) - 1
    usually = float((before.routes.answered_by < len(usual.tiers) - 1).mean())
    right, largest = chain.answered(ledger.routes), chain.tiers[-1].correct
    return {
        "questions": len(chain),
        "kept": float(kept.mean()),
        "kept_interval": measures.clopper_pearson(int(kept.sum()), len(chain)),
        "kept_usually": usually,
        "fall": 1 - float(kept.mean()) / usually if usually else None,
        "accuracy": float(right.mean()),
        "largest_accuracy": float(largest.mean()),
        "difference": _estimate(bootstrap([right, largest], lambda one, other: one - other)),
        "right_of_kept": float(right[kept].mean()) if kept.any() else None,
        "largest_right_of_kept": float(largest[kept].mean()) if kept.any() else None,
        **savings(ledger, chain.alone(len(chain.tiers) - 1)),
    }


def oracle_report(chain: Chain) -> dict[str, float]:
    """The upper bound: see `baselines.oracle`."""
    correct, cost = oracle(chain)
    scale = float(chain.alone(len(chain.tiers) - 1).flops().mean())
    return {"accuracy": float(correct.mean()), "cost": float(cost.mean()) / scale}


def without(gates: Sequence[Gate], score: str) -> list[Gate]:
    """The same gates, asking one score less: "p_ik" or "p_t"."""
    if score == "p_ik":
        return [dataclasses.replace(gate, uses_probe=False, fusion=None) for gate in gates]
    return [dataclasses.replace(gate, confidence=None, fusion=None) for gate in gates]


def paper_gates(chain: Chain) -> list[Gate]:
    """The paper's: 0.5 and 0.9, not calibrated, over the whole vocabulary."""
    return [Gate(tier.signals.header.confidence(), uses_probe=tier.p_ik is not None) for tier in chain.tiers[:-1]]


def gate_report(gate: Gate) -> dict[str, Any]:
    """What a gate compares, for JSON."""
    return {
        "tau_ik": gate.tau_ik if gate.uses_probe and gate.fusion is None else None,
        "tau_t": gate.tau_t if gate.confidence is not None and gate.fusion is None else None,
        "mode": None if gate.confidence is None else gate.confidence.mode,
        "temperature": None if gate.confidence is None else gate.confidence.temperature,
        "platt_ik": None if gate.platt_ik is None else dataclasses.astuple(gate.platt_ik),
        "platt_t": None if gate.platt_t is None else dataclasses.astuple(gate.platt_t),
        "fusion": None if gate.fusion is None else dataclasses.asdict(gate.fusion),
    }


def _router_figures(chain: Chain, accuracy: float, cost: float) -> dict[str, Any]:
    ends = [
        (float(chain.tiers[tier].correct.mean()), float(chain.alone(tier).flops().mean()))
        for tier in (0, len(chain.tiers) - 1)
    ]
    scale = ends[1][1]
    small, large = ((right, flops / scale) for right, flops in ends)
    return {
        "pgr": _number(measures.gap_recovered(accuracy, small[0], large[0])),
        "ibc": _number(measures.benefit_per_cost(accuracy, cost / scale, small)),
        "lift": _number(measures.lift((accuracy, cost / scale), small, large)),
    }


def _refused(ledger: Ledger, tier: int) -> dict[str, int]:
    codes = ledger.routes.refused[:, tier]
    return {str(name): int((codes == code).sum()) for code, name in enumerate(REFUSALS) if name is not None}


def _tokens(ledger: Ledger, tier: int) -> dict[str, int]:
    work = ledger.work(tier)
    _, _, prompt, output = ledger.tokens(tier)
    return {"lower": work.lower, "upper": work.upper, "prompt": int(prompt.sum()), "output": int(output.sum())}


def _quality(confidence: np.ndarray, correct: np.ndarray) -> dict[str, Any]:
    coverage, risk = risk_coverage(confidence, correct)
    places = [max(0, round(share * len(coverage)) - 1) for share in _COVERAGES]
    report: dict[str, Any] = {
        name: _number(value) for name, value in dataclasses.asdict(Quality.of(confidence, correct)).items()
    }
    return report | {"risk_at_coverage": {str(_COVERAGES[n]): float(risk[place]) for n, place in enumerate(places)}}


def _macro(given: np.ndarray, right: np.ndarray) -> measures.Averages:
    names, places = np.unique(np.concatenate([given, right]), return_inverse=True)
    numbers = np.where(names[places] == "", -1, places)
    return measures.macro_averages(numbers[: len(given)], numbers[len(given) :])


def _estimate(estimate: Estimate) -> Mapping[str, Any]:
    return {"value": estimate.value, "interval": list(estimate.interval)}


def _number(value: float) -> float | None:
    """JSON has no nan."""
    return None if value != value else value
