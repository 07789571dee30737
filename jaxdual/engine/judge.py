"""What the gate of one request has heard so far, and the events that wait for its verdict."""

from __future__ import annotations

from collections.abc import Sequence

from jaxdual.cascade.gate import Gate, Verdict
from jaxdual.engine.request import TokenEvent


class Judge:
    """Asks a gate as soon as it can say something.

    Args:
      gate: of the request.

    Attributes:
      p_ik: once the probe was asked.
      withheld: events that nobody sees if the request is refused.
    """

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.p_ik: float | None = None
        self.withheld: list[TokenEvent] = []
        self._logprobs: list[Sequence[float]] = []

    @property
    def watched(self) -> tuple[tuple[int, ...], ...]:
        """Token ids whose log-probabilities are wanted, at each of the first positions of the output."""
        confidence = self.gate.confidence
        if confidence is None:
            return ()
        return tuple(confidence.watched(position) for position in range(confidence.positions))

    def after_prompt(self, p_ik: float | None) -> Verdict | None:
        """See `Gate.after_prompt`."""
        self.p_ik = p_ik
        return self.gate.after_prompt(p_ik)

    def after_token(self, token: int, logprobs: Sequence[float], *, last: bool) -> Verdict | None:
        """The verdict after the next token of the output; None where P(T) is not known yet.

        Where the output leaves the opening that is demanded, P(T) is that of the opening up to there, and no less.

        Args:
          token: that was sampled.
          logprobs: of the watched tokens at its position.
          last: whether the output ends with it.
        """
        confidence = self.gate.confidence
        if confidence is None:
            return None
        left = token not in confidence.watched(len(self._logprobs))
        self._logprobs.append(logprobs)
        if len(self._logprobs) < confidence.positions and not left and not last:
            return None
        return self.gate.after_answer(self.p_ik, confidence.p_t(self._logprobs), len(self._logprobs))
