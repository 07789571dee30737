"""What a cluster keeps of a request, and of each time that it was given to a pair of engines."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from jaxdual.decoding.dysco import first_observed
from jaxdual.engine.request import Hits, Request, Target
from jaxdual.kv.keys import BlockKey
from jaxdual.sampling_params import SamplingParams


@dataclass(slots=True)
class OutputState:
    """One output of a request: its tokens so far, and whether it has ended."""

    tokens: list[int] = field(default_factory=list)
    ended: bool = False


@dataclass(slots=True, eq=False)
class Live:
    """A request that has not ended.

    Attributes:
      number: for the scheduler.
      outputs: what the client has.
      attempts: times that it was given to engines.
      failures: how many of them were lost.
      current: the present one; None while it waits for engines.
      keys: of its blocks that may be stored; None while nothing is known of the store.
      reads: whether stored blocks of it are read: not once they have kept it waiting in vain.
      cached: tokens of the prompt that its prefill engine found computed; None before.
      added: when it came, in seconds.
      queue_seconds, allocation_seconds, read_seconds: how long it has waited for engines, for memory of its decode
        engine, and, before tokens that nobody waits for, for stored blocks.
    """

    request: Request
    number: int
    outputs: list[OutputState]
    added: float
    attempts: int = 0
    failures: int = 0
    current: Attempt | None = None
    keys: Sequence[BlockKey] | None = None
    reads: bool = True
    cached: int | None = None
    queue_seconds: float = 0.0
    allocation_seconds: float = 0.0
    read_seconds: float = 0.0

    @property
    def resumed(self) -> tuple[tuple[int, ...] | None, ...]:
        """See `Request.resumed`."""
        return tuple(None if output.ended else tuple(output.tokens) for output in self.outputs)

    @property
    def lead(self) -> OutputState:
        """The output whose first token the prefill engine gives."""
        return self.outputs[0]

    @property
    def length(self) -> int:
        """Tokens whose keys and values a prefill engine computes."""
        prompt, dysco = len(self.request.prompt_token_ids), self.request.dysco
        if dysco is not None:
            return first_observed(prompt, dysco.tail, dysco.observe)
        return prompt + len(self.lead.tokens)

    @property
    def tokens(self) -> list[int]:
        """Those: of the prompt, and behind them of the lead; before the first that is watched, where some are."""
        return [*self.request.prompt_token_ids, *self.lead.tokens][: self.length]

    @property
    def goes_on_alone(self) -> bool:
        """Whether a decode engine computes what it needs by itself.

        Outputs begin together where the lead's prompt ends; not once the others have tokens of their own. Where tokens
        are watched, they begin before them, whatever follows.
        """
        if self.request.dysco is not None:
            return not self.length or self.lead.ended
        return self.lead.ended or any(output.tokens for output in self.outputs[1:])

    @property
    def left(self) -> int:
        """Tokens that the decode engine may still compute for the lead."""
        known = len(self.request.prompt_token_ids) + len(self.lead.tokens) - self.length
        return max(0, (self.request.params.max_tokens or 0) - len(self.lead.tokens)) + known

    @property
    def wants_scores(self) -> bool:
        """Whether its prompt is to be computed whole, since log-probabilities of it are wanted."""
        return self.request.params.prompt_logprobs is not None and not self.lead.tokens


class Phase(Enum):
    """What an attempt waits for."""

    GRANT = "memory of the decode engine"
    PREFILL = "the prompt to be computed and written"
    DECODE = "the rest of the tokens"
    VOID = "word that nothing of it is under way any more"


@dataclass(slots=True, eq=False)
class Attempt:
    """A request on a pair of engines.

    Attributes:
      name: id of the request at the engines; each attempt has another.
      salt: of its keys.
      live: whose attempt it is.
      placement: number that the scheduler gave it; None for one that a decode engine does by itself.
      prefill, decode: engines; the first is None likewise.
      tokens: of the prompt, and of the lead when it began.
      began: when it was announced to the decode engine, in seconds.
      hits: which blocks are read from the store, by whom.
      target: where the prompt is written, once it is granted.
      cached: tokens of the prompt that its prefill engine found stored or cached.
      computed: whether the prefill engine has computed the prompt.
      handed: whether the prompt is complete there; None while that is not known.
      broken: see `wire.HandedOff`.
      stores: nobody waits for it any more, but for its blocks to be stored.
    """

    name: str
    salt: bytes
    live: Live
    placement: int | None
    prefill: int | None
    decode: int
    tokens: int
    began: float
    phase: Phase
    hits: Hits = field(default_factory=Hits)
    target: Target | None = None
    cached: int = 0
    computed: bool = False
    handed: bool | None = None
    broken: bool = False
    stores: bool = False

    def request(self, resumed: tuple[tuple[int, ...] | None, ...]) -> Request:
        """What the engines know it by, going on from given tokens of each output."""
        return dataclasses.replace(self.live.request, request_id=self.name, salt=self.salt, resumed=resumed)

    def prefill_request(self) -> Request:
        """The prompt, and one token of the lead; where tokens are watched, what comes before them, and any token."""
        if self.live.request.dysco is not None:
            params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
            prompt = self.live.tokens
            return dataclasses.replace(self.request(()), prompt_token_ids=prompt, params=params, dysco=None)
        before, params = tuple(self.live.lead.tokens), self.live.request.params
        count = len(before) + 1
        params = dataclasses.replace(params, n=1, max_tokens=count, min_tokens=min(params.min_tokens, count))
        return dataclasses.replace(self.request((before,) if before else ()), params=params)

    def one_more(self) -> Request:
        """One token more than there are, which nobody waits for: who decodes it stores the prompt's blocks."""
        before = tuple(self.live.lead.tokens)
        params = dataclasses.replace(
            self.live.request.params, n=1, max_tokens=len(before) + 1, min_tokens=0, ignore_eos=True
        )
        return dataclasses.replace(self.request((before,)), params=params)
