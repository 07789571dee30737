"""What a batch run of a cascade reports: who answered, and what all tiers took for it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from jaxdual.cascade.config import LocalTier, TierConfig
from jaxdual.cascade.decision import Decision, Hop
from jaxdual.cascade.serving.service import CascadeLLM
from jaxdual.offline.report import package_versions, rate, rows_of_text, shown_milliseconds, summary
from jaxdual.offline.runner import Totals


@dataclass(slots=True)
class Account:
    """What turns of a tier have taken together; `flops` and `price_usd` are None once one of them is not known."""

    turns: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    lower_tokens: int = 0
    upper_tokens: int = 0
    flops: int | None = 0
    price_usd: float | None = 0.0

    def add(self, hop: Hop) -> None:
        """Counts a turn."""
        spent = hop.spent
        self.turns += 1
        self.prompt_tokens += spent.prompt_tokens
        self.output_tokens += spent.output_tokens
        self.lower_tokens += spent.work.lower
        self.upper_tokens += spent.work.upper
        self.flops = None if self.flops is None or spent.flops is None else self.flops + spent.flops
        if spent.prompt_tokens:  # it has run
            known = None if self.price_usd is None or spent.price is None else self.price_usd + spent.price
            self.price_usd = known


@dataclass(slots=True)
class TierTotals:
    """Of one tier: all its turns, those that gave the answer, and how turns went."""

    all_passes: Account = field(default_factory=Account)
    answering_pass: Account = field(default_factory=Account)
    outcomes: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)


class CascadeTotals:
    """Sums decisions up, by tier."""

    def __init__(self) -> None:
        self.tiers: dict[str, TierTotals] = {}

    def add(self, decision: Decision) -> None:
        """Counts a request."""
        for hop in decision.hops:
            tier = self.tiers.setdefault(hop.tier, TierTotals())
            tier.all_passes.add(hop)
            tier.outcomes[hop.outcome] += 1
        tier = self.tiers[decision.tier]
        tier.answering_pass.add(decision.hops[-1])
        tier.reasons[decision.reason] += 1


def cascade_report(
    cascade: CascadeLLM, decided: CascadeTotals, totals: Totals, wall_seconds: float, startup_seconds: float
) -> dict[str, Any]:
    """The report as JSON data, in the form of `build_report`, with the account of each tier.

    FLOPs are 2 N for each token. "answering_pass" leaves out the passes of tiers that have handed a prompt on, as the
    paper does; "all_passes" is what the run has taken.
    """
    return {
        "model": cascade.served_model_name,
        "requests": {"ok": totals.ok, "failed": totals.failed, "skipped": totals.skipped},
        "tokens": {"prompt": totals.prompt_tokens, "completion": totals.completion_tokens},
        "seconds": {"wall": wall_seconds, "startup": startup_seconds},
        "throughput": {
            "requests_per_s": rate(totals.ok, wall_seconds),
            "prompt_tokens_per_s": rate(totals.prompt_tokens, wall_seconds),
            "generation_tokens_per_s": rate(totals.completion_tokens, wall_seconds),
        },
        "ttft_s": summary(totals.ttft),
        "latency_s": summary(totals.latency),
        "tiers": [_tier(cascade, tier, decided.tiers.get(tier.name, TierTotals())) for tier in cascade.config.tiers],
        "cascade": {
            "max_hops": cascade.config.max_hops,
            "skip_if_pik_below": cascade.config.skip_if_pik_below,
            "confidence": dataclasses.asdict(cascade.config.confidence),
        },
        "versions": package_versions(),
    }


def format_cascade_report(report: dict[str, Any]) -> str:
    """The report as a table for people."""
    requests, tokens, seconds, throughput = (report[key] for key in ("requests", "tokens", "seconds", "throughput"))
    rows = [
        ("model", f"{report['model']}, a cascade of {len(report['tiers'])} tiers"),
        ("requests", f"{requests['ok']} ok, {requests['failed']} failed, {requests['skipped']} done before"),
        ("tokens", f"{tokens['prompt']} prompt, {tokens['completion']} completion"),
        ("throughput", f"{throughput['requests_per_s']:.1f} requests/s"),
        ("time to first token", shown_milliseconds(report["ttft_s"])),
        ("latency", shown_milliseconds(report["latency_s"])),
    ]
    for tier in report["tiers"]:
        whole, answering = tier["all_passes"], tier["answering_pass"]
        parts = [f"{answering['turns']} of {whole['turns']} turns answered"]
        parts += [f"{count} {outcome}" for outcome, count in tier["outcomes"].items() if outcome != "answered"]
        if whole["flops"] is not None:
            parts.append(f"{whole['flops'] / 1e9:.3g} GFLOPs ({(answering['flops'] or 0) / 1e9:.3g} of answers)")
        if whole["price_usd"]:
            parts.append(f"{whole['price_usd']:.6f} USD")
        rows.append((f"tier {tier['name']}", ", ".join(parts)))
    rows.append(("time", f"{seconds['wall']:.1f} s, and {seconds['startup']:.1f} s start-up before"))
    return rows_of_text(rows)


def _tier(cascade: CascadeLLM, tier: TierConfig, totals: TierTotals) -> dict[str, Any]:
    told: dict[str, Any] = {
        "name": tier.name,
        "outcomes": dict(totals.outcomes),
        "reasons": dict(totals.reasons),
        "all_passes": dataclasses.asdict(totals.all_passes),
        "answering_pass": dataclasses.asdict(totals.answering_pass),
    }
    if not isinstance(tier, LocalTier):
        return told | {"url": tier.url, "model": tier.model, "parameters": tier.parameters}
    info = cascade.engines[tier.name].info
    return told | {
        "parameters": info.layer_sizes.parameters,
        "layers": info.layer_sizes.layers,
        "tap": info.layer_sizes.tap,
        "device": info.device,
        "engine": dataclasses.asdict(tier.engine),
    }
