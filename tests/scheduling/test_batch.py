"""The batch scheduler against a simulated device, whose tokens are a function of the contents that it really reads."""

from __future__ import annotations

import functools
import random
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdual.kv.keys import KeyChain, root_key
from jaxdual.kv.layout import most_blocks
from jaxdual.kv.manager import GroupPages, KVManager
from jaxdual.kv.slots import IntegrityError
from jaxdual.scheduling.batch import BatchLimits, BatchScheduler
from jaxdual.scheduling.plan import Phase, SequenceState, StepPlan
from jaxdual.scheduling.queues import QUEUE_POLICIES, waiting_queue
from tests.kv.memory import Memory

VOCAB = 11
ROOT = root_key(b"model", b"layout")


def next_token(tokens: Sequence[int], seed: int) -> int:
    return zlib.crc32(bytes([seed % 256, *tokens])) % VOCAB


@dataclass(eq=False)
class Job:
    """A sequence and what it must give."""

    sequence: SequenceState
    seed: int
    expected: list[int] = field(default_factory=list)  # prompt and output
    reason: str = ""
    aborted: bool = False

    def content(self, position: int, token: int) -> int:
        """What is computed of a token; of a sequence's own ones, it is something that no other sequence has."""
        own = position >= self.sequence.private_from
        return token + 1000 * (1 + self.sequence.seq_id) if own else token

    @functools.cached_property
    def contents(self) -> tuple[int, ...]:
        return tuple(self.content(position, token) for position, token in enumerate(self.expected))

    @classmethod
    def make(cls, sequence: SequenceState, seed: int) -> Job:
        job = cls(sequence, seed, list(sequence.tokens))
        while True:
            token = next_token(job.expected, seed)
            job.expected.append(token)
            output = len(job.expected) - sequence.prompt_length
            if token in sequence.stop_token_ids and output > sequence.min_output:
                job.reason = "stop"
            elif output >= sequence.max_output:
                job.reason = "length"
            else:
                continue
            return job


class Simulation:
    """An engine loop with a device made of dictionaries.

    Each place of a page holds the token prefix that was computed there, so a row that reads a wrong, stale or foreign
    page is seen at once.
    """

    def __init__(self, kv: KVManager, limits: BatchLimits, *, late: bool, policy: str = "fcfs") -> None:
        self.kv, self.limits, self.late, self.policy = kv, limits, late, policy
        self.scheduler = BatchScheduler(limits, kv, waiting_queue(policy, 3.0))
        self.now = 0.0
        self.windows = [group.memory.window for group in kv.groups]
        self.memory = Memory(kv.page_size, self.windows)
        # Page tables of each slot: first block and pages in each group, as the plans' changes left them.
        self.tables: dict[int, list[tuple[int, list[int]]]] = {}
        self.jobs: dict[int, Job] = {}
        self.last_token: dict[int, int | None] = {}
        # State that grows with a sequence's own tokens: whose, and how many tokens it is of.
        self.state: dict[int, tuple[int, int]] = {}
        self.parked: dict[int, tuple[int, int]] = {}
        self.flight: tuple[StepPlan, list[tuple[int, int]]] | None = None

    def add(self, job: Job) -> None:
        self.jobs[job.sequence.seq_id] = job
        self.scheduler.add(job.sequence)

    def abort(self, job: Job) -> None:
        job.aborted = job.sequence.phase is not Phase.FINISHED
        self.scheduler.finish(job.sequence, "abort")

    def step(self) -> bool:
        """One turn of the loop; whether anything was done."""
        running = [job.sequence for job in self.jobs.values() if job.sequence.phase is Phase.RUNNING]
        self.now += 1
        plan = self.scheduler.plan(self.now)
        self._check_limits(plan, running)
        before, self.flight = self.flight, None if plan.is_empty else (plan, self._execute(plan))
        if not self.late and self.flight is not None:
            before, self.flight = self.flight, None
        if before is not None:
            self._retire(*before)
        self.scheduler.check_integrity()
        return before is not None or not plan.is_empty

    @property
    def unfinished(self) -> list[Job]:
        return [job for job in self.jobs.values() if job.sequence.phase is not Phase.FINISHED]

    def finish(self) -> None:
        """Runs to the end, which must come, and checks all that the sequences gave."""
        bound = 50 + 20 * sum(len(job.expected) for job in self.jobs.values())
        steps = 0
        while self.unfinished:
            self.step()
            steps += 1
            assert steps < bound, "no progress"
        self.step()
        assert self.flight is None
        self.scheduler.check_integrity()
        assert (self.scheduler.num_waiting, self.scheduler.num_running) == (0, 0)
        assert self.kv.num_held == 0
        assert not self.parked
        assert self.kv.num_available == self.kv.num_pages
        for job in self.jobs.values():
            if job.aborted:
                assert job.sequence.finish_reason == "abort"
                assert job.sequence.tokens == job.expected[: len(job.sequence.tokens)]
            else:
                assert job.sequence.tokens == job.expected
                assert job.sequence.finish_reason == job.reason

    def _check_limits(self, plan: StepPlan, running: Sequence[SequenceState]) -> None:
        limits = self.limits
        assert plan.num_tokens <= limits.max_num_batched_tokens
        assert self.scheduler.num_running <= limits.max_num_seqs
        assert all(1 <= len(chunk.tokens) <= limits.max_chunk for chunk in plan.chunks)
        parts = [*plan.rows, *plan.chunks]
        assert len({part.seq_id for part in parts}) == len(parts)
        assert len({part.slot for part in parts}) == len(parts)
        assert len(set(plan.preempted)) == len(plan.preempted)
        assert not {part.seq_id for part in parts} & set(plan.preempted)
        if plan.preempted:
            # Those last in order give way.
            before = sorted(running, key=lambda sequence: sequence.order)
            assert {s.seq_id for s in before[-len(plan.preempted) :]} == set(plan.preempted)
            if len(before) > 1:
                assert before[0].seq_id not in plan.preempted
        for seq_id in plan.admitted if self.policy == "fcfs" else ():
            order = self.jobs[seq_id].sequence.order
            passed = [
                job.sequence
                for job in self.jobs.values()
                if job.sequence.phase is Phase.WAITING and job.sequence.order < order
            ]
            assert all(sequence.pending or self.awaits_a_block(sequence) for sequence in passed), "not first come"

    def awaits_a_block(self, sequence: SequenceState) -> bool:
        """Whether a running sequence has the same first block, and so may be about to share the next one."""
        size = self.kv.page_size
        return any(
            other.tokens[:size] == sequence.tokens[:size]
            for other in (job.sequence for job in self.jobs.values())
            if other.phase is Phase.RUNNING and len(sequence.tokens) > size
        )

    def _execute(self, plan: StepPlan) -> list[tuple[int, int]]:
        self.memory.execute(plan.copies)
        for parked in plan.parked:
            assert self.state[parked.slot] == (parked.seq_id, parked.computed)
            self.parked[parked.seq_id] = self.state[parked.slot]
        for seq_id in plan.unparked:
            del self.parked[seq_id]
        for seq_id in plan.admitted:
            sequence = self.jobs[seq_id].sequence
            self.last_token[sequence.slot] = None
            self.state[sequence.slot] = self.parked.pop(seq_id, (seq_id, sequence.private_from))
        for slot, change in plan.tables:
            table = self.tables.setdefault(slot, [(0, [])] * len(self.windows))
            pages = [*table[change.group][1][: change.start], *change.pages]
            table[change.group] = (change.first, pages)
        self._check_tables(plan)
        sampled = []
        for row in plan.rows:
            job = self.jobs[row.seq_id]
            assert row.slot == job.sequence.slot
            assert row.output_index == row.position + 1 - job.sequence.prompt_length
            token = self.last_token[row.slot] if row.token is None else row.token
            assert token is not None
            assert token == job.expected[row.position]
            self._compute(row.slot, row.position, job, token)
            if row.samples:
                sampled.append((row.seq_id, self._sample(row.slot, job, row.position + 1)))
            else:
                assert row.position + 1 < len(job.sequence.tokens) + job.sequence.pending
        for chunk in plan.chunks:
            job = self.jobs[chunk.seq_id]
            assert chunk.slot == job.sequence.slot
            end = chunk.start + len(chunk.tokens)
            assert end <= job.sequence.single_from, "a token that is to be computed by itself"
            private = job.sequence.private_from
            assert chunk.start >= private or end <= private, "own tokens beside others"
            for offset, token in enumerate(chunk.tokens):
                self._compute(chunk.slot, chunk.start + offset, job, token)
            if chunk.samples:
                assert chunk.output_index == end - job.sequence.prompt_length
                sampled.append((chunk.seq_id, self._sample(chunk.slot, job, end)))
        return sampled

    def _compute(self, slot: int, position: int, job: Job, token: int) -> None:
        """Writes one token in all groups, after a look at what it sees of those before."""
        prefix = job.contents[:position]
        if position >= job.sequence.private_from:
            assert self.state[slot] == (job.sequence.seq_id, position), "what goes with own tokens is not there"
            self.state[slot] = job.sequence.seq_id, position + 1
        for group, (first, pages) in enumerate(self.tables[slot]):
            self.memory.check(pages, prefix, position, group=group, first=first)
            self.memory.write(pages, position, (*prefix, job.content(position, token)), group=group, first=first)

    def _check_tables(self, plan: StepPlan) -> None:
        """Behind a window few pages are held, and no sequence holds one that another writes in this step."""
        size = self.kv.page_size
        spans = [(row.seq_id, row.slot, row.position, 1) for row in plan.rows]
        spans += [(chunk.seq_id, chunk.slot, chunk.start, len(chunk.tokens)) for chunk in plan.chunks]
        for group, window in enumerate(self.windows):
            writers: dict[int, int] = {}
            for seq_id, slot, start, length in spans:
                first, pages = self.tables[slot][group]
                assert pages == self.kv.pages_of(seq_id, group)
                assert first == self.kv.first_of(seq_id, group)
                if window is not None:
                    assert len(pages) <= most_blocks(window, length, size, 10**6)
                for block in range(start // size, (start + length - 1) // size + 1):
                    assert writers.setdefault(pages[block - first], seq_id) == seq_id, "two write one page"
            for seq_id, slot, _, _ in spans:
                for page in self.tables[slot][group][1]:
                    assert writers.get(page, seq_id) == seq_id, "reads a page that another writes in this step"

    def _sample(self, slot: int, job: Job, end: int) -> int:
        token = next_token(job.expected[:end], job.seed)
        self.last_token[slot] = token
        return token

    def _retire(self, plan: StepPlan, sampled: list[tuple[int, int]]) -> None:
        for seq_id, token in sampled:
            self.scheduler.complete([(self.jobs[seq_id].sequence, token)], self.now)


def sequence_of(
    seq_id: int, prompt: Sequence[int], max_output: int, page_size: int = 2, **more: object
) -> SequenceState:
    return SequenceState(
        seq_id=seq_id,
        tokens=list(prompt),
        prompt_length=len(prompt),
        max_output=max_output,
        stop_token_ids=more.pop("stop_token_ids", frozenset()),  # type: ignore[arg-type]
        keys=KeyChain(ROOT, page_size),
        **more,  # type: ignore[arg-type]
    )


def run_random(
    seed: int,
    *,
    late: bool,
    preemption: Literal["recompute", "swap"],
    prefix_caching: bool,
    host_pages: int,
    windows: tuple[int | None, ...] = (None,),
    policy: str = "fcfs",
    singles: float = 0.0,
) -> Simulation:
    """Requests, groups and aborts at random times, in very little memory.

    Args:
      singles: part of the requests whose last tokens are computed one at a time.
    """
    draw = random.Random(seed)
    page_size = draw.choice((1, 2, 3))
    num_pages = draw.randint(3, 9)
    longest = (num_pages if None in windows else 12) * page_size
    seqs = draw.randint(1, 5)
    tokens = draw.randint(seqs, seqs + 8)
    limits = BatchLimits(seqs, tokens, draw.randint(1, tokens), preemption)
    blocks = -(-longest // page_size)
    memory = [GroupPages(num_pages, host_pages)] if None in windows else []
    for window in windows:
        if window is not None:
            least_pages = most_blocks(window, limits.max_chunk, page_size, blocks)
            memory.append(GroupPages(least_pages + draw.choice((0, 1, 4)), host_pages, window))
    kv = KVManager(memory, page_size, prefix_caching=prefix_caching, max_chunk=limits.max_chunk)
    simulation = Simulation(kv, limits, late=late, policy=policy)
    ids = 0
    for _ in range(draw.randint(2, 9)):
        length = min(draw.randint(1, longest - 1) for _ in range(2))
        prompt = [draw.randrange(2)] * length if draw.random() < 0.6 else [draw.randrange(VOCAB) for _ in range(length)]
        most = max(draw.randint(1, longest - length) for _ in range(2))
        priority, use_cache = draw.choice((0, 0, 0, 1, -1)), draw.random() < 0.85
        stops = frozenset(draw.sample(range(VOCAB), draw.choice((0, 0, 1, 3))))
        least = draw.choice((0, 0, min(2, most)))
        private_from = single_from = sys.maxsize
        if singles and draw.random() < singles:
            private_from, single_from = sorted(draw.randrange(length) for _ in range(2))
        group = []
        for _ in range(draw.choice((1, 1, 1, 3))):
            sequence = sequence_of(
                ids,
                prompt,
                most,
                page_size,
                stop_token_ids=stops,
                min_output=least,
                priority=priority,
                arrival=float(ids),
                use_cache=use_cache,
                private_from=private_from,
                single_from=single_from,
            )
            group.append(Job.make(sequence, seed=ids))
            ids += 1
        for job in group:
            simulation.add(job)
        for _ in range(draw.choice((0, 0, 1, 3, 8))):
            simulation.step()
            if simulation.unfinished and draw.random() < 0.08:
                simulation.abort(draw.choice(simulation.unfinished))
    simulation.finish()
    return simulation


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    ("preemption", "prefix_caching", "host_pages"),
    [
        ("recompute", True, 0),
        ("recompute", False, 0),
        ("recompute", True, 3),
        ("swap", True, 2),
        ("swap", True, 12),
        ("swap", False, 4),
    ],
)
@pytest.mark.parametrize("windows", [(None,), (5,), (None, 4), (None, 1, 6)])
@settings(max_examples=100, derandomize=True, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_every_sequence_gets_its_tokens(
    late: bool,
    preemption: Literal["recompute", "swap"],
    prefix_caching: bool,
    host_pages: int,
    windows: tuple[int | None, ...],
    seed: int,
) -> None:
    run_random(
        seed,
        late=late,
        preemption=preemption,
        prefix_caching=prefix_caching,
        host_pages=host_pages,
        windows=windows,
    )


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    ("preemption", "host_pages"),
    [("recompute", 0), ("recompute", 3), ("swap", 12)],
)
@pytest.mark.parametrize("windows", [(None,), (5,), (None, 4)])
@settings(max_examples=200, derandomize=True, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_tokens_that_are_computed_one_at_a_time_are_nobody_else_s(
    late: bool,
    preemption: Literal["recompute", "swap"],
    host_pages: int,
    windows: tuple[int | None, ...],
    seed: int,
) -> None:
    run_random(
        seed,
        late=late,
        preemption=preemption,
        prefix_caching=True,
        host_pages=host_pages,
        windows=windows,
        singles=0.6,
    )


@pytest.mark.parametrize("policy", QUEUE_POLICIES)
@settings(max_examples=100, derandomize=True, deadline=None)
@given(seed=st.integers(0, 2**32), swap=st.booleans())
def test_every_sequence_gets_its_tokens_in_any_order(policy: str, seed: int, swap: bool) -> None:
    preemption: Literal["recompute", "swap"] = "swap" if swap else "recompute"
    run_random(seed, late=True, preemption=preemption, prefix_caching=True, host_pages=4, policy=policy)


@pytest.mark.parametrize("windows", [(None,), (5,), (None, 4)])
def test_random_runs_preempt_swap_and_hit_the_cache(windows: tuple[int | None, ...]) -> None:
    swaps = recomputes = hits = host_hits = 0
    for seed in range(100):
        mode: Literal["recompute", "swap"] = "swap" if seed < 50 else "recompute"
        done = run_random(seed, late=seed % 2 == 1, preemption=mode, prefix_caching=True, host_pages=4, windows=windows)
        swaps += done.scheduler.stats.preemptions_swap
        recomputes += done.scheduler.stats.preemptions_recompute
        hits += done.kv.stats.prefix_hits
        host_hits += done.kv.stats.host_hits
    assert min(swaps, recomputes, hits, host_hits) > 10, (swaps, recomputes, hits, host_hits)


# Single steps with known results.


def scheduler_of(num_pages: int = 16, *, seqs: int = 4, tokens: int = 8, chunk: int = 8) -> BatchScheduler:
    return BatchScheduler(BatchLimits(seqs, tokens, chunk), KVManager([GroupPages(num_pages)], 2))


def test_prompt_is_cut_into_chunks_and_only_the_last_one_samples() -> None:
    scheduler = scheduler_of(tokens=4, chunk=3)
    scheduler.add(sequence_of(0, [1] * 8, 2))
    seen = [(chunk.start, len(chunk.tokens), chunk.samples) for _ in range(3) for chunk in scheduler.plan(0.0).chunks]
    assert seen == [(0, 3, False), (3, 3, False), (6, 2, True)]


def test_decode_comes_before_prompts_and_takes_from_their_budget() -> None:
    scheduler = scheduler_of(tokens=4, chunk=4)
    first = sequence_of(0, [1, 1], 5)
    scheduler.add(first)
    scheduler.plan(0.0)
    scheduler.complete([(first, 7)], 0.0)
    scheduler.add(sequence_of(1, [2] * 8, 1))
    plan = scheduler.plan(0.0)
    assert [(row.seq_id, row.position, row.token, row.output_index) for row in plan.rows] == [(0, 2, 7, 1)]
    assert [(chunk.seq_id, len(chunk.tokens)) for chunk in plan.chunks] == [(1, 3)]


def test_the_last_token_of_a_prompt_runs_as_a_row() -> None:
    scheduler = scheduler_of()
    scheduler.add(sequence_of(0, [5], 1))
    plans = [scheduler.plan(0.0) for _ in range(3)]
    assert not any(plan.chunks for plan in plans)
    assert [(row.position, row.token, row.output_index) for plan in plans for row in plan.rows] == [(0, 5, 0)]


def test_second_plan_before_the_first_result_goes_on_from_the_unknown_token() -> None:
    scheduler = scheduler_of()
    first = sequence_of(0, [1, 2], 3)
    scheduler.add(first)
    scheduler.plan(0.0)
    (row,) = scheduler.plan(0.0).rows
    assert (row.token, row.position, row.output_index) == (None, 2, 1)
    scheduler.plan(0.0)
    assert scheduler.plan(0.0).is_empty  # three tokens are under way, and no more are wanted


def test_a_slot_is_free_once_the_last_token_of_its_sequence_is_under_way() -> None:
    scheduler = scheduler_of(seqs=1)
    first, second = sequence_of(0, [1, 2], 2), sequence_of(1, [3, 4], 1)
    scheduler.add(first)
    scheduler.add(second)
    assert scheduler.plan(0.0).admitted == (0,)
    assert scheduler.plan(0.0).admitted == ()  # its second token is its last, and is only planned now
    assert scheduler.plan(0.0).admitted == (1,)
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 0)
    scheduler.check_integrity()
    scheduler.complete([(first, 5)], 0.0)
    scheduler.complete([(first, 6)], 0.0)
    assert (first.finish_reason, first.tokens, first.slot) == ("length", [1, 2, 5, 6], -1)
    assert (scheduler.num_running, second.slot) == (1, 0)
    scheduler.check_integrity()


def test_smaller_priority_then_earlier_arrival_goes_first() -> None:
    scheduler = scheduler_of(seqs=1)
    scheduler.add(sequence_of(0, [1], 1, priority=1, arrival=0.0))
    scheduler.add(sequence_of(1, [1], 1, priority=0, arrival=9.0))
    scheduler.add(sequence_of(2, [1], 1, priority=0, arrival=5.0))
    assert scheduler.plan(0.0).admitted == (2,)


@pytest.mark.parametrize("age_limit", [5.0, float("inf")])
def test_a_long_prompt_among_short_ones_runs_when_it_has_aged_and_else_starves(age_limit: float) -> None:
    limits = BatchLimits(max_num_seqs=8, max_num_batched_tokens=80, max_chunk=80)
    kv = KVManager([GroupPages(1000)], 10, prefix_caching=False)
    scheduler = BatchScheduler(limits, kv, waiting_queue("sjf", age_limit))
    long = sequence_of(0, [1] * 8000, 1, 10, arrival=0.0)
    scheduler.add(long)
    short, ids = [sequence_of(1, [2] * 10, 1, 10)], 2
    scheduler.add(short[0])
    for step in range(40):
        now = step / 4
        while scheduler.num_waiting < 12:  # more than one step's budget, always
            short.append(sequence_of(ids, [2] * 10, 1, 10, arrival=now))
            scheduler.add(short[-1])
            ids += 1
        plan = scheduler.plan(now)
        assert (0 in plan.admitted) == (now == age_limit), "at the head when it has waited so long, and not before"
        if now == age_limit:
            return
        done = [(sequence, 5) for sequence in short if any(sequence.seq_id == chunk.seq_id for chunk in plan.chunks)]
        scheduler.complete(done, now)
        short = [sequence for sequence in short if sequence.phase is not Phase.FINISHED]
    assert age_limit == float("inf")
    assert long.phase is Phase.WAITING


def test_load_counts_what_waits_runs_and_decodes() -> None:
    scheduler = scheduler_of(num_pages=16, seqs=2, tokens=4, chunk=4)
    first, second = sequence_of(0, [1, 2], 9), sequence_of(1, [3] * 6, 9)
    for sequence in (first, second, sequence_of(2, [4] * 5, 9)):
        scheduler.add(sequence)
    scheduler.plan(0.0)  # all of the first prompt, and two tokens of the second
    load = scheduler.load()
    assert (load.num_running, load.num_waiting, load.kv_capacity) == (2, 1, 16)
    assert load.kv_used == 1 + 3
    assert load.context_tokens == 2 + 2 + 5
    assert load.remaining_tokens == 1 + 4 + 5


def test_results_of_an_aborted_sequence_are_ignored() -> None:
    scheduler = scheduler_of()
    first = sequence_of(0, [1, 2], 3)
    scheduler.add(first)
    scheduler.plan(0.0)
    scheduler.finish(first, "abort")
    scheduler.finish(first, "error")
    scheduler.complete([(first, 5)], 0.0)
    assert (first.tokens, first.finish_reason) == ([1, 2], "abort")
    scheduler.check_integrity()


def test_equal_prompts_that_come_together_are_computed_once() -> None:
    scheduler = scheduler_of()
    first, second = sequence_of(0, [1, 2, 3, 4], 2), sequence_of(1, [1, 2, 3, 4], 2)
    other = sequence_of(2, [4, 4], 2)
    for sequence in (first, second, other):
        scheduler.add(sequence)
    assert scheduler.plan(0.0).admitted == (0, 2)
    scheduler.complete([(first, 5), (other, 5)], 0.0)
    plan = scheduler.plan(0.0)
    assert plan.admitted == (1,)
    assert [(chunk.start, tuple(chunk.tokens)) for chunk in plan.chunks] == [(2, (3, 4))]
    assert second.cached == 2


def test_a_sequence_does_not_wait_for_one_that_was_aborted() -> None:
    scheduler = scheduler_of()
    first, second = sequence_of(0, [1, 2, 3], 2), sequence_of(1, [1, 2, 3], 2)
    scheduler.add(first)
    scheduler.add(second)
    assert scheduler.plan(0.0).admitted == (0,)
    scheduler.finish(first, "abort")
    assert scheduler.plan(0.0).admitted == (1,)
    scheduler.check_integrity()


def test_a_longer_prompt_waits_only_for_the_blocks_that_it_shares() -> None:
    scheduler = scheduler_of(chunk=2)
    first, second = sequence_of(0, [1, 2, 3, 4, 5, 6, 7], 2), sequence_of(1, [1, 2, 9, 9, 9], 2)
    scheduler.add(first)
    scheduler.add(second)
    assert scheduler.plan(0.0).admitted == (0,)
    plan = scheduler.plan(0.0)
    assert plan.admitted == (1,), "the first block is under way; the others are not shared"
    assert second.cached == 2


@pytest.mark.parametrize(("least", "length"), [(0, 1), (1, 2), (5, 4)])
def test_stop_token_counts_only_after_the_least_output(least: int, length: int) -> None:
    scheduler = scheduler_of()
    first = sequence_of(0, [1], 4, stop_token_ids=frozenset({9}), min_output=least)
    scheduler.add(first)
    while first.phase is not Phase.FINISHED:
        scheduler.plan(0.0)
        scheduler.complete([(first, 9)], 0.0)
    assert first.num_output == length
    assert first.finish_reason == ("stop" if length > least else "length")


def test_integrity_check_finds_a_lost_slot() -> None:
    scheduler = scheduler_of()
    scheduler._slots.pop()
    with pytest.raises(IntegrityError, match="slots"):
        scheduler.check_integrity()


def test_prompts_beside_decoding_sequences_come_in_small_parts() -> None:
    limits = BatchLimits(max_num_seqs=4, max_num_batched_tokens=64, max_chunk=64, prefill_beside_decode=8)
    scheduler = BatchScheduler(limits, KVManager([GroupPages(64)], 4))
    first, second = sequence_of(0, [0] * 40, 20, page_size=4), sequence_of(1, [1] * 20, 20, page_size=4)
    scheduler.add(first)
    plan = scheduler.plan(0.0)
    assert [len(chunk.tokens) for chunk in plan.chunks] == [40]  # nothing decodes yet
    scheduler.complete([(first, 5)], 0.0)
    scheduler.add(second)
    parts = []
    while second.computed < 20:
        plan = scheduler.plan(0.0)
        assert [row.seq_id for row in plan.rows] == [0]
        parts += [len(chunk.tokens) for chunk in plan.chunks]
        scheduler.complete([(first, 5)], 0.0)
    assert parts == [8, 8, 4]
