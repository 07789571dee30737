"""Which tier answered a request, why, and what each tier did for it: plain data."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxdual.cascade.gate import Refusal
from jaxdual.cascade.work import Work

# Why a tier has not answered, without having been asked or in spite of it.
Failure = Literal["unavailable", "timeout", "queue_full", "too_long", "failed"]
Outcome = Literal["answered", "aborted"] | Refusal | Failure
# Why the tier that answered did: its gate has let the prompt pass; it is the last one; the prompt had been handed on as
# often as may be, or at once for a very low P(IK); no larger one could. Of a request without an answer: its client has
# left before there was one, or all tiers have failed.
Reason = Literal["confident", "last", "max_hops", "skip", "fallback", "aborted", "failed"]
_DIGITS = 6  # of probabilities as they are shown: more are those of the arithmetic's order


@dataclass(frozen=True, slots=True)
class Spent:
    """What one tier has taken for a request.

    Attributes:
      work: tokens computed, by the part of the layers that they went through.
      flops: of that; None if the size of the model is not known.
      prompt_tokens, output_tokens: of the request, as this tier counts them, those that only its gate saw among them.
      seconds: from the tier's turn to its end.
      price: USD; None if the tier has no price.
    """

    work: Work = field(default_factory=Work)
    flops: int | None = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    seconds: float = 0.0
    price: float | None = None


NOTHING_SPENT = Spent()


@dataclass(frozen=True, slots=True)
class Hop:
    """One tier's turn.

    Attributes:
      tier: its name.
      outcome: "answered", which half of its gate has refused, or why it could not answer.
      p_ik, p_t: as its gate compared them; None where it did not come to that.
      spent: what it took.
    """

    tier: str
    outcome: Outcome
    p_ik: float | None = None
    p_t: float | None = None
    spent: Spent = NOTHING_SPENT


@dataclass(frozen=True, slots=True)
class Decision:
    """Who answered a request.

    Attributes:
      tier: name of the tier that did; without an answer, of the last one that was asked.
      reason: why it did.
      hops: turns of all tiers, in their order; the last one is that of the answer.
    """

    tier: str
    reason: Reason
    hops: tuple[Hop, ...]

    @property
    def p_ik(self) -> float | None:
        """P(IK) of the tier that answered; None where it was not asked for."""
        return self.hops[-1].p_ik

    @property
    def p_t(self) -> float | None:
        """Likewise P(T)."""
        return self.hops[-1].p_t

    @property
    def flops(self) -> int | None:
        """Of all passes; None if that of a tier is not known."""
        return _sum(hop.spent.flops for hop in self.hops)

    @property
    def price(self) -> float | None:
        """USD of all passes; None if a tier that ran has no price."""
        prices = [hop.spent.price for hop in self.hops if hop.spent.prompt_tokens]
        return None if None in prices or not prices else math.fsum(price for price in prices if price is not None)

    def as_json(self, *, measured: bool = True) -> dict[str, Any]:
        """The decision as responses show it.

        Args:
          measured: with what depends on the time and on what else ran; without it, the same request has the same one.
        """
        shown: dict[str, Any] = {
            "tier": self.tier,
            "reason": self.reason,
            "p_ik": _rounded(self.p_ik),
            "p_t": _rounded(self.p_t),
            "hops": [_hop_json(hop, measured) for hop in self.hops],
        }
        return shown | {"flops": self.flops, "price_usd": self.price} if measured else shown


def _hop_json(hop: Hop, measured: bool) -> dict[str, Any]:
    spent = hop.spent
    shown = {
        "tier": hop.tier,
        "outcome": hop.outcome,
        "p_ik": _rounded(hop.p_ik),
        "p_t": _rounded(hop.p_t),
        "prompt_tokens": spent.prompt_tokens,
        "output_tokens": spent.output_tokens,
    }
    if not measured:
        return shown
    return shown | {
        "lower_tokens": spent.work.lower,
        "upper_tokens": spent.work.upper,
        "flops": spent.flops,
        "seconds": round(spent.seconds, _DIGITS),
        "price_usd": spent.price,
    }


def _rounded(p: float | None) -> float | None:
    return None if p is None else round(p, _DIGITS)


def _sum(values: Iterable[int | None]) -> int | None:
    total = 0
    for value in values:
        if value is None:
            return None
        total += value
    return total
