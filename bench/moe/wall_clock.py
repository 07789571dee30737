"""The comparison by the clock: engines of two processes, each with half of the experts, on a core of its own.

The model with experts that ships with jaxdual serves requests of the five shapes with a sixteenth of their tokens, and
memory that some of the time is full. Whatever is a number of tokens, steps or seconds in a policy is a sixteenth, too.
Engines of all arms are up at the same time and take turns with the same requests, so that what else the machine does
meets them alike. How many requests a second a shape gets is a share of what the baseline serves at most, on requests of
their own; that is all that is fitted. What is measured is the code path, and this machine: two cores, a model of four
layers with eight experts each, and gloo between the processes.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.moe.arms import ARMS, Arm
from bench.moe.outcome import Outcome
from bench.moe.workload import Arrival, arrivals
from jaxdual import AsyncLLM, SamplingParams
from jaxdual.outputs import EngineStats
from jaxdual.scheduling.dispatch import GimbalThresholds
from jaxdual.scheduling.expert_policies import WINDOW
from jaxdual.scheduling.experts import INTERVAL
from jaxdual.scheduling.queues import AGE_LIMIT

SCALE = 16
WALL_CLOCK_ARMS = tuple(
    arm
    for arm in ARMS
    if arm.name in ("rr", "vllm_counts", "DPLB", "DPLB relaxed", "SJFS", "EPLB", "EDR", "Gimbal", "Gimbal relaxed")
)
_MODEL = "models/shipped/moe"
_LONGEST_PROMPT, _LONGEST_OUTPUT = 400, 100  # tokens
_SETTINGS: dict[str, Any] = {
    "block_size": 16,
    "max_model_len": 512,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 2048 // SCALE,
    "num_kv_blocks": 48,
    "enable_prefix_caching": False,
    "expert_parallel_size": 2,
    "num_processes": 2,
    "expert_window": WINDOW // SCALE,
    "seed": 0,
}
_CALIBRATION_SEED = 1000
_LOOK_SECONDS = 0.2  # between two looks at the memory in use


async def wall_clock(
    shapes: Sequence[str], seeds: int, requests: int, load: float, arms: Sequence[Arm] = WALL_CLOCK_ARMS
) -> dict[str, Any]:
    """Runs of all arms, figures as those of the simulation; the arms' first is the baseline.

    Args:
      requests: of a run.
      load: part of what the baseline serves at most that is asked for.
    """
    engines = {arm.name: AsyncLLM(_MODEL, max_queued_requests=100_000, **settings_of(arm)) for arm in arms}
    runs: list[dict[str, Any]] = []
    rates: dict[str, float] = {}
    try:
        for llm in engines.values():  # one after the other: each compiles on all cores
            await llm.warmed_up()
            _pin(llm.engine_pid)
        text = engines[arms[0].name].get_tokenizer().encode(Path(os.__file__).read_text(encoding="utf-8"))
        for shape in shapes:
            crowd = _scaled(arrivals(shape, 1.0, requests, _CALIBRATION_SEED), 0.0)
            outcome = await serve(engines[arms[0].name], crowd, text)
            rates[shape] = load * requests / outcome.seconds
        for seed, shape in itertools.product(range(seeds), shapes):
            asked = _scaled(arrivals(shape, rates[shape], requests, seed), 1.0)
            turns = np.random.default_rng(seed).permutation(len(arms))
            for arm in (arms[turn] for turn in turns):
                outcome = await serve(engines[arm.name], asked, text)
                which = {"shape": shape, "rate": load, "arm": arm.name, "seed": seed}
                runs.append(which | outcome.figures())
    finally:
        for llm in engines.values():
            await llm.shutdown()
    return {"settings": _SETTINGS, "requests_per_s": rates, "runs": runs}


def settings_of(arm: Arm) -> dict[str, Any]:
    """Settings of an arm's engine."""
    settings = _SETTINGS | {
        "dispatch_policy": arm.dispatch,
        "scheduling_policy": arm.queue,
        "expert_placement": arm.experts,
        "router_statistics": "transitions" if arm.experts.startswith("edr") else "activations",
    }
    if arm.dispatch.startswith("gimbal"):
        settings["theta_load"] = GimbalThresholds().theta_load // SCALE
    if arm.queue == "sjf":
        settings["theta_age"] = AGE_LIMIT / SCALE
    if arm.experts != "linear":
        settings["expert_interval"] = INTERVAL // SCALE
    return settings


async def serve(llm: AsyncLLM, requests: Sequence[Arrival], text: Sequence[int]) -> Outcome:
    """Sends requests when they are due, and says how long they took.

    Args:
      text: tokens that prompts are cut from.
    """
    outcome, before, restarts = Outcome(), await llm.stats(), llm.restarts
    start = time.monotonic()
    watch = asyncio.create_task(_watch(llm, outcome))
    async with asyncio.TaskGroup() as group:
        for number, request in enumerate(requests):
            first = number * 997 % (len(text) - request.prompt)
            prompt = list(text[first : first + request.prompt])
            group.create_task(_send(llm, number, request, prompt, start, outcome))
    outcome.seconds = time.monotonic() - start
    watch.cancel()
    if llm.restarts != restarts:
        raise ValueError("an engine has died in the middle of a run")
    _count(outcome, before, await llm.stats())
    return outcome


async def _send(
    llm: AsyncLLM, number: int, request: Arrival, prompt: list[int], start: float, outcome: Outcome
) -> None:
    await asyncio.sleep(start + request.time - time.monotonic())
    params = SamplingParams(max_tokens=request.output, temperature=0, ignore_eos=True)
    due = start + request.time
    async for output in llm.generate({"prompt_token_ids": prompt}, params):
        metrics = output.metrics
    if metrics.first_token_time is None or metrics.finished_time is None:
        raise RuntimeError(f"request {number} has given no token")
    outcome.ttft.append(metrics.first_token_time - due)
    outcome.waited[number] = metrics.queue_seconds or 0.0
    outcome.ended(request.output, metrics.finished_time - metrics.first_token_time)


async def _watch(llm: AsyncLLM, outcome: Outcome) -> None:
    """Takes the share of looks at which KV memory is used by 90 % or more, of both ranks together."""
    looks = full = 0
    while True:
        await asyncio.sleep(_LOOK_SECONDS)
        stats = llm.load()
        if stats is not None:
            looks += 1
            full += stats.kv_blocks_available <= 0.1 * stats.kv_blocks
            outcome.full_share = full / looks


def _count(outcome: Outcome, before: EngineStats, after: EngineStats) -> None:
    outcome.steps = after.steps - before.steps
    outcome.preemptions = after.preemptions - before.preemptions
    outcome.relocations = after.expert_relocations - before.expert_relocations
    outcome.imbalance = after.expert_imbalance or 1.0
    outcome.branches = dict(Counter(after.dispatch_decisions) - Counter(before.dispatch_decisions))


def _scaled(requests: Sequence[Arrival], time_scale: float) -> list[Arrival]:
    """A sixteenth of the tokens, as many as the model has room for."""
    return [
        Arrival(
            one.time * time_scale,
            min(max(one.prompt // SCALE, 1), _LONGEST_PROMPT),
            min(max(one.output // SCALE, 2), _LONGEST_OUTPUT),
        )
        for one in requests
    ]


def _pin(pid: int | None) -> None:
    """Gives the processes of an engine a core each, as far as there are some."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    cores = sorted(os.sched_getaffinity(0))
    for core, process in zip(itertools.cycle(cores), [str(pid), *children]):
        for thread in os.listdir(f"/proc/{process}/task"):
            os.sched_setaffinity(int(thread), {core})
