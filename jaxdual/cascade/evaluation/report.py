"""All figures of a cascade on test questions, as data and as text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxdual.cascade.evaluation import judging
from jaxdual.cascade.evaluation.baselines import curves
from jaxdual.cascade.evaluation.chain import Chain
from jaxdual.cascade.evaluation.routing import cascade_routing
from jaxdual.cascade.evaluation.thresholds import Chosen
from jaxdual.cascade.gate import Gate


def evaluate(test: Chain, gates: Sequence[Gate], validation: Chain, others: dict[str, Chain]) -> dict[str, Any]:
    """All figures of a chain on test questions: with its gates and with the paper's, beside other ways.

    Args:
      test: questions that nothing was chosen on.
      gates: that were chosen on validation questions.
      validation: these, for cascade routing.
      others: questions of other kinds, by name.
    """
    found = [*curves(test), cascade_routing(validation, test)]
    paper = judging.paper_gates(test)
    ways = {
        "chosen": list(gates),
        "chosen without P(IK)": judging.without(gates, "p_ik"),
        "chosen without P(T)": judging.without(gates, "p_t"),
        "paper": paper,
        "paper without P(IK)": judging.without(paper, "p_ik"),
        "paper without P(T)": judging.without(paper, "p_t"),
    }
    if any(tier.p_ik is None for tier in test.tiers[:-1]):
        ways = {name: way for name, way in ways.items() if "without" not in name}
    return {
        "questions": len(test),
        "tiers": [judging.tier_report(tier, gate) for tier, gate in zip(test.tiers, [*gates, None], strict=True)],
        "chains": {
            name: judging.chain_report(test, way) | {"at_equal_cost": judging.at_equal_cost(test, way, found)}
            for name, way in ways.items()
        },
        "oracle": judging.oracle_report(test),
        "curves": {curve.name: judging.curve_report(test, curve) for curve in found},
        "sweep": judging.sweep(test, paper),
        "others": {
            name: {
                "chosen": judging.other_questions(other, test, gates),
                "paper": judging.other_questions(other, test, paper),
            }
            for name, other in others.items()
        },
    }


def chosen_report(chosen: Chosen) -> dict[str, Any]:
    """Chosen gates, for JSON."""
    return {
        "gates": [judging.gate_report(gate) for gate in chosen.gates],
        "accuracy": dataclasses.asdict(chosen.accuracy),
        "difference": dataclasses.asdict(chosen.difference),
        "cost": dataclasses.asdict(chosen.cost),
        "considered": chosen.considered,
    }


def format_evaluation(report: dict[str, Any]) -> str:
    """The report of `evaluate` for people."""
    lines = [f"{report['questions']} test questions"]
    for tier in report["tiers"]:
        low, high = tier["accuracy_interval"]
        lines.append(f"  {tier['name']:<24} {tier['accuracy']:.2%} right ({low:.2%} to {high:.2%})")
    lines.append(f"  {'oracle':<24} {report['oracle']['accuracy']:.2%} right")
    lines.append(
        f"{'chain':<26} {'right':>7}  {'beside largest, points':<26}{'saved, all passes':<28}{'as the paper counts'}"
    )
    for name, chain in report["chains"].items():
        saved, by_paper = (percent_text(chain[key]) for key in ("saved", "saved_by_paper"))
        lines.append(
            f"  {name:<24} {chain['accuracy']:>7.2%}  {points_text(chain['difference']):<26}{saved:<28}{by_paper}"
        )
    for name, other in report["chains"]["chosen"]["at_equal_cost"].items():
        lines.append(f"  chosen beside {name:<22} at equal cost: {points_text(other['ahead'])} points")
    for name, other in report["others"].items():
        one = other["chosen"]
        lines.append(
            f"  {name}: {one['kept']:.2%} kept of {one['questions']}, of test questions {one['kept_usually']:.2%}"
        )
    return "\n".join(lines)


def points_text(estimate: Mapping[str, Any]) -> str:
    """A difference of shares in points of a hundred, with its interval."""
    low, high = estimate["interval"]
    return f"{100 * estimate['value']:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"


def percent_text(estimate: Mapping[str, Any]) -> str:
    """A share in percent, with its interval."""
    low, high = estimate["interval"]
    return f"{100 * estimate['value']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
