"""Data-parallel engines with shared experts, in lock step, driven by the policies that serve.

A step takes `t0 + max over engines of (a * tokens + b * context) + m * tokens of all * phi`. Context is that of
decoding requests, and phi how uneven the devices' experts are loaded by the step's tokens. A relocation stops all
engines for a while. Queues, batches, pages, preemption and choices of engines are the very objects of
`jaxdual.scheduling` and `jaxdual.kv`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from bench.moe.routing import RouterTrace, StepImbalance
from bench.moe.workload import Arrival
from jaxdual.kv.keys import KeyChain, root_key
from jaxdual.kv.manager import GroupPages, KVManager
from jaxdual.scheduling.batch import BatchLimits, BatchScheduler, Phase, SequenceState
from jaxdual.scheduling.dispatch import (
    DispatchPolicy,
    DispatchRequest,
    GimbalDispatch,
    GimbalThresholds,
    LoadBoard,
    dispatch_policy,
)
from jaxdual.scheduling.expert_policies import expert_policy
from jaxdual.scheduling.experts import INTERVAL, linear_placement
from jaxdual.scheduling.queues import waiting_queue

_ROOT = root_key(b"simulation", b"")
_PAGE = 16  # tokens


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


@dataclass(frozen=True, slots=True)
class Arm:
    """Policies of the three levels, by the names of the settings.

    Attributes:
      remaining: compares loads by tokens that are left to compute, not by those in memory.
    """

    name: str
    dispatch: str = "rr"
    queue: str = "fcfs"
    experts: str = "linear"
    remaining: bool = False

    def dispatcher(self) -> DispatchPolicy:
        if self.remaining:
            scope = "relaxed" if self.dispatch == "gimbal_relaxed" else "literal"
            return GimbalDispatch(GimbalThresholds(), load_scope=scope, load="remaining")  # type: ignore[arg-type]
        return dispatch_policy(self.dispatch)


ARMS = (
    Arm("rr"),
    Arm("vllm_counts", dispatch="vllm_counts"),
    Arm("DPLB", dispatch="gimbal"),
    Arm("DPLB relaxed", dispatch="gimbal_relaxed"),
    Arm("DPLB relaxed, remaining", dispatch="gimbal_relaxed", remaining=True),
    Arm("SJFS", queue="sjf"),
    Arm("SJF, linear ageing", queue="sjf_linear"),
    Arm("EPLB", experts="eplb"),
    Arm("EDR", experts="edr"),
    Arm("EDR, one assignment", experts="edr_column"),
    Arm("source locality", experts="source"),
    Arm("DPLB + SJFS", dispatch="gimbal", queue="sjf"),
    Arm("DPLB + EDR", dispatch="gimbal", experts="edr"),
    Arm("SJFS + EDR", queue="sjf", experts="edr"),
    Arm("score", dispatch="score"),
    Arm("Gimbal", dispatch="gimbal", queue="sjf", experts="edr"),
    Arm("Gimbal relaxed", dispatch="gimbal_relaxed", queue="sjf", experts="edr"),
    Arm("vllm_counts + SJFS + EPLB", dispatch="vllm_counts", queue="sjf", experts="eplb"),
)


@dataclass(slots=True)
class Outcome:
    """What a run gave, in seconds.

    Attributes:
      ttft, tpot: of each request, the latter without those of one token.
      seconds: from the first arrival to the last token.
      tokens: given.
      branches: how often each rule has chosen an engine.
      full_share: part of the time in which some engine's KV memory was used by 90 % or more.
    """

    ttft: list[float] = field(default_factory=list)
    tpot: list[float] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0
    steps: int = 0
    preemptions: int = 0
    relocations: int = 0
    imbalance: float = 1.0
    full_share: float = 0.0
    branches: dict[str, int] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        """Means, percentiles and counts, for a report."""
        return {
            "ttft_s": float(np.mean(self.ttft)),
            "ttft_p50_s": float(np.percentile(self.ttft, 50)),
            "ttft_p99_s": float(np.percentile(self.ttft, 99)),
            "ttft_most_s": max(self.ttft),
            "tpot_s": float(np.mean(self.tpot)),
            "tpot_p99_s": float(np.percentile(self.tpot, 99)),
            "tokens_per_s": self.tokens / self.seconds,
            "steps": self.steps,
            "preemptions": self.preemptions,
            "relocations": self.relocations,
            "imbalance": self.imbalance,
            "kv_full_share": self.full_share,
            "branches": dict(self.branches),
        }


class _Run:
    def __init__(
        self, cluster: Cluster, arm: Arm, requests: Sequence[Arrival], trace: RouterTrace, profile: RouterTrace
    ) -> None:
        self._cluster, self._requests = cluster, requests
        limits = BatchLimits(cluster.max_num_seqs, cluster.max_num_batched_tokens, cluster.max_num_batched_tokens)
        pages = cluster.kv_tokens // _PAGE
        self._engines = [
            BatchScheduler(
                limits, KVManager([GroupPages(pages)], _PAGE, prefix_caching=False), waiting_queue(arm.queue)
            )
            for _ in range(cluster.engines)
        ]
        self._dispatch, self._board = arm.dispatcher(), LoadBoard(cluster.engines)
        self._reported = -float("inf")
        self._sequences: dict[int, SequenceState] = {}
        self._engine_of: dict[int, int] = {}
        self._first: dict[int, float] = {}
        layers = len(trace.choices)
        seen = profile.window(cluster.engines)
        policy = expert_policy(arm.experts, cluster.engines, profile=seen)
        self._moves = policy is not None
        placement = linear_placement(layers, trace.experts, cluster.engines)
        if policy is not None:  # at load time, from the profile
            placement = policy(seen)
        self._imbalance = StepImbalance(trace, placement)
        self.outcome = Outcome()

    def run(self) -> Outcome:
        outcome, cluster, now, arrived = self.outcome, self._cluster, 0.0, 0
        uneven, full = 0.0, 0.0
        while arrived < len(self._requests) or self._sequences:
            if not self._sequences:
                now = max(now, self._requests[arrived].time)
            while arrived < len(self._requests) and self._requests[arrived].time <= now:
                self._admit(arrived, self._requests[arrived])
                arrived += 1
            plans = [engine.plan(now) for engine in self._engines]
            loads = [engine.load() for engine in self._engines]
            contexts = [sum(row.position + 1 for row in plan.rows) for plan in plans]
            tokens = [plan.num_tokens for plan in plans]
            phi = self._imbalance.next(sum(tokens))
            busiest = max(
                cluster.token_seconds * count + cluster.context_seconds * context
                for count, context in zip(tokens, contexts, strict=True)
            )
            seconds = cluster.fixed_seconds + busiest + cluster.expert_seconds * sum(tokens) * phi
            seconds *= cluster.slow
            outcome.steps += 1
            if self._moves and outcome.steps % INTERVAL == 0:
                # Traffic does not change, so experts are placed as they were; the stall is what it costs.
                outcome.relocations += 1
                seconds += cluster.stall_seconds
            now += seconds
            uneven += phi * seconds
            full += seconds * any(load.kv_used >= 0.9 * load.kv_capacity for load in loads)
            for number, plan in enumerate(plans):
                sampled = [chunk.seq_id for chunk in plan.chunks if chunk.samples]
                self._complete(number, [*(row.seq_id for row in plan.rows), *sampled], now)
                outcome.preemptions += len(plan.preempted)
        outcome.seconds, outcome.branches = now, dict(self._dispatch.branches)
        outcome.imbalance, outcome.full_share = uneven / now, full / now
        return outcome

    def _admit(self, number: int, request: Arrival) -> None:
        """A request arrives; engines report every so often, and between two steps."""
        if request.time - self._reported >= self._cluster.report_seconds:
            self._reported = request.time
            for engine, scheduler in enumerate(self._engines):
                self._board.report(engine, scheduler.load())
        wanted = DispatchRequest(str(number), request.prompt)
        chosen = self._dispatch.select(wanted, self._board, request.time)
        self._board.sent(chosen, wanted)
        sequence = SequenceState(
            seq_id=number,
            tokens=[0] * request.prompt,
            prompt_length=request.prompt,
            max_output=request.output,
            stop_token_ids=frozenset(),
            keys=KeyChain(_ROOT, _PAGE),
            arrival=request.time,
            use_cache=False,
        )
        self._sequences[number], self._engine_of[number] = sequence, chosen
        self._engines[chosen].add(sequence)

    def _complete(self, engine: int, seq_ids: Sequence[int], now: float) -> None:
        sequences = [self._sequences[seq_id] for seq_id in seq_ids]
        self._engines[engine].complete([(sequence, 0) for sequence in sequences], now)
        for sequence in sequences:
            number = sequence.seq_id
            if sequence.num_output == 1:
                self._first[number] = now
                self.outcome.ttft.append(now - sequence.arrival)
            if sequence.phase is Phase.FINISHED:
                del self._sequences[number]
                self._board.withdrawn(engine, str(number))
                self.outcome.tokens += sequence.num_output
                if sequence.num_output > 1:
                    self.outcome.tpot.append((now - self._first[number]) / (sequence.num_output - 1))


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
