"""The batch scheduler: which tokens of which sequences the next step computes.

A state machine over plain data. `plan` moves sequences on as if the step had run; `complete` brings the tokens that it
sampled. A second `plan` may come before the `complete` of the first: a sequence then goes on from a token that only
the device knows yet.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from jaxdual.kv.keys import BlockKey
from jaxdual.kv.manager import KVManager, TableChange
from jaxdual.kv.slots import IntegrityError
from jaxdual.scheduling.dispatch import EngineLoad
from jaxdual.scheduling.plan import Chunk, FinishReason, ParkedSlot, Phase, Row, SequenceState, StepPlan
from jaxdual.scheduling.queues import FixedOrder, WaitingQueue, arrival_key


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Limits of a step.

    Attributes:
      max_num_seqs: sequences that run at once.
      max_num_batched_tokens: tokens computed in a step.
      max_chunk: tokens of one sequence's chunk.
      preemption: what happens to a sequence that must give way: its pages are dropped and computed again, or moved to
        the host tier (where that is full, dropped).
      prefill_beside_decode: prompt tokens computed in a step that also decodes, so that it does not keep running
        sequences waiting for long; None for as many as fit.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_chunk: int
    preemption: Literal["recompute", "swap"] = "recompute"
    prefill_beside_decode: int | None = None


@dataclass(slots=True)
class BatchStats:
    """Counters since start."""

    prefill_tokens: int = 0
    preemptions_recompute: int = 0
    preemptions_swap: int = 0


@dataclass(slots=True)
class _Plan:
    """A step being planned."""

    budget: int
    tables: list[tuple[int, TableChange]] = field(default_factory=list)
    admitted: list[int] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    preempted: list[int] = field(default_factory=list)
    parked: list[ParkedSlot] = field(default_factory=list)


class BatchScheduler:
    """Continuous batching: decode first, then prompts in the order of a queue, in chunks.

    A prompt has room from its admission on: all pages, or behind a sliding window those of the window and a chunk. A
    decoding sequence takes a page at a time. If none is to be had, the sequence last in order gives way. The first in
    order is never asked to while another one runs, and KV memory holds at least one sequence of the greatest length,
    so something always goes on.

    A sequence whose next block another one is about to compute waits for it, and then finds it in the prefix cache: a
    prompt that many requests share is computed once, also when they come together.

    Args:
      limits: of a step.
      kv: page accounting.
      queue: who is next to be admitted; first come, first served where left out. What runs is not asked to give way
        for it: running sequences go by priority and arrival.
    """

    def __init__(self, limits: BatchLimits, kv: KVManager, queue: WaitingQueue[SequenceState] | None = None) -> None:
        self.limits = limits
        self.stats = BatchStats()
        self._kv = kv
        self._waiting: WaitingQueue[SequenceState] = FixedOrder(arrival_key) if queue is None else queue
        self._running: list[SequenceState] = []
        self._slots = list(range(limits.max_num_seqs - 1, -1, -1))
        # Blocks that running sequences will compute and share, and which sequence each.
        self._coming: dict[BlockKey, int] = {}
        # Sequences whose state is kept, and how many tokens they had then; those of which it is not needed any more.
        self._parked: dict[int, int] = {}
        self._unparked: list[int] = []

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that have a slot."""
        return self.limits.max_num_seqs - len(self._slots)

    def add(self, sequence: SequenceState) -> None:
        """Queues a new sequence."""
        self._waiting.add(sequence)

    def finish(self, sequence: SequenceState, reason: FinishReason) -> None:
        """Ends a sequence at once, whatever it is doing; results still under way for it are ignored."""
        if sequence.phase is Phase.FINISHED:
            return
        if sequence.phase is Phase.RUNNING:
            self._stop_running(sequence)
        else:
            self._waiting.remove(sequence)
        self._kv.release(sequence.seq_id)
        if self._parked.pop(sequence.seq_id, None) is not None:
            self._unparked.append(sequence.seq_id)
        sequence.phase = Phase.FINISHED
        sequence.finish_reason = reason

    def plan(self, now: float) -> StepPlan:
        """Chooses the work of the next step and moves the sequences on as if it had run.

        Args:
          now: seconds, on the clock of the sequences' `arrival`.
        """
        step = _Plan(budget=self.limits.max_num_batched_tokens)
        self._plan_rows(step)
        if step.rows and self.limits.prefill_beside_decode is not None:
            step.budget = min(step.budget, self.limits.prefill_beside_decode)
        self._plan_chunks(step)
        if not step.preempted:
            self._admit(step, now)
        unparked, self._unparked = self._unparked, []
        return StepPlan(
            copies=self._kv.take_copies(),
            tables=tuple(step.tables),
            admitted=tuple(step.admitted),
            chunks=tuple(step.chunks),
            rows=tuple(step.rows),
            preempted=tuple(step.preempted),
            published=self._kv.take_published(),
            unstaged=self._kv.take_unstaged(),
            parked=tuple(step.parked),
            unparked=tuple(unparked),
        )

    def complete(self, sampled: Iterable[tuple[SequenceState, int]], now: float) -> None:
        """Takes the tokens that a planned step sampled.

        Args:
          sampled: sequence and token; those of sequences finished meanwhile are ignored.
          now: seconds, as for `plan`.
        """
        for sequence, token in sampled:
            if sequence.phase is Phase.FINISHED:
                continue
            sequence.pending -= 1
            sequence.tokens.append(token)
            output = sequence.num_output
            if output == 1:
                self._waiting.first_token(now - sequence.arrival)
            if sequence.phase is Phase.RUNNING and self._kv.prefix_caching:
                self._publish(sequence)
            if token in sequence.stop_token_ids and output > sequence.min_output:
                self.finish(sequence, "stop")
            elif output >= sequence.max_output:
                self.finish(sequence, "length")

    def load(self) -> EngineLoad:
        """What a choice among several engines looks at."""
        context = remaining = 0
        for sequence in self._running:
            context += sequence.computed
            remaining += 1 if sequence.wants_decode else len(sequence.tokens) - sequence.computed
        waiting = sum(len(sequence.tokens) for sequence in self._waiting)
        return EngineLoad(
            kv_used=self._kv.num_pages - self._kv.num_available,
            kv_capacity=self._kv.num_pages,
            num_waiting=len(self._waiting),
            num_running=len(self._running),
            context_tokens=context + waiting,
            remaining_tokens=remaining + waiting,
        )

    def check_integrity(self) -> None:
        """Raises `IntegrityError` unless queues, slots and KV accounting agree."""
        self._kv.check_integrity()
        taken = sorted(sequence.slot for sequence in self._running if sequence.slot >= 0)
        if sorted(self._slots + taken) != list(range(self.limits.max_num_seqs)):
            raise IntegrityError(f"slots {taken} taken and {self._slots} free are not all slots once")
        if any(s.phase is not Phase.RUNNING for s in self._running) or any(
            s.phase is not Phase.WAITING for s in self._waiting
        ):
            raise IntegrityError("a sequence is in the wrong queue")
        if any(s.room > self._kv.room_of(s.seq_id) for s in self._running) or any(s.room for s in self._waiting):
            raise IntegrityError("a sequence has room that its pages do not give")
        running = {sequence.seq_id for sequence in self._running}
        if not running.issuperset(self._coming.values()):
            raise IntegrityError("a block is expected of a sequence that does not run")
        if not self._running and not len(self._waiting) and self._kv.num_held:
            raise IntegrityError(f"{self._kv.num_held} sequences hold pages, but none is there")

    # Rows.

    def _plan_rows(self, step: _Plan) -> None:
        # Every running sequence passes here at every step: hence no calls of properties.
        position, shares = 0, self._kv.prefix_caching
        while position < len(self._running):
            sequence = self._running[position]
            position += 1
            tokens = len(sequence.tokens) + sequence.pending
            if tokens - sequence.prompt_length >= sequence.max_output:
                self._free_slot(sequence)  # its last token is under way: who comes next need not wait for it
                continue
            if sequence.computed != tokens - 1 and sequence.computed < sequence.single_from:
                continue
            if sequence.part != "whole" or (sequence.undecided and sequence.pending):
                continue
            if step.budget == 0:
                return
            if shares:
                self._publish_planned(sequence)
            if sequence.computed >= sequence.room and not self._make_room(step, sequence, 1):
                return
            self._plan_row(step, sequence)

    def _make_room(self, step: _Plan, sequence: SequenceState, length: int) -> bool:
        """Pages for the next `length` tokens, taken from the last in order if need be; False if this is that one."""
        while not self._kv.grow(sequence.seq_id, sequence.computed, sequence.computed + length):
            victim = self._running[-1]
            self._preempt(step, victim)
            if victim is sequence:
                return False
        self._tell_tables(step, sequence)
        sequence.room = self._kv.room_of(sequence.seq_id)
        return True

    def _tell_tables(self, step: _Plan, sequence: SequenceState) -> None:
        changes = self._kv.take_changes(sequence.seq_id)
        if changes:
            step.tables += [(sequence.slot, change) for change in changes]

    def _plan_row(self, step: _Plan, sequence: SequenceState) -> None:
        position, known = sequence.computed, len(sequence.tokens)
        token = sequence.tokens[position] if position < known else None
        samples = position == known + sequence.pending - 1
        output_index = position + 1 - sequence.prompt_length
        step.rows.append(Row(sequence.seq_id, sequence.slot, position, token, output_index, samples))
        sequence.computed += 1
        sequence.lower_tokens += 1
        sequence.upper_tokens += 1
        sequence.pending += samples
        step.budget -= 1
        self.stats.prefill_tokens += not samples

    def _preempt(self, step: _Plan, victim: SequenceState) -> None:
        if step.rows and step.rows[-1].seq_id == victim.seq_id:
            # A chunk needs room, and rows are planned before chunks.
            row = step.rows.pop()
            victim.computed -= 1
            victim.lower_tokens -= 1
            victim.upper_tokens -= 1
            victim.pending -= row.samples
            self.stats.prefill_tokens -= not row.samples
            step.budget += 1
        step.preempted.append(victim.seq_id)
        if self.limits.preemption == "swap" and self._kv.swap_out(victim.seq_id, victim.computed):
            self.stats.preemptions_swap += 1
            # One without a slot has all its tokens under way, and does not go on.
            if victim.computed > victim.private_from and victim.slot >= 0:
                step.parked.append(ParkedSlot(victim.seq_id, victim.slot, victim.computed))
                self._parked[victim.seq_id] = victim.computed
        else:
            self._kv.release(victim.seq_id)
            self.stats.preemptions_recompute += 1
        victim.computed = 0
        if victim.part == "upper":
            victim.part = "whole"
        self._stop_running(victim)
        victim.phase = Phase.WAITING
        self.add(victim)

    # Chunks.

    def _plan_chunks(self, step: _Plan) -> None:
        position = 0
        while position < len(self._running):
            sequence = self._running[position]
            position += 1
            if sequence.wants_decode:
                continue
            self._publish_planned(sequence)
            length = self._chunk_length(step, sequence)
            if length > 0 and self._make_room(step, sequence, sequence.begin + length - sequence.computed):
                self._plan_chunk(step, sequence, length)

    def _chunk_length(self, step: _Plan, sequence: SequenceState) -> int:
        begin, ends = sequence.begin, (sequence.private_from, sequence.whole_from, sequence.single_from)
        end = min(len(sequence.tokens), *(end for end in ends if end > begin))
        if begin >= sequence.whole_from:
            return end - begin if step.budget > 0 else 0
        return min(end - begin, step.budget, self.limits.max_chunk)

    def _plan_chunk(self, step: _Plan, sequence: SequenceState, length: int) -> None:
        begin, part = sequence.begin, sequence.part
        end = begin + length
        last = end == len(sequence.tokens)
        step.chunks.append(
            Chunk(
                seq_id=sequence.seq_id,
                slot=sequence.slot,
                start=begin,
                tokens=sequence.tokens[begin:end],
                samples=last and part != "lower",
                output_index=sequence.num_output,
                part=part,
                asks=last and part == "lower",
            )
        )
        step.budget = max(step.budget - length, 0)
        if part != "upper":
            sequence.lower_tokens += length
            self.stats.prefill_tokens += length
        if part == "lower":
            sequence.lowered = end
            return
        sequence.computed = end
        sequence.upper_tokens += length
        sequence.pending += last
        if last:
            sequence.part, sequence.lowered = "whole", 0

    def _admit(self, step: _Plan, now: float) -> None:
        for sequence in tuple(self._waiting.in_order(now)):
            if not step.budget or not self._slots:
                return
            length = len(sequence.tokens)
            shared = min(length - 1, sequence.private_from)
            blocks = shared // self._kv.page_size if self._kv.prefix_caching else 0
            keys = sequence.keys.upto(sequence.tokens, blocks)
            if sequence.pending or self._is_coming(sequence, keys):
                continue
            admission = self._kv.admit(
                sequence.seq_id,
                keys,
                length,
                reserve=len(self._running),
                use_cache=sequence.use_cache,
            )
            if admission is None:
                return
            self._waiting.remove(sequence)
            sequence.phase = Phase.RUNNING
            sequence.slot = self._slots.pop()
            sequence.computed = admission.computed
            if self._parked.pop(sequence.seq_id, sequence.computed) != sequence.computed:
                self._unparked.append(sequence.seq_id)
            if sequence.cached is None:
                sequence.cached = admission.cached
            bisect.insort(self._running, sequence, key=lambda s: s.order)
            step.admitted.append(sequence.seq_id)
            for key in keys[self._kv.num_published(sequence.seq_id) :]:
                self._coming.setdefault(key, sequence.seq_id)
            length = 1 if sequence.wants_decode else self._chunk_length(step, sequence)
            if sequence.part == "lower":
                sequence.lowered = sequence.computed
            if not self._kv.grow(sequence.seq_id, sequence.computed, sequence.computed + length):
                raise IntegrityError(f"sequence {sequence.seq_id} was admitted without room for {length} tokens")
            self._tell_tables(step, sequence)
            if sequence.wants_decode:
                self._plan_row(step, sequence)
            else:
                self._plan_chunk(step, sequence, length)

    def _is_coming(self, sequence: SequenceState, keys: Sequence[BlockKey]) -> bool:
        """Whether a running sequence is about to share the first block that this one would not find in the cache."""
        if not self._coming or not sequence.use_cache:
            return False
        cached = self._kv.num_cached_blocks(keys)
        return cached < len(keys) and keys[cached] in self._coming

    # Both.

    def _stop_running(self, sequence: SequenceState) -> None:
        sequence.room = 0
        self._running.remove(sequence)
        self._forget_coming(sequence, sequence.keys.known)
        self._free_slot(sequence)

    def _free_slot(self, sequence: SequenceState) -> None:
        """Steps run in order: whoever gets the slot in a later one meets nothing of this sequence there."""
        if sequence.slot >= 0:
            self._slots.append(sequence.slot)
            sequence.slot = -1

    def _publish_planned(self, sequence: SequenceState) -> None:
        """Shares what earlier steps compute, before blocks out of sight are given back.

        Those steps may still be under way, but whoever reads the blocks is dispatched later.
        """
        if sequence.num_output == 0:
            self._publish(sequence)

    def _publish(self, sequence: SequenceState) -> None:
        if not self._kv.prefix_caching:
            return
        blocks = min(sequence.computed, len(sequence.tokens), sequence.private_from) // self._kv.page_size
        published = self._kv.num_published(sequence.seq_id)
        if blocks <= published:
            return
        keys = sequence.keys.upto(sequence.tokens, blocks)
        self._forget_coming(sequence, keys[published:])
        self._kv.publish(sequence.seq_id, keys)
        sequence.room = 0

    def _forget_coming(self, sequence: SequenceState, keys: Sequence[BlockKey]) -> None:
        for key in keys if self._coming else ():
            if self._coming.get(key) == sequence.seq_id:
                del self._coming[key]
