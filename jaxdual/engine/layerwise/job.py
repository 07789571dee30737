"""Prompts that a layerwise prefill engine computes for others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxdual.engine.request import Hits, Request, Target, TokenLogprobs
from jaxdual.engine.sampler import SlotSampling
from jaxdual.kv.keys import BlockKey
from jaxdual.kv.lease import Lease


@dataclass(frozen=True, slots=True)
class Place:
    """Where a Full Block lies that the engine can read: an agent's slab, and bytes from its beginning."""

    address: str
    descriptor: bytes
    offset: int


@dataclass(slots=True, eq=False)
class Job:
    """A prompt on its way through the engine.

    Attributes:
      number: unique for ever.
      tokens: of the prompt, and behind them those that its output has already.
      prompt_length: of the prompt alone.
      target: where all of its blocks go.
      hits: which blocks are read from the store, by whom.
      moves: see `wire.Prefill`.
      keys: of the blocks that this engine reads.
      sampling, stop_token_ids: of the token that it ends in.
      added: when it came, in seconds.
      read_deadline: by which this engine's own reads must be over; None while they wait for memory, or are over.
      lease: of the staging pages that hold them, until the last pass.
      read_here, read_there: blocks that were read whole; None while that is not known.
      computed: tokens whose keys and values are somewhere.
      cached: of these, those that were read.
      slot: of the sampler, from the last pass on; else -1.
      passing: it is in a pass.
      pushes: blocks on their way to the target, in programs' pieces.
      failed: something of it is lost, or it is not wanted any more.
      broken: see `wire.HandedOff`.
      sampled: its token is there.
      ready, ran: when nothing of it was read any more, and when its first pass began, in seconds.
      scores: log-probabilities of the prompt so far.
    """

    number: int
    request: Request
    target: Target
    hits: Hits
    moves: bool
    tokens: Sequence[int]
    keys: list[BlockKey]
    sampling: SlotSampling
    stop_token_ids: frozenset[int]
    added: float
    read_deadline: float | None = None
    lease: Lease | None = None
    read_here: int | None = None
    read_there: int | None = None
    computed: int = 0
    cached: int = 0
    slot: int = -1
    passing: bool = False
    pushes: int = 0
    failed: bool = False
    broken: bool = False
    sampled: bool = False
    ready: float | None = None
    ran: float | None = None
    scores: list[TokenLogprobs] = field(default_factory=list)

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_output(self) -> int:
        """Tokens that its output has already."""
        return len(self.tokens) - self.prompt_length

    @property
    def wants_scores(self) -> bool:
        """Whether log-probabilities of the prompt are wanted."""
        return self.request.params.prompt_logprobs is not None and not self.num_output

    @property
    def reads_over(self) -> bool:
        return self.read_here is not None and self.read_there is not None

    @property
    def hit_blocks(self) -> int:
        """Leading blocks that were read; once reads are over."""
        here, there = self.read_here or 0, self.read_there or 0
        return here + there if here == self.hits.here else here

    @property
    def over(self) -> bool:
        """Nothing of it is under way, and nothing more will be."""
        return (self.sampled or self.failed) and not self.passing and not self.pushes

    def place(self, block: int, own: Sequence[Place]) -> Place:
        """Where a block lies that was computed or read before this pass.

        Args:
          own: of the blocks that this engine has read.
        """
        if block < len(own):
            return own[block]
        return Place(self.target.address, self.target.descriptor, self.target.offsets[0][block])
