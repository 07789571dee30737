"""What the paper of Sparsity Induction claims, beside what was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bench.pruning.quality import INDUCED, Run
from bench.report import table
from bench.summary import Summary

HOLDS, FAILS, NOISE = "holds", "doesn't hold", "within noise"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of one claim.

    Attributes:
      claim: what the paper says.
      measured: figures, as text.
      verdict: `HOLDS`, `FAILS` or `NOISE`.
    """

    claim: str
    measured: str
    verdict: str


def perplexities(runs: Sequence[Run], pattern: str, pruner: str, *, induced: bool) -> list[float]:
    """Of one arm, by seed."""
    chosen = [run for run in runs if (run.pattern, run.pruner, run.induced) == (pattern, pruner, induced)]
    return [run.perplexity for run in sorted(chosen, key=lambda run: run.seed)]


def change(values: Sequence[float], base: Sequence[float]) -> Summary:
    """Relative change of perplexities in percent, seed by seed, with its 95 % interval."""
    return Summary.of([100 * (one / other - 1) for one, other in zip(values, base, strict=True)])


def gain(runs: Sequence[Run], pattern: str, pruner: str) -> Summary:
    """What learned scales change of a pruner's perplexity, in percent."""
    return change(perplexities(runs, pattern, pruner, induced=True), perplexities(runs, pattern, pruner, induced=False))


def verdicts(runs: Sequence[Run], patterns: Sequence[str], refresh: float) -> list[Verdict]:
    """One for each claim of the paper that a model of any size can speak to.

    Args:
      runs: at least two seeds of each arm.
      patterns: that were pruned to.
      refresh: times that a refresh from kept statistics is faster than one with them taken anew.
    """
    found = []
    for pruner in INDUCED:
        for pattern in patterns:
            one = gain(runs, pattern, pruner)
            found.append(Verdict(f"{pattern}: lower perplexity than {pruner} alone", _percent(one), _less(one)))
    for pattern in patterns:
        logs = {
            pruner: [
                math.log(after / before)
                for after, before in zip(
                    perplexities(runs, pattern, pruner, induced=True),
                    perplexities(runs, pattern, pruner, induced=False),
                    strict=True,
                )
            ]
            for pruner in INDUCED
        }
        most = Summary.of(
            [
                100 * (one - min(others))
                for one, *others in zip(logs["magnitude"], logs["wanda"], logs["sparsegpt"], strict=True)
            ]
        )
        found.append(Verdict(f"{pattern}: magnitude gains most", f"{_percent(most)} beside the next best", _less(most)))
        ahead = change(
            perplexities(runs, pattern, "magnitude", induced=True), perplexities(runs, pattern, "wanda", induced=False)
        )
        found.append(
            Verdict(
                f"{pattern}: magnitude with it stays behind Wanda without (all of table 1)",
                _percent(ahead),
                _more(ahead),
            )
        )
    found.append(
        Verdict(
            "a refresh of scores is 22.65 times faster (20 asked for)",
            f"{refresh:.0f} times",
            HOLDS if refresh >= 20 else FAILS,
        )
    )
    return found


def _less(summary: Summary) -> str:
    low, high = summary.interval or (-math.inf, math.inf)
    return HOLDS if high < 0 else FAILS if low > 0 else NOISE


def _more(summary: Summary) -> str:
    low, high = summary.interval or (-math.inf, math.inf)
    return HOLDS if low > 0 else FAILS if high < 0 else NOISE


def _percent(summary: Summary) -> str:
    return f"{summary.text('{:+.2f}')} %"


def tables(runs: Sequence[Run], patterns: Sequence[str], dense: float) -> str:
    """Perplexities of all arms, and what learned scales change."""
    pruners = list(dict.fromkeys(run.pruner for run in runs))
    rows: list[list[object]] = [["none (dense)", *[f"{dense:.3f}" for _ in patterns]]]

    def cells(pruner: str, *, induced: bool) -> list[str]:
        found = [perplexities(runs, pattern, pruner, induced=induced) for pattern in patterns]
        return [Summary.of(values).text("{:.3f}") for values in found]

    for pruner in pruners:
        rows.append([pruner, *cells(pruner, induced=False)])
        if pruner in INDUCED:
            rows.append([f"{pruner} + SI", *cells(pruner, induced=True)])
            rows.append(["  change", *[_percent(gain(runs, one, pruner)) for one in patterns]])
    return table(["perplexity", *patterns], rows)
