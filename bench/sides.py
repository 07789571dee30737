"""The two sides of `bench.engine`: the same work, each in child processes of its own."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.workers import Worker, WorkerError

OURS, HF = "ours", "hf"
_CACHES = ("dynamic", "static")
_FAR_SLOWER = 1.5
WARM_UP_TOKENS = 8


@dataclass(slots=True)
class Side:
    """A worker of one side and what it has measured.

    Attributes:
      kind: "ours" or "hf".
      threads: that it computes with.
      worker: the process.
      loaded: its answer to "load".
      caches: of transformers, the faster kind of KV cache for each piece of work.
      times: seconds of each repeat of a piece of work.
      extra: other figures of the last repeat of a piece of work.
    """

    kind: str
    threads: int
    worker: Worker
    loaded: dict[str, Any]
    caches: dict[str, str] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=dict)
    extra: dict[str, dict[str, Any]] = field(default_factory=dict)

    def warm_up(self, prompts: Sequence[Sequence[int]]) -> None:
        """Runs a batch without keeping its time: the first one of a shape is slower."""
        cache: dict[str, Any] = {"cache": "dynamic"} if self.kind == HF else {}
        self.worker.ask("generate", prompts=prompts, new_tokens=WARM_UP_TOKENS, **cache)

    def measure(self, work: str, op: str, cache_key: str, **arguments: Any) -> dict[str, Any]:
        """Does a piece of work once more and keeps its time.

        transformers does it with both kinds of cache the first time, and then with the faster one.
        """
        if self.kind == OURS:
            answer = self.worker.ask(op, **arguments)
        else:
            caches = [self.caches[cache_key]] if cache_key in self.caches else _CACHES
            answers = {cache: self.worker.ask(op, cache=cache, **arguments) for cache in caches}
            fastest = min(answers, key=lambda cache: answers[cache]["seconds"])
            self.caches[cache_key] = fastest
            answer = answers[fastest]
        self.times.setdefault(work, []).append(answer["seconds"])
        self.extra[work] = {name: value for name, value in answer.items() if name != "seconds"}
        return answer

    def is_far_slower(self, work: str, sides: Sequence[Side]) -> bool:
        """Whether another number of threads of the same kind has proved far faster at a piece of work."""
        times = [side.best(work) for side in sides if side.kind == self.kind and work in side.times]
        return work in self.times and self.best(work) > _FAR_SLOWER * min(times)

    def best(self, work: str) -> float:
        return min(self.times[work])

    def median(self, work: str) -> float:
        return statistics.median(self.times[work])


def start_ours(model: str, settings: dict[str, Any], cores: Sequence[int], threads: int) -> Side:
    """A process with a warmed-up engine; XLA's thread pool has `threads` threads."""
    worker = Worker(
        f"jaxdual, {threads} threads",
        [sys.executable, "-m", "bench.engine_worker"],
        cores=cores,
        environment={"NPROC": str(threads)},
    )
    try:
        loaded = worker.ask("load", model=model, settings=settings)
        return Side(OURS, threads, worker, {**loaded, "warm_up": worker.ask("warm_up")})
    except WorkerError:
        worker.close()
        raise


def start_hf(python: str, model: str, cores: Sequence[int], threads: int) -> Side:
    """A process with transformers; torch has `threads` threads."""
    worker = Worker(
        f"transformers, {threads} threads",
        [python, "-m", "bench.hf_worker"],
        cores=cores,
        environment={
            "OMP_NUM_THREADS": str(threads),
            "TRANSFORMERS_VERBOSITY": "error",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        },
    )
    try:
        return Side(HF, threads, worker, worker.ask("load", model=model, threads=threads))
    except WorkerError:
        worker.close()
        raise
