"""The stream of a request that a tier of a cascade answers, and the request while tiers are asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from jaxdual.cascade.decision import Decision
from jaxdual.cascade.gate import Gate, Verdict
from jaxdual.outputs import RequestOutput
from jaxdual.request_stream import AnswerStream


class UnderWay:
    """A request, whichever tier it is in.

    Args:
      arrival: when it came, in seconds of the monotonic clock.
    """

    def __init__(self, arrival: float) -> None:
        self.arrival = arrival
        self._stream: AnswerStream | None = None
        self._aborted = False

    def enter(self, stream: AnswerStream) -> None:
        """The request is in another tier now."""
        self._stream = stream
        if self._aborted:
            stream.close()

    def abort(self) -> None:
        """Ends it, where it is and wherever it comes to."""
        self._aborted = True
        if self._stream is not None:
            self._stream.close()


async def first_verdict(stream: AnswerStream, gate: Gate | None) -> Verdict | None:
    """Reads until a tier has said whether it answers, by its gate or, without one, with its first token.

    Returns:
      The gate's verdict. Of an output that has ended in time to have none, as if the answer did not begin as it should;
      None without a gate, and for what ended by an error or was ended.
    """
    while True:
        output = await anext(stream)
        verdict, ended = output.verdict, output.outputs[0].finish_reason
        if gate is not None and verdict is not None and verdict.passed:
            return verdict
        if output.finished:
            break
        if gate is None and (output.outputs[0].token_ids or output.outputs[0].text):
            return None
    if gate is None or ended in ("error", "abort"):
        return None
    return verdict or Verdict("p_t", None, None)


class CascadeStream:
    """An `AnswerStream` whose output carries the decision; it begins with the first token there.

    Args:
      stream: of the tier that answers.
      decide: the decision, with what the tier has spent until now.
      on_end: called once, when the request has ended.
    """

    def __init__(
        self, stream: AnswerStream, decide: Callable[[], Decision], on_end: Callable[[CascadeStream], None]
    ) -> None:
        self._stream = stream
        self._decide = decide
        self._on_end = on_end
        self._is_first = True
        self._over = False
        self.output.decision = decide()

    @property
    def output(self) -> RequestOutput:
        """The output so far."""
        return self._stream.output

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._is_first:
            self._is_first = False
            output = self.output
        elif self._over:
            raise StopAsyncIteration
        else:
            output = await anext(self._stream)
        if output.finished:
            self._end()
        return output

    def close(self) -> None:
        """Ends the request, if it has not finished."""
        self._stream.close()
        self._end()

    def _end(self) -> None:
        if not self._over:
            self._over = True
            self.output.decision = self._decide()
            self._on_end(self)
