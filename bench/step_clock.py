"""Splits the time of engine steps into the loop's own work, calls of programs, and waiting.

JAX on a CPU runs a program on a thread of its own or, if it thinks it small, on the calling thread, so neither the
time of a call nor the CPU time of the loop's thread says what the loop costs. While it is open, a `StepClock`
therefore puts timers around the jitted programs (`runner.device.programs`), and waits for a step's arrays in front of
`runner.fetch`, under a timer too. CPU times are of the calling thread (`time.thread_time`). What remains of a step is
the loop (planning, packing, page accounting) and the front (text, which a server makes in another process). `blocking`
waits after each call besides: it shows how
long each program takes by itself, and how much of that ran on the calling thread. Steps don't overlap then, so its
step time is no measurement.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import jax

from jaxdual import LLM


@dataclasses.dataclass(slots=True)
class _Span:
    wall: float = 0.0
    cpu: float = 0.0
    count: int = 0


class StepClock:
    """Times the steps of an engine between `with` and its end.

    Args:
      llm: whose programs are wrapped.
      blocking: waits after each call of a program.
    """

    def __init__(self, llm: LLM, *, blocking: bool) -> None:
        self._llm = llm
        self._runner = llm._engine.runner
        self._blocking = blocking
        self._originals: dict[str, Callable[..., Any]] = {}
        self._calls: defaultdict[str, _Span] = defaultdict(_Span)
        self._ready: defaultdict[str, list[float]] = defaultdict(list)
        self._wait = _Span()
        self._front = _Span()
        self._steps: list[tuple[float, float]] = []
        self._loops: list[float] = []

    def __enter__(self) -> StepClock:
        programs = self._runner.device.programs
        self._originals = {name: value for name, value in vars(programs).items() if hasattr(value, "lower")}
        for name, program in self._originals.items():
            setattr(programs, name, self._timed(name, program))
        self._fetch = self._runner.fetch
        self._runner.fetch = self._waiting_fetch  # type: ignore[method-assign]
        self._take = self._llm._front.take
        self._llm._front.take = self._timed_take  # type: ignore[method-assign]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, program in self._originals.items():
            setattr(self._runner.device.programs, name, program)
        del self._runner.fetch
        del self._llm._front.take

    def step(self) -> None:
        """Runs one step of the engine."""
        outside, calls = self._outside_cpu(), self._num_calls()
        wall, cpu = time.perf_counter(), time.thread_time()
        self._llm.step()
        wall, cpu = time.perf_counter() - wall, time.thread_time() - cpu
        if self._num_calls() == calls:  # the last one only takes what was under way
            return
        self._steps.append((wall, cpu))
        self._loops.append(cpu - (self._outside_cpu() - outside))

    def report(self) -> dict[str, Any]:
        """Milliseconds a step, and a call for each program."""
        steps = max(1, len(self._steps))
        return {
            "steps": len(self._steps),
            "step_wall_ms": _median([wall for wall, _ in self._steps]),
            "step_cpu_ms": _median([cpu for _, cpu in self._steps]),
            "loop_cpu_ms": _median(self._loops),
            "front_cpu_ms": 1e3 * self._front.cpu / steps,
            "calls_cpu_ms": 1e3 * sum(span.cpu for span in self._calls.values()) / steps,
            "calls_wall_ms": 1e3 * sum(span.wall for span in self._calls.values()) / steps,
            "wait_cpu_ms": 1e3 * self._wait.cpu / steps,
            "wait_wall_ms": 1e3 * self._wait.wall / steps,
            "programs": {
                name: {
                    "calls_per_step": span.count / steps,
                    "call_cpu_ms": 1e3 * span.cpu / span.count,
                    **({"until_ready_ms": _median(self._ready[name])} if self._blocking else {}),
                }
                for name, span in self._calls.items()
                if span.count
            },
        }

    def _outside_cpu(self) -> float:
        return self._wait.cpu + self._front.cpu + sum(span.cpu for span in self._calls.values())

    def _num_calls(self) -> int:
        return sum(span.count for span in self._calls.values())

    def _timed(self, name: str, program: Callable[..., Any]) -> Callable[..., Any]:
        span = self._calls[name]

        def call(*args: Any) -> Any:
            wall, cpu = time.perf_counter(), time.thread_time()
            result = program(*args)
            span.cpu += time.thread_time() - cpu
            span.wall += time.perf_counter() - wall
            span.count += 1
            if self._blocking:
                with self._waiting():
                    jax.block_until_ready(result)
                self._ready[name].append(time.perf_counter() - wall)
            return result

        return call

    def _timed_take(self, events: Any) -> Any:
        with _Timer(self._front):
            return self._take(events)

    def _waiting(self) -> _Timer:
        return _Timer(self._wait)

    def _waiting_fetch(self, launch: Any) -> Any:
        with self._waiting():
            jax.block_until_ready(list(_arrays(launch)))
        return self._fetch(launch)


class _Timer:
    def __init__(self, span: _Span) -> None:
        self._span = span

    def __enter__(self) -> None:
        self._start = time.perf_counter(), time.thread_time()

    def __exit__(self, *error: object) -> None:
        self._span.wall += time.perf_counter() - self._start[0]
        self._span.cpu += time.thread_time() - self._start[1]
        self._span.count += 1


def _arrays(value: Any) -> Iterator[jax.Array]:
    """All arrays in nested dataclasses, lists and tuples."""
    if isinstance(value, jax.Array):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _arrays(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _arrays(getattr(value, field.name))


def _median(seconds: list[float]) -> float:
    return 1e3 * statistics.median(seconds) if seconds else 0.0
