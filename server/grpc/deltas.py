"""What a growing output has gained since it was last looked at."""

from __future__ import annotations

from dataclasses import dataclass

from jaxdual.outputs import CompletionOutput, Logprob, RequestOutput


@dataclass(frozen=True, slots=True)
class Delta:
    """What an output has gained.

    Attributes:
      output: the output as a whole.
      text, token_ids, logprobs: the new part of each.
      finished: whether this is its last delta.
    """

    output: CompletionOutput
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finished: bool


class Deltas:
    """Cuts the outputs of a request into parts, each given once.

    Args:
      count: outputs of the request.
    """

    def __init__(self, count: int) -> None:
        self._text = [0] * count
        self._tokens = [0] * count
        self._finished = [False] * count

    def take(self, request: RequestOutput) -> list[Delta]:
        """Deltas of those outputs that have grown or ended since the last call."""
        deltas = []
        for i, output in enumerate(request.outputs):
            text, tokens = self._text[i], self._tokens[i]
            finished = output.finish_reason is not None
            if finished == self._finished[i] and text == len(output.text) and tokens == len(output.token_ids):
                continue
            logprobs = None if output.logprobs is None else output.logprobs[tokens:]
            deltas.append(Delta(output, output.text[text:], output.token_ids[tokens:], logprobs, finished))
            self._text[i], self._tokens[i], self._finished[i] = len(output.text), len(output.token_ids), finished
        return deltas
