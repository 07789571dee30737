"""What is asked of the cascade and what its paper claims, beside what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bench.cascade.asked import NONE_RIGHT, UNKNOWN_TOWNS
from bench.cascade.measure import RATIOS, summary_of
from bench.report import table
from bench.summary import Summary
from jaxdual.cascade.evaluation.report import percent_text, points_text

MET, MISSED, OPEN = "met", "not met", "met, but its interval says less"
HOLDS, FAILS, NOISE = "holds", "doesn't hold", "within noise"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of one claim.

    Attributes:
      claim: what is asked for, or what the paper says.
      measured: figures, as text.
      verdict: one of the above.
    """

    claim: str
    measured: str
    verdict: str


def requirements(report: Mapping[str, Any]) -> list[Verdict]:
    """One for each thing that is asked of the cascade, with thresholds chosen on validation questions."""
    judged = report["multiple_choice"]
    chosen = judged["chains"]["chosen"]
    small = judged["tiers"][0]
    equal = chosen["at_equal_cost"]
    found = [
        _least("accuracy within 1 point of the larger model", chosen["difference"], -0.01, points_text),
        _least("at least 20 % less compute, all passes", chosen["saved"], 0.20, percent_text),
        _least("at least 40 % less by the paper's count", chosen["saved_by_paper"], 0.40, percent_text),
        *(
            _ahead(f"more accurate than {name} at equal compute", equal[name]["ahead"])
            for name in ("random model", "random gate", "margin", "entropy")
        ),
    ]
    share = _random_at_share(report)
    ahead = 100 * (chosen["accuracy"] - share)
    found.append(_plain("3 points above a random gate that keeps as many", f"{ahead:+.2f} points", ahead >= 3))
    p_t, p_ik = small["p_t"], small["p_ik"]["quality"]
    found += [
        _plain("AUROC of P(T) above 0.7", f"{p_t['auroc']:.3f}", p_t["auroc"] > 0.7),
        _plain("AUROC of P(IK) above 0.7", f"{p_ik['auroc']:.3f}", p_ik["auroc"] > 0.7),
        _plain("APGR of P(T) above 0.6", *_above(judged["curves"]["P(T)"]["apgr"], 0.6)),
        _plain(
            "AUROC of a probe of shuffled labels 0.40 to 0.60",
            f"{report['control']['quality']['auroc']:.3f}",
            0.4 <= report["control"]["quality"]["auroc"] <= 0.6,
        ),
    ]
    lowest = min(judged["sweep"], key=lambda point: point["above_line"]["value"])
    found.append(
        _plain(
            "every threshold of P(T) on the line between the models or above it",
            f"lowest at {lowest['tau_t']}: {points_text(lowest['above_line'])} points",
            lowest["above_line"]["value"] >= 0,
        )
    )
    for name in (NONE_RIGHT, UNKNOWN_TOWNS):
        for way in ("chosen", "paper"):
            one = judged["others"][name][way]
            fall = one["fall"] or 0.0
            told = f"{one['kept']:.1%} in place of {one['kept_usually']:.1%}"
            found.append(_plain(f"{name}: a third fewer kept, {way} thresholds", told, fall >= 1 / 3))
    for way in ("chosen", "paper") if "engines" in report else ():
        one = report["engines"][way]
        told = f"{one['other_tier']} of {one['questions']} elsewhere; work {'equal' if one['equal'] else 'differs'}"
        met = one["equal"] and not one["other_tier"]
        found.append(_plain(f"engines decide and compute as the ledger says, {way} thresholds", told, met))
    return found


def claims(report: Mapping[str, Any]) -> list[Verdict]:
    """One for each claim of the paper that models of any size can speak to."""
    judged = report["multiple_choice"]
    paper, alone = judged["chains"]["paper"], judged["chains"]["paper without P(IK)"]
    found = [
        Verdict(
            "at 0.5 and 0.9, uncalibrated, compute is saved (by the paper's count) and little accuracy lost (table 1)",
            f"{points_text(paper['difference'])} points, {percent_text(paper['saved_by_paper'])}",
            HOLDS if paper["difference"]["interval"][1] > -0.01 and paper["saved_by_paper"]["value"] > 0 else FAILS,
        ),
        Verdict(
            "P(IK) lowers the loss (table 5)",
            f"{paper['pd_points']:+.2f} points with it, {alone['pd_points']:+.2f} without",
            _order(paper["pd_points"], alone["pd_points"]),
        ),
    ]
    loose = report["loose_thresholds"][-1]
    found.append(
        Verdict(
            "with P(IK), a loose threshold of P(T) loses little (table 15)",
            f"at 0.5: {loose['p_ik 0.5']['pd_points']:+.2f} points with P(IK) at 0.5, "
            f"{loose['p_ik 0.8']['pd_points']:+.2f} at 0.8, {loose['without']['pd_points']:+.2f} without",
            HOLDS if loose["p_ik 0.5"]["pd_points"] > loose["without"]["pd_points"] + 1 else FAILS,
        )
    )
    for ratio in RATIOS:
        one = report["assumed_ratios"][str(ratio)]["paper"]
        over = 100 * (one["saved_by_paper"]["value"] - one["saved"]["value"])
        found.append(
            Verdict(
                f"the paper's count overstates what is saved; sizes 1 to {ratio}",
                f"{percent_text(one['saved_by_paper'])} by its count, {percent_text(one['saved'])} of all passes",
                HOLDS if over > 0 else FAILS,
            )
        )
    opening = report["short_answers"]["tiers"][0]["p_t"]["auroc"]
    found.append(
        Verdict(
            "confidence in the opening tells right short answers from wrong ones (section 3.2)",
            f"AUROC {opening:.3f}" if opening is not None else "none",
            HOLDS if (opening or 0) > 0.6 else FAILS,
        )
    )
    return found


def tables(report: Mapping[str, Any]) -> str:
    """Everything that a document quotes, as text."""
    judged = report["multiple_choice"]
    parts = [
        table(
            ["model", "parameters of layers", "right", "P(T): AUROC", "ECE", "P(IK): AUROC", "ECE"],
            [_model_row(tier) for tier in judged["tiers"]],
        ),
        table(
            [
                "chain",
                "kept",
                "right",
                "beside the larger, points",
                "McNemar p",
                "less compute",
                "by the paper's count",
            ],
            [_chain_row(name, chain) for name, chain in judged["chains"].items()],
        ),
        table(
            ["at the chosen chain's compute", "right", "chain ahead, points"],
            [
                [name, f"{one['accuracy']:.4f}", points_text(one["ahead"])]
                for name, one in judged["chains"]["chosen"]["at_equal_cost"].items()
            ],
        ),
        table(
            ["rule", "kept", "right", "beside the larger, points", "McNemar p", "less compute", "by the paper's count"],
            [_chain_row(name, one["test"]) for name, one in report["variants"].items()],
        ),
        _seeds(report),
        table(
            ["requirement", "measured", "verdict"],
            [[one.claim, one.measured, one.verdict] for one in requirements(report)],
        ),
        table(["claim", "measured", "verdict"], [[one.claim, one.measured, one.verdict] for one in claims(report)]),
    ]
    return "\n\n".join(parts)


def _seeds(report: Mapping[str, Any]) -> str:
    seeds = report["seeds"]
    rows = [
        [name, Summary.of(summary_of(seeds, *path)).text()]
        for name, path in (
            ("P(IK): AUROC", ("probe", "quality", "auroc")),
            ("P(IK): ECE", ("probe", "quality", "ece")),
            ("chosen: right", ("chosen", "accuracy")),
            ("chosen: beside the larger", ("chosen", "difference", "value")),
            ("chosen: less compute", ("chosen", "saved", "value")),
            ("chosen: by the paper's count", ("chosen", "saved_by_paper", "value")),
        )
    ]
    return table([f"{len(seeds)} seeds of the probe", "mean (95 %)"], rows)


def _model_row(tier: Mapping[str, Any]) -> list[object]:
    p_ik = tier["p_ik"]
    return [
        tier["name"],
        tier["parameters"],
        f"{tier['accuracy']:.4f}",
        f"{tier['p_t']['auroc']:.3f}",
        f"{tier['p_t']['ece']:.3f}",
        "-" if p_ik is None else f"{p_ik['quality']['auroc']:.3f}",
        "-" if p_ik is None else f"{p_ik['quality']['ece']:.3f}",
    ]


def _chain_row(name: str, chain: Mapping[str, Any]) -> list[object]:
    return [
        name,
        f"{1 - chain['kept'][-1]:.1%}",
        f"{chain['accuracy']:.4f}",
        points_text(chain["difference"]),
        f"{chain['mcnemar']['exact_p']:.2g}",
        percent_text(chain["saved"]),
        percent_text(chain["saved_by_paper"]),
    ]


def _random_at_share(report: Mapping[str, Any]) -> float:
    """Accuracy of a gate that keeps as many questions as the chosen one by chance."""
    judged = report["multiple_choice"]
    kept = judged["chains"]["chosen"]["kept"][0]
    small, large = (tier["accuracy"] for tier in judged["tiers"])
    return float(kept * small + (1 - kept) * large)


def _least(claim: str, estimate: Mapping[str, Any], least: float, text: Any) -> Verdict:
    """Whether a figure reaches what is asked for, and whether all of its interval does."""
    verdict = MET if estimate["interval"][0] >= least else OPEN if estimate["value"] >= least else MISSED
    return Verdict(claim, text(estimate), verdict)


def _ahead(claim: str, estimate: Mapping[str, Any]) -> Verdict:
    low, _ = estimate["interval"]
    return Verdict(claim, points_text(estimate), MET if low > 0 else OPEN if estimate["value"] > 0 else MISSED)


def _plain(claim: str, measured: str, met: bool) -> Verdict:
    return Verdict(claim, measured, MET if met else MISSED)


def _above(value: float | None, least: float) -> tuple[str, bool]:
    return ("none", False) if value is None else (f"{value:.3f}", value > least)


def _order(more: float, less: float) -> str:
    return NOISE if abs(more - less) < 0.1 else HOLDS if more > less else FAILS
