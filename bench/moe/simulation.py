"""Data-parallel engines with shared experts, in lock step, driven by the policies that serve.

A step takes `t0 + max over engines of (a * tokens + b * context) + m * tokens of all * phi`. Context is that of
decoding requests, and phi how uneven the devices' experts are loaded by the step's tokens. A relocation stops all
engines for a while. Queues, batches, pages, preemption and choices of engines are the very objects of
`jaxdual.scheduling` and `jaxdual.kv`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from bench.moe.arms import Arm
from bench.moe.outcome import Outcome
from bench.moe.routing import RouterTrace, StepImbalance, load_sums
from bench.moe.workload import Arrival
from jaxdual.kv.keys import KeyChain, root_key
from jaxdual.kv.manager import GroupPages, KVManager
from jaxdual.scheduling.batch import BatchLimits, BatchScheduler
from jaxdual.scheduling.dispatch import DispatchRequest, LoadBoard
from jaxdual.scheduling.experts import INTERVAL
from jaxdual.scheduling.plan import Phase, SequenceState
from jaxdual.scheduling.queues import ShortestFirst, waiting_queue

_ROOT = root_key(b"simulation", b"")
PAGE = 16  # tokens


@dataclass(frozen=True, slots=True)
class Cluster:
    """What is simulated.

    Attributes:
      engines: that share each layer's experts, one device each.
      kv_tokens: of KV memory, each.
      fixed_seconds, token_seconds, context_seconds, expert_seconds: of a step: t0, a, b and m above; the defaults are
        of the order of two A100s with Qwen3-30B-A3B, and bound by what a step costs whatever it holds.
      slow: factor on all of them.
      stall_seconds: of a relocation.
      report_seconds: between two reports of an engine's load.
      max_num_seqs, max_num_batched_tokens: of a step of one engine.
      prefix_caching: whether engines keep prefixes.
    """

    engines: int = 2
    kv_tokens: int = 380_000
    fixed_seconds: float = 0.045
    token_seconds: float = 6e-5
    context_seconds: float = 2e-8
    expert_seconds: float = 3e-5
    slow: float = 1.0
    stall_seconds: float = 0.5
    report_seconds: float = 0.1
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    prefix_caching: bool = False


class _Run:
    def __init__(
        self, cluster: Cluster, arm: Arm, requests: Sequence[Arrival], trace: RouterTrace, profile: RouterTrace
    ) -> None:
        self._cluster, self._requests = cluster, requests
        limits = BatchLimits(cluster.max_num_seqs, cluster.max_num_batched_tokens, cluster.max_num_batched_tokens)
        pages = cluster.kv_tokens // PAGE
        self._memory = [
            KVManager([GroupPages(pages)], PAGE, prefix_caching=cluster.prefix_caching) for _ in range(cluster.engines)
        ]
        self._queues = [waiting_queue(arm.queue) for _ in range(cluster.engines)]
        self._engines = [BatchScheduler(limits, *parts) for parts in zip(self._memory, self._queues, strict=True)]
        self._dispatch, self._board = arm.dispatcher(), LoadBoard(cluster.engines)
        self._reported = -float("inf")
        self._sequences: dict[int, SequenceState] = {}
        self._first: dict[int, float] = {}
        self._moves = arm.experts != "linear"
        # At load time experts are placed by the profile.
        self._imbalance = StepImbalance(load_sums(trace, arm.experts, cluster.engines, profile))
        self.outcome = Outcome()

    def run(self) -> Outcome:
        outcome, cluster, now, arrived = self.outcome, self._cluster, 0.0, 0
        uneven, full = 0.0, 0.0
        full_pages = cluster.kv_tokens // PAGE // 10  # free ones, where 90 % are used: theta_kv of the paper
        while arrived < len(self._requests) or self._sequences:
            if not self._sequences:
                now = max(now, self._requests[arrived].time)
            while arrived < len(self._requests) and self._requests[arrived].time <= now:
                self._admit(arrived, self._requests[arrived])
                arrived += 1
            plans = [engine.plan(now) for engine in self._engines]
            tokens = [plan.num_tokens for plan in plans]
            total, busiest = sum(tokens), 0.0
            for plan, count in zip(plans, tokens, strict=True):
                context = sum([row.position for row in plan.rows]) + len(plan.rows)
                busiest = max(busiest, cluster.token_seconds * count + cluster.context_seconds * context)
                for seq_id in plan.admitted:  # of a preempted sequence only the first time counts
                    outcome.waited.setdefault(seq_id, now - self._sequences[seq_id].arrival)
            phi = self._imbalance.next(total)
            seconds = cluster.fixed_seconds + busiest + cluster.expert_seconds * total * phi
            seconds *= cluster.slow
            outcome.steps += 1
            if self._moves and outcome.steps % INTERVAL == 0:
                # Traffic does not change, so experts are placed as they were; the stall is what it costs.
                outcome.relocations += 1
                seconds += cluster.stall_seconds
            now += seconds
            uneven += phi * seconds
            full += seconds * any(memory.num_available <= full_pages for memory in self._memory)
            for number, plan in enumerate(plans):
                sampled = [chunk.seq_id for chunk in plan.chunks if chunk.samples]
                self._complete(number, [row.seq_id for row in plan.rows] + sampled, now)
                outcome.preemptions += len(plan.preempted)
        outcome.seconds, outcome.branches = now, dict(self._dispatch.branches)
        outcome.imbalance, outcome.full_share = uneven / now, full / now
        outcome.aged = sum(queue.aged for queue in self._queues if isinstance(queue, ShortestFirst))
        return outcome

    def _admit(self, number: int, request: Arrival) -> None:
        """A request arrives; engines report every so often, and between two steps."""
        if request.time - self._reported >= self._cluster.report_seconds:
            self._reported = request.time
            for engine, scheduler in enumerate(self._engines):
                self._board.report(engine, scheduler.load())
        wanted = DispatchRequest(str(number), request.prompt, request.user)
        chosen = self._dispatch.select(wanted, self._board, request.time)
        self._board.sent(chosen, wanted)
        sequence = SequenceState(
            seq_id=number,
            tokens=[0] * request.prompt if request.tokens is None else list(request.tokens),
            prompt_length=request.prompt,
            max_output=request.output,
            stop_token_ids=frozenset(),
            keys=KeyChain(_ROOT, PAGE),
            arrival=request.time,
            use_cache=self._cluster.prefix_caching,
        )
        self._sequences[number] = sequence
        self._engines[chosen].add(sequence)

    def _complete(self, engine: int, seq_ids: Sequence[int], now: float) -> None:
        sequences = [self._sequences[seq_id] for seq_id in seq_ids]
        self._engines[engine].complete([(sequence, 0) for sequence in sequences], now)
        for sequence in sequences:
            number, output = sequence.seq_id, len(sequence.tokens) - sequence.prompt_length
            if output == 1:
                self._first[number] = now
                self.outcome.started(sequence, now, PAGE)
            if sequence.phase is Phase.FINISHED:
                del self._sequences[number]
                self._board.withdrawn(engine, str(number))
                self.outcome.ended(output, now - self._first.pop(number))


def simulate(
    cluster: Cluster, arm: Arm, requests: Sequence[Arrival], trace: RouterTrace, profile: RouterTrace
) -> Outcome:
    """Serves requests, in the order of their arrival, and says how long each took.

    Args:
      trace: what the routers choose.
      profile: what they chose before, which experts are placed by.

    Raises:
      ValueError: requests out of order, or one that no engine's memory holds.
    """
    if any(after.time < before.time for before, after in pairwise(requests)):
        raise ValueError("requests must be in the order of their arrival")
    longest = max(one.prompt + one.output for one in requests)
    if longest > cluster.kv_tokens:
        raise ValueError(f"kv_tokens={cluster.kv_tokens} must hold the longest request, of {longest} tokens")
    return _Run(cluster, arm, requests, trace, profile).run()
