"""One question's way through the tiers: asking them, and what becomes of those that can't answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

from jaxdual.cascade.decision import Decision, Failure
from jaxdual.cascade.gate import Verdict
from jaxdual.cascade.serving.route import Route
from jaxdual.cascade.serving.stream import CascadeStream, UnderWay, first_verdict
from jaxdual.cascade.serving.tiers import Question, Tier
from jaxdual.errors import EngineDeadError, NotServingError, PromptTooLongError, QueueFullError
from jaxdual.outputs import RequestOutput

# What a request is told that no tier answers: the first of these that one of them gave as its reason.
_TOLD_FIRST = (QueueFullError, NotServingError, PromptTooLongError)


async def ask(
    tiers: Sequence[Tier],
    question: Question,
    route: Route,
    under_way: UnderWay,
    on_end: Callable[[CascadeStream], None],
) -> CascadeStream:
    """Asks tiers in the order of a route until one answers.

    Args:
      tiers: smallest first.
      question: what they are asked.
      route: of the question; it is told what becomes of each turn.
      under_way: is told of the tier that the question is in.
      on_end: see `CascadeStream`.

    Returns:
      The answer's stream, with its first token there, or with its end.

    Raises:
      QueueFullError, NotServingError, PromptTooLongError, EngineDeadError: no tier can answer.
    """
    errors: list[Exception] = []
    while (step := route.step) is not None:
        tier, began = tiers[step.tier], time.monotonic()
        try:
            stream = await tier.begin(question, step.gate)
        except (QueueFullError, NotServingError, PromptTooLongError) as error:
            errors.append(error)
            route.lost(_failure_of(error))
            continue
        under_way.enter(stream)
        try:
            verdict = await first_verdict(stream, step.gate)
        except BaseException:
            stream.close()
            raise
        output, seconds = stream.output, time.monotonic() - began
        if output.outputs[0].finish_reason == "error":
            errors.append(EngineDeadError(f"tier {tier.name!r}: {output.outputs[0].error or 'it failed'}"))
            route.lost(tier.failure(stream), tier.spent(output, seconds))
        elif verdict is not None and not verdict.passed:
            route.refused(verdict, tier.spent(output, seconds, verdict.judged))
        else:
            output.metrics.arrival_time = under_way.arrival
            decide = partial(_decided, route, verdict, tier, output, began)
            if output.outputs[0].finish_reason == "abort":
                decide = partial(_aborted, route, tier, output, began)
            return CascadeStream(stream, decide, on_end)
    raise told(errors)


def told(errors: Sequence[Exception]) -> Exception:
    """What a request is told whose tiers have all failed."""
    for kind in _TOLD_FIRST:
        for error in errors:
            if isinstance(error, kind):
                return error
    return errors[-1]


def _decided(route: Route, verdict: Verdict | None, tier: Tier, output: RequestOutput, began: float) -> Decision:
    return route.answered(verdict, tier.spent(output, time.monotonic() - began))


def _aborted(route: Route, tier: Tier, output: RequestOutput, began: float) -> Decision:
    return route.ended(tier.spent(output, time.monotonic() - began))


def _failure_of(error: Exception) -> Failure:
    if isinstance(error, PromptTooLongError):
        return "too_long"
    return "queue_full" if isinstance(error, QueueFullError) else "unavailable"
