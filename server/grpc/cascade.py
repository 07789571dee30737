"""What a request asks of a cascade, and its decision, as messages of jaxdual.v1."""

from __future__ import annotations

from typing import Any

from jaxdual.cascade.decision import Decision, Hop
from jaxdual.cascade.options import CascadeOptions, options_from_json
from server.proto.jaxdual.v1 import inference_pb2 as pb


def cascade_options(request: pb.GenerateRequest) -> CascadeOptions | None:
    """What a request asks of a cascade; None if it has no such field.

    Raises:
      CascadeRequestError: values that can't be used.
    """
    if not request.HasField("cascade"):
        return None
    given: dict[str, Any] = {field.name: value for field, value in request.cascade.ListFields()}
    if "letters" in given:
        given["letters"] = list(given["letters"])
    return options_from_json(given)


def decision_message(decision: Decision) -> pb.CascadeDecision:
    """A decision; what is None is absent."""
    return pb.CascadeDecision(
        tier=decision.tier,
        reason=decision.reason,
        p_ik=decision.p_ik,
        p_t=decision.p_t,
        hops=[_hop(hop) for hop in decision.hops],
        flops=decision.flops,
        price_usd=decision.price,
    )


def _hop(hop: Hop) -> pb.CascadeHop:
    spent = hop.spent
    return pb.CascadeHop(
        tier=hop.tier,
        outcome=hop.outcome,
        p_ik=hop.p_ik,
        p_t=hop.p_t,
        prompt_tokens=spent.prompt_tokens,
        output_tokens=spent.output_tokens,
        lower_tokens=spent.work.lower,
        upper_tokens=spent.work.upper,
        flops=spent.flops,
        seconds=spent.seconds,
        price_usd=spent.price,
    )
