"""Clusters of real processes: the same tokens as one engine's, whatever dies meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from jaxdual import LLM, AsyncLLM, EngineConfig, RequestOutput, SamplingParams
from jaxdual.config import ClusterConfig
from tests.engine.models import TieCounter, folder

# Each starts processes that import JAX.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("shared_programs")]

SETTINGS: dict[str, Any] = {
    "max_model_len": 160,
    "block_size": 8,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "compile_ahead": False,  # each of many engines would compile, and most of it for nothing
}
DEADLINE = 120.0  # seconds; reached only by a failing test
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
SEEDED = SamplingParams(max_tokens=12, temperature=1.0, seed=5, n=2, ignore_eos=True)


def make_prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Lengths around the borders of pages and chunks; some share their beginning."""
    rng = random.Random(seed)
    shared = [rng.randrange(90) for _ in range(40)]
    own = [[rng.randrange(90) for _ in range(rng.choice([1, 7, 8, 9, 30, 63, 64, 65, 100]))] for _ in range(count)]
    return [[*shared, *prompt] if number % 4 == 0 else prompt for number, prompt in enumerate(own)]


def alone(name: str, prompts: Sequence[list[int]], params: SamplingParams) -> list[list[list[int]]]:
    """What one engine gives."""
    llm = LLM(folder(name), **SETTINGS)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
    return [[list(one.token_ids) for one in output.outputs] for output in outputs]


@contextlib.asynccontextmanager
async def cluster(
    name: str, prefill: int, decode: int, *, prefill_tensor: int | None = None, **settings: Any
) -> AsyncIterator[AsyncLLM]:
    config = EngineConfig(model=str(folder(name)), **SETTINGS | settings)
    shape = ClusterConfig(prefill=prefill, decode=decode, prefill_tensor_parallel_size=prefill_tensor)
    async with AsyncLLM.from_config(config, cluster=shape) as llm:
        yield llm


async def complete(llm: AsyncLLM, prompt: list[int], params: SamplingParams) -> RequestOutput:
    final = None
    async for output in llm.generate({"prompt_token_ids": prompt}, params):
        final = output
    assert final is not None
    return final


async def complete_all(llm: AsyncLLM, prompts: Sequence[list[int]], params: SamplingParams) -> list[list[list[int]]]:
    outputs = await asyncio.gather(*(complete(llm, prompt, params) for prompt in prompts))
    return [[list(one.token_ids) for one in output.outputs] for output in outputs]


async def settled(llm: AsyncLLM) -> None:
    """Every engine is there, nothing runs, every page is available, and all accounting agrees."""
    end = time.monotonic() + DEADLINE
    while (
        (stats := await llm.stats()).num_running
        or stats.num_waiting
        or any(not one.kv_blocks or one.kv_blocks_available < one.kv_blocks for one in stats.engines.values())
        or stats.kv_staging_blocks_used
    ):
        assert time.monotonic() < end, stats
        await asyncio.sleep(0.05)
    await llm.check_integrity()


def within(work: Any) -> Any:
    return asyncio.run(asyncio.wait_for(work, DEADLINE))


def children(pid: int, module: str) -> list[int]:
    """Descendants of a process that run a module."""
    found, todo = [], [pid]
    while todo:
        parent = todo.pop()
        for path in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                todo += map(int, path.read_text().split())
        with contextlib.suppress(OSError):
            if module.encode() in Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0"):
                found.append(parent)
    return sorted(found)


@pytest.mark.parametrize(
    ("name", "prefill", "decode", "settings"),
    [
        ("qwen3", 1, 1, {}),
        ("qwen3", 1, 2, {"kv_transport": "tcp"}),
        ("mistral_mixed", 2, 1, {"block_size": 7}),
        ("qwen3", 1, 1, {"prefill_tensor": 2}),
        ("iha", 1, 1, {"prefill_tensor": 2}),
        ("qwen3", 1, 1, {"prefill_tensor": 1, "tensor_parallel_size": 2}),
    ],
)
def test_a_cluster_gives_the_tokens_of_one_engine(name: str, prefill: int, decode: int, settings: Any) -> None:
    prompts = make_prompts(12)
    want, drawn = alone(name, prompts, GREEDY), alone(name, prompts[:4], SEEDED)

    async def main() -> None:
        async with cluster(name, prefill, decode, **settings) as llm:
            ties = TieCounter(name)
            for prompt, (expected,), (got,) in zip(
                prompts, want, await complete_all(llm, prompts, GREEDY), strict=True
            ):
                ties.compare(prompt, expected, got)
            assert ties.ties <= 1
            assert await complete_all(llm, prompts[:4], SEEDED) == drawn
            await settled(llm)

    within(main())


def test_prompts_computed_elsewhere_are_not_computed_again() -> None:
    async def main() -> None:
        async with cluster("qwen3", 1, 1) as llm:
            prompt = make_prompts(2, seed=3)[0]
            output = await complete(llm, prompt, GREEDY)
            assert output.num_cached_tokens == 0
            stats = await llm.stats()
            # The prefill engine's; the decode engine found all of them in its staging pages.
            assert stats.computed_prompt_tokens == len(prompt)
            assert stats.handed_over_tokens == len(prompt)
            again = await complete(llm, prompt, GREEDY)
            assert again.num_cached_tokens == (len(prompt) - 1) // 8 * 8
            assert again.outputs[0].token_ids == output.outputs[0].token_ids
            await settled(llm)

    within(main())


def test_figures_are_those_of_one_engine_that_does_it_all() -> None:
    prompts = make_prompts(3, seed=8)
    asked = [prompts[0], prompts[1], prompts[0], prompts[0] + prompts[2]]
    one = LLM(folder("qwen3"), **SETTINGS)
    for prompt in asked:
        one.generate([{"prompt_token_ids": prompt}], GREEDY)
    want = one.stats()
    names = ("prompt_tokens", "generation_tokens", "computed_prompt_tokens")
    names += ("prefix_cache_queries", "prefix_cache_hits", "kv_blocks", "num_running", "num_waiting")

    async def main() -> None:
        async with cluster("qwen3", 2, 1) as llm:
            work = asyncio.gather(*(complete(llm, prompts[1], GREEDY) for _ in range(120)))
            most = 0
            while not work.done():
                await asyncio.sleep(0.01)
                load = llm.load()
                most = max(most, 0 if load is None else load.num_running + load.num_waiting)
            await work
            # Those that no engine has yet count, too.
            assert most > SETTINGS["max_num_seqs"]
            await settled(llm)
        async with cluster("qwen3", 1, 1) as llm:
            for prompt in asked:
                await complete(llm, prompt, GREEDY)
            stats = await llm.stats()
            assert {name: getattr(stats, name) for name in names} == {name: getattr(want, name) for name in names}
            assert sorted(stats.engines) == ["decode 1", "prefill 0"]
            pid = llm.engine_pid
            assert pid is not None
            kill_engine(0)(pid)
            await complete(llm, prompts[1], GREEDY)
            later = await llm.stats()
            assert (later.restarts, later.engines["prefill 0"].restarts) == (1, 1)
            assert later.prefix_cache_queries == stats.prefix_cache_queries + len(prompts[1])
            await settled(llm)

    within(main())


def test_a_store_outlives_the_cluster(tmp_path: Path) -> None:
    prompts = make_prompts(6, seed=4)
    settings = {"kv_store": str(tmp_path), "kv_store_capacity_bytes": 1 << 30}

    async def main() -> None:
        async with cluster("qwen3", 1, 1, **settings) as llm:
            first = await complete_all(llm, prompts, GREEDY)
            await settled(llm)
            assert (await llm.stats()).store_blocks_lost == 0
        async with cluster("qwen3", 1, 1, **settings) as llm:
            assert await complete_all(llm, prompts, GREEDY) == first
            stats = await llm.stats()
            assert stats.store_blocks_read >= sum((len(prompt) - 1) // 8 for prompt in prompts[1:4])
            # An answer is stored, too: a conversation goes on from it.
            talk = [*prompts[1], *first[1][0]]
            output = await complete(llm, talk, GREEDY)
            assert output.num_cached_tokens is not None
            assert output.num_cached_tokens >= (len(talk) - 2) // 8 * 8
            await settled(llm)

    within(main())


def kill_engine(number: int) -> Callable[[int], None]:
    """Kills the prefill (0) or decode (1) engine of a 1P1D cluster."""
    return lambda pid: os.kill(children(pid, "jaxdual.engine.process")[number], signal.SIGKILL)


def kill_agent(number: int) -> Callable[[int], None]:
    return lambda pid: os.kill(children(pid, "jaxdual.agent.process")[number], signal.SIGKILL)


def stop_agent(number: int) -> Callable[[int], None]:
    return lambda pid: os.kill(children(pid, "jaxdual.agent.process")[number], signal.SIGSTOP)


def kill_cluster(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


FAULTS = {
    "prefill engine": kill_engine(0),
    "decode engine": kill_engine(1),
    "agent 0": kill_agent(0),
    "agent 1": kill_agent(1),
    "agent 0 stopped": stop_agent(0),
    "agent 1 stopped": stop_agent(1),
    "cluster": kill_cluster,
}


@pytest.mark.faults
@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_dies_every_request_is_answered(fault: str) -> None:
    prompts = make_prompts(16, seed=6)
    want = alone("qwen3", prompts, GREEDY)

    async def main() -> None:
        async with cluster("qwen3", 1, 1, compile_ahead=True) as llm:
            ties = TieCounter("qwen3")
            for _ in range(2):
                work = asyncio.create_task(complete_all(llm, prompts, GREEDY))
                await asyncio.sleep(random.Random(fault).uniform(0.05, 0.4))
                assert llm.engine_pid is not None
                FAULTS[fault](llm.engine_pid)
                for prompt, (expected,), (got,) in zip(prompts, want, await work, strict=True):
                    ties.compare(prompt, expected, got)
            assert ties.ties <= 1
            await llm.warmed_up()
            await settled(llm)
            pid = llm.engine_pid
            assert pid is not None
        left = children(os.getpid(), "jaxdual.engine.process") + children(os.getpid(), "jaxdual.agent.process")
        assert not left

    within(main())
