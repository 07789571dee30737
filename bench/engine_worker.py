"""Our side of `bench.engine`: one `jaxdual.LLM`, in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from bench.step_clock import StepClock
from bench.worker_loop import serve_lines
from jaxdual import LLM, RequestOutput, SamplingParams


class Ours:
    """`submit` and `step` of an engine, greedy, with fixed numbers of new tokens."""

    def __init__(self) -> None:
        self._llm: LLM | None = None

    @property
    def llm(self) -> LLM:
        if self._llm is None:
            raise RuntimeError("no model is loaded")
        return self._llm

    def load(self, model: str, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """Loads a model; nothing is compiled yet."""
        start = time.perf_counter()
        self._llm = LLM(model, **settings)
        return {
            "jax": jax.__version__,
            "backend": jax.default_backend(),
            "seconds": time.perf_counter() - start,
            "loaded_at": time.monotonic(),
        }

    def warm_up(self) -> Mapping[str, Any]:
        """Compiles all shapes."""
        shapes: dict[str, float] = {}
        start = time.perf_counter()
        self.llm.warmup(lambda name, seconds: shapes.__setitem__(name, seconds))
        return {
            "seconds": time.perf_counter() - start,
            "shapes": shapes,
            "compiled": self.llm.stats().compilations,
            "finished_at": time.monotonic(),
        }

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Mapping[str, Any]:
        """Seconds for `new_tokens` of each prompt, submitted at once; steps and seconds of the steady state apart.

        The steady state lasts from when every request has its first token to when the first one ends.
        """
        llm = self.llm
        steady: list[float] = []
        start = time.perf_counter()
        outputs = self._submit(prompts, new_tokens)
        while llm.has_unfinished:
            before = all(output.outputs[0].token_ids for output in outputs)
            step = time.perf_counter()
            llm.step()
            if before and not any(output.finished for output in outputs):
                steady.append(time.perf_counter() - step)
        seconds = time.perf_counter() - start
        _check(outputs, [new_tokens] * len(prompts))
        return {
            "seconds": seconds,
            "steady_steps": steady,
            "first": [output.outputs[0].token_ids[:8] for output in outputs],
            "finished_at": time.monotonic(),
        }

    def mixed(self, items: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Requests submitted as they arrive, between steps."""
        llm = self.llm
        outputs: list[RequestOutput] = []
        start = time.monotonic()
        while len(outputs) < len(items) or llm.has_unfinished:
            now = time.monotonic() - start
            while len(outputs) < len(items) and items[len(outputs)]["arrival"] <= now:
                item = items[len(outputs)]
                outputs += self._submit([item["prompt"]], item["output"])
            if llm.has_unfinished:
                llm.step()
            elif len(outputs) < len(items):
                time.sleep(max(0.0, items[len(outputs)]["arrival"] - now))
        seconds = time.monotonic() - start
        _check(outputs, [item["output"] for item in items])
        ends = [output.metrics.finished_time or 0.0 for output in outputs]
        firsts = [output.metrics.first_token_time or 0.0 for output in outputs]
        return {
            "seconds": seconds,
            "latencies": [end - start - item["arrival"] for end, item in zip(ends, items, strict=True)],
            "ttft": [first - start - item["arrival"] for first, item in zip(firsts, items, strict=True)],
        }

    def profile(self, prompts: Sequence[Sequence[int]], new_tokens: int, blocking: bool) -> Mapping[str, Any]:
        """Where a steady decode step's time goes; see `StepClock`."""
        llm = self.llm
        outputs = self._submit(prompts, new_tokens)
        while not all(output.outputs[0].token_ids for output in outputs):
            llm.step()
        with StepClock(llm, blocking=blocking) as clock:
            while not any(output.finished for output in outputs):
                clock.step()
        while llm.has_unfinished:
            llm.step()
        return clock.report()

    def _submit(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[RequestOutput]:
        params = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True)
        return [self.llm.submit({"prompt_token_ids": prompt}, params) for prompt in prompts]


def _check(outputs: Sequence[RequestOutput], wanted: Sequence[int]) -> None:
    given = [len(output.outputs[0].token_ids) for output in outputs]
    if given != list(wanted):
        raise RuntimeError(f"outputs of {given} tokens, {list(wanted)} were wanted")


if __name__ == "__main__":
    ours = Ours()
    serve_lines(
        {
            "load": ours.load,
            "warm_up": ours.warm_up,
            "generate": ours.generate,
            "mixed": ours.mixed,
            "profile": ours.profile,
        }
    )
