"""One request's way through the tiers of a cascade: no clock, no input or output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxdual.cascade.decision import NOTHING_SPENT, Decision, Failure, Hop, Reason, Spent
from jaxdual.cascade.gate import Gate, Verdict


@dataclass(frozen=True, slots=True)
class Step:
    """Whose turn it is.

    Attributes:
      tier: number of the tier, 0 for the smallest.
      gate: that its answer has to pass; None where it answers whatever it is.
      reason: why it would be the one that answers.
    """

    tier: int
    gate: Gate | None
    reason: Reason


class Route:
    """Where a request goes next.

    It begins at the smallest tier and goes on to the next larger one whenever a gate refuses (Chen, Chen and Yen, 2026,
    section 3), with these additions. A tier that can't answer is passed over. After `max_hops` escalations the tier
    that was reached answers; after a P(IK) below `skip_if_pik_below`, the last one. If nothing larger can answer, the
    largest tier that can does, whatever its gate says.

    Args:
      tiers: names, smallest first.
      gates: of each tier; that of the last one is not asked.
      max_hops: escalations at most; None for no limit.
      skip_if_pik_below: see `CascadeConfig`.
    """

    def __init__(
        self,
        tiers: Sequence[str],
        gates: Sequence[Gate | None],
        *,
        max_hops: int | None = None,
        skip_if_pik_below: float = 0.0,
    ) -> None:
        if not tiers or len(gates) != len(tiers):
            raise ValueError(f"{len(tiers)} tiers and {len(gates)} gates: there must be a tier, and one gate for each")
        if None in gates[:-1]:
            raise ValueError(f"gates={gates!r}: every tier but the last needs one")
        self._tiers, self._gates = tuple(tiers), tuple(gates)
        self._hops_left = len(tiers) if max_hops is None else max_hops
        self._skip_below = skip_if_pik_below
        self._lost: set[int] = set()
        self._hops: list[Hop] = []
        self.step: Step | None = self._climb(0)

    @property
    def hops(self) -> Sequence[Hop]:
        """Turns so far."""
        return self._hops

    def refused(self, verdict: Verdict, spent: Spent = NOTHING_SPENT) -> None:
        """The tier's gate has refused."""
        step = self._now()
        if step.gate is None or verdict.refused_by is None:
            raise ValueError(f"tier {self._tiers[step.tier]!r} has no gate that could refuse with {verdict}")
        self._hops.append(Hop(self._tiers[step.tier], verdict.refused_by, verdict.p_ik, verdict.p_t, spent))
        self._hops_left -= 1
        if verdict.p_ik is not None and verdict.p_ik < self._skip_below:
            self.step = self._climb(len(self._tiers) - 1, "skip")
        else:
            self.step = self._climb(step.tier + 1)

    def lost(self, failure: Failure, spent: Spent = NOTHING_SPENT) -> None:
        """The tier can't answer, this time."""
        step = self._now()
        self._hops.append(Hop(self._tiers[step.tier], failure, spent=spent))
        self._lost.add(step.tier)
        self.step = self._climb(step.tier + 1, step.reason)

    def answered(self, verdict: Verdict | None, spent: Spent = NOTHING_SPENT) -> Decision:
        """The tier answers; of a gate that has let it pass there is a verdict. May be told again, with more spent."""
        step = self._now()
        p_ik, p_t = (None, None) if verdict is None else (verdict.p_ik, verdict.p_t)
        name = self._tiers[step.tier]
        return Decision(name, step.reason, (*self._hops, Hop(name, "answered", p_ik, p_t, spent)))

    def ended(self, spent: Spent = NOTHING_SPENT) -> Decision:
        """There is no answer: the request was ended in this tier's turn, or no tier is left."""
        if self.step is None:
            return Decision(self._hops[-1].tier, "failed", tuple(self._hops))
        name = self._tiers[self.step.tier]
        return Decision(name, "aborted", (*self._hops, Hop(name, "aborted", spent=spent)))

    def _climb(self, tier: int, reason: Reason = "confident") -> Step | None:
        """The turn of this tier or the next larger one that can answer."""
        for number in range(tier, len(self._tiers)):
            if number in self._lost:
                continue
            if number == len(self._tiers) - 1:
                return Step(number, None, "skip" if reason == "skip" else "last")
            if self._hops_left <= 0:
                return Step(number, None, "max_hops")
            return Step(number, self._gates[number], "confident")
        return self._fall()

    def _fall(self) -> Step | None:
        """The turn of the largest tier that is left."""
        left = set(range(len(self._tiers))) - self._lost
        return Step(max(left), None, "fallback") if left else None

    def _now(self) -> Step:
        if self.step is None:
            raise ValueError("no tier is left: the way has ended")
        return self.step
