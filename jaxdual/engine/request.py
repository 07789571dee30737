"""Messages between a front and an engine: plain data, tokens only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxdual.cascade.gate import Gate, Verdict
from jaxdual.cascade.work import Work
from jaxdual.decoding.dysco import Dysco
from jaxdual.sampling_params import SamplingParams
from jaxdual.scheduling.plan import FinishReason


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position: of the token there, its rank, and the likeliest tokens with theirs."""

    chosen: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to complete.

    Attributes:
      request_id: unique among unfinished requests.
      prompt_token_ids: at least one token.
      params: how to sample; `max_tokens` is set.
      arrival: seconds of the monotonic clock.
      priority: smaller goes first.
      user: who asks, so that a rank may be chosen that knows the beginning of it; None if that is not known.
      salt: keeps its cached blocks apart from those of requests with another salt.
      resumed: of a request that was under way in an engine that is gone, the tokens that each output had; None for an
        output that has ended. Empty for a new request.
      dysco: what `params.dysco` means for this prompt.
      gate: refuses the request where the model is not sure enough; of one output, which then ends as "refused".
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    arrival: float
    priority: int = 0
    user: str | None = None
    salt: bytes = b""
    resumed: tuple[tuple[int, ...] | None, ...] = ()
    dysco: Dysco | None = None
    gate: Gate | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """Memory of another engine that the keys and values of a prompt are to be written to.

    Attributes:
      peer: address of the KV agent that may write them.
      address, descriptor: of the KV agent whose memory it is, and of that memory.
      firsts: in each layer group, number of the first block that is wanted.
      offsets: in each layer group, where that block and all after it go, in bytes.
    """

    peer: str
    address: str
    descriptor: bytes
    firsts: tuple[int, ...]
    offsets: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Hits:
    """Leading blocks of a prompt that are read from the store instead of computed.

    Attributes:
      here: how many the prefill engine reads, the first ones.
      there: how many of those behind them the decode engine reads, to where the prompt's blocks go.
    """

    here: int = 0
    there: int = 0


@dataclass(frozen=True, slots=True)
class Selection:
    """What a step of a sequence has selected for raised attention.

    Attributes:
      position: of the token of the step.
      selected: positions, ascending, before template tokens are left out and the token itself is added.
      relevance: of all tokens so far, as bytes of float32.
    """

    position: int
    selected: list[int]
    relevance: bytes


@dataclass(slots=True)  # not frozen: one is made for every token, and frozen ones take four times as long to make
class TokenEvent:
    """One step forward of one output of a request.

    Attributes:
      request_id, index: the output.
      token: the new token; None if the output ends without one.
      logprobs: of the token, if wanted.
      finish_reason: set on the last event of the output.
      stop_token: the stop token that ended it, which is the last token.
      cached_tokens: tokens of the prompt that came from the prefix cache.
      prompt_logprobs: on the first event of a request that wants them: of all prompt tokens but the first.
      queue_seconds, allocation_seconds, read_seconds: on the first token of an output: how long it waited before it
        ran for its turn, for memory of a decode engine, and for stored blocks.
      error: what went wrong, where `finish_reason` is "error".
      selections: of the steps since the last event, where they are wanted.
      verdict: of the request's gate, once it is known.
      work: on the last event of an output: what was computed for it.
    """

    request_id: str
    index: int
    token: int | None
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    queue_seconds: float | None = None
    allocation_seconds: float | None = None
    read_seconds: float | None = None
    error: str | None = None
    selections: tuple[Selection, ...] = ()
    verdict: Verdict | None = None
    work: Work | None = None
