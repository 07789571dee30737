"""The plain data of a step: what an engine knows of each sequence, and what the next step computes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from jaxdual.kv.keys import KeyChain
from jaxdual.kv.manager import PageCopy, PublishedBlock, TableChange

Part = Literal["whole", "lower", "upper"]


class Phase(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


FinishReason = Literal["stop", "length", "abort", "error", "refused"]


@dataclass(slots=True, eq=False)
class SequenceState:
    """What the scheduler knows of one sequence.

    Attributes:
      seq_id: unique for ever.
      tokens: prompt and known output tokens.
      prompt_length: tokens of the prompt.
      max_output: output tokens at most, at least 1.
      stop_token_ids: tokens that end the sequence once `min_output` tokens are there; they are part of the output.
      min_output: output tokens before which no stop token ends it.
      keys: hash chain of its blocks.
      priority: smaller goes first.
      arrival: seconds; earlier goes first within a priority.
      use_cache: False computes the whole prompt anew.
      private_from: position from which on what is computed is this sequence's own: blocks are neither shared nor looked
        up. No chunk goes across it.
      whole_from: position from which on all tokens before `single_from`, which must be few, are one chunk, whatever the
        limits of a step leave; at least `private_from`. No chunk goes across it.
      single_from: position from which on tokens are computed one at a time, each as a row, also those that are known;
        at least `whole_from`.
      part: of the layers that the next chunk goes through. A prompt that may be refused goes through the lower ones
        first, and through the upper ones once it is not.
      lowered: tokens that have gone through the lower layers once all planned steps have run, while `part` is not
        "whole".
      undecided: whether the next token waits until it is known what became of the last one.
      lower_tokens, upper_tokens: computed in all planned steps, in the lower and in the upper layers.
      computed: tokens whose keys and values are there once all planned steps have run.
      pending: tokens sampled by planned steps and not known yet.
      cached: tokens of the prompt that came from the prefix cache at first admission, in tokens.
      slot: its row of the per-sequence device state while running and not all its tokens are planned; else -1.
      room: tokens that surely need no other page, nor have one that the device was not told of; 0 if that is not known.
    """

    seq_id: int
    tokens: list[int]
    prompt_length: int
    max_output: int
    stop_token_ids: frozenset[int]
    keys: KeyChain
    min_output: int = 0
    priority: int = 0
    arrival: float = 0.0
    use_cache: bool = True
    private_from: int = sys.maxsize
    whole_from: int = sys.maxsize
    single_from: int = sys.maxsize
    part: Part = "whole"
    lowered: int = 0
    undecided: bool = False
    lower_tokens: int = 0
    upper_tokens: int = 0
    computed: int = 0
    pending: int = 0
    cached: int | None = None
    slot: int = -1
    room: int = 0
    phase: Phase = Phase.WAITING
    finish_reason: FinishReason | None = None

    @property
    def num_output(self) -> int:
        """Known output tokens."""
        return len(self.tokens) - self.prompt_length

    @property
    def wants_decode(self) -> bool:
        """All tokens but the newest, known or pending, are computed, or the next one is to be computed by itself."""
        if self.part != "whole":
            return False
        return self.computed == len(self.tokens) + self.pending - 1 or self.computed >= self.single_from

    @property
    def begin(self) -> int:
        """Position of the first token of the next chunk."""
        return max(self.computed, self.lowered) if self.part == "lower" else self.computed

    def open(self) -> None:
        """It is not refused: what has gone through the lower layers goes through the upper ones."""
        everything = self.phase is Phase.RUNNING and self.lowered == len(self.tokens)
        self.part = "upper" if self.part == "lower" and everything else "whole"

    @property
    def order(self) -> tuple[int, float, int]:
        return (self.priority, self.arrival, self.seq_id)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Part of a prompt (or of a preempted sequence's tokens) to compute.

    Attributes:
      seq_id, slot: the sequence and its row of the per-sequence device state.
      start: position of the first token.
      tokens: the tokens.
      samples: whether this is the last chunk, whose last position gives a token.
      output_index: number of the output token that it gives, from 0.
      part: of the layers that it goes through.
      asks: whether P(IK) is asked at its last position.
    """

    seq_id: int
    slot: int
    start: int
    tokens: Sequence[int]
    samples: bool
    output_index: int
    part: Part = "whole"
    asks: bool = False


@dataclass(slots=True)  # not frozen: one is made for every token
class Row:
    """One sequence's decode step.

    Attributes:
      seq_id, slot: the sequence and its row of the per-sequence device state.
      position: of the input token.
      token: the input token; None if the step before sampled it and only the device knows it.
      output_index: number of the output token that this step samples, from 0.
      samples: whether it does; the token that follows is known otherwise.
    """

    seq_id: int
    slot: int
    position: int
    token: int | None
    output_index: int
    samples: bool = True


@dataclass(frozen=True, slots=True)
class ParkedSlot:
    """A sequence that gives its slot up and will go on from where it is.

    Attributes:
      seq_id, slot: the sequence and the row of the per-sequence device state that it has had.
      computed: tokens whose keys and values it has.
    """

    seq_id: int
    slot: int
    computed: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: copies and page tables first, each in order, then chunks and rows.

    Attributes:
      copies: pages to move between tiers.
      tables: what changes in page tables, with the slot of each; the tables of a slot keep everything else.
      admitted: sequences that run from this step on, whose device state must be set before.
      chunks, rows: what to compute.
      preempted: sequences that had to give way.
      published: blocks shared since the last step; whoever wants their contents takes them before the copies.
      unstaged: sequences whose staging pages nobody needs once the copies are made.
      parked: sequences whose state on the device is to be kept until they are admitted again.
      unparked: sequences of which nobody needs what was kept.
    """

    copies: tuple[PageCopy, ...]
    tables: tuple[tuple[int, TableChange], ...]
    admitted: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    rows: tuple[Row, ...]
    preempted: tuple[int, ...]
    published: tuple[PublishedBlock, ...] = ()
    unstaged: tuple[int, ...] = ()
    parked: tuple[ParkedSlot, ...] = ()
    unparked: tuple[int, ...] = ()

    @property
    def is_empty(self) -> bool:
        work = self.copies or self.admitted or self.chunks or self.rows
        return not (work or self.published or self.unstaged or self.unparked)

    @property
    def num_tokens(self) -> int:
        return len(self.rows) + sum(len(chunk.tokens) for chunk in self.chunks)
