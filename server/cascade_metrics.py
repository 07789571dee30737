"""Prometheus metrics of a cascade: who answers, what is handed on and why, and what all of it takes."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

from jaxdual.cascade.decision import Decision
from jaxdual.cascade.serving.service import CascadeLLM

_PARTS = tuple(step / 20 for step in range(1, 20))
_LABELS = ("model_name", "tier")


class CascadeMetrics:
    """Counts a cascade's decisions.

    Args:
      cascade: whose.
      registry: where the metrics go.
    """

    def __init__(self, cascade: CascadeLLM, registry: CollectorRegistry) -> None:
        self._model = cascade.served_model_name
        prefix = "jaxdual:cascade_"
        self._requests = Counter(
            f"{prefix}requests",
            "Requests by the tier that answered, and why it did, or why none has.",
            (*_LABELS, "reason"),
            registry=registry,
        )
        self._escalations = Counter(
            f"{prefix}escalations",
            "Turns of tiers without an answer, by cause.",
            (*_LABELS, "cause"),
            registry=registry,
        )
        self._flops = Counter(
            f"{prefix}flops",
            "2 N for each token: of all passes, or of those that answered, as the paper counts.",
            (*_LABELS, "accounting"),
            registry=registry,
        )
        self._price = Counter(
            f"{prefix}price_usd", "USD by the tiers' prices, likewise.", (*_LABELS, "accounting"), registry=registry
        )
        self._p_ik, self._p_t = (
            Histogram(f"{prefix}{name}", text, _LABELS, registry=registry, buckets=_PARTS)
            for name, text in (
                ("p_ik", "P(IK) of prompts, as gates compare it."),
                ("p_t", "P(T) of answers, as gates compare it."),
            )
        )
        cascade.on_decision(self._count)

    def _count(self, decision: Decision) -> None:
        self._requests.labels(self._model, decision.tier, decision.reason).inc()
        for hop in decision.hops:
            answered = hop.outcome == "answered"
            if not answered:
                self._escalations.labels(self._model, hop.tier, hop.outcome).inc()
            for counter, amount in ((self._flops, hop.spent.flops), (self._price, hop.spent.price)):
                if amount is None:  # not known, which is not nothing
                    continue
                for accounting in ("all_passes", "answering_pass") if answered else ("all_passes",):
                    counter.labels(self._model, hop.tier, accounting).inc(amount)
            for histogram, p in ((self._p_ik, hop.p_ik), (self._p_t, hop.p_t)):
                if p is not None:
                    histogram.labels(self._model, hop.tier).observe(p)
