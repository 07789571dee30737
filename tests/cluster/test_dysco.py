"""Requests decoded by DySCO whose prompts one engine computes and another goes on from: recorded runs, exactly."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from jaxdual import LLM, AsyncLLM, EngineConfig, RequestOutput
from jaxdual.config import ClusterConfig
from jaxdual.decoding.dysco import first_observed
from tests.cluster.test_processes import complete, kill_engine, settled, within
from tests.decoding.test_dysco import FIXTURES, meta
from tests.decoding.test_dysco_engine import SETTINGS, VANILLA, assert_recorded, others, params_of, prompt_of

# Each starts processes that import JAX.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("shared_programs")]


@contextlib.asynccontextmanager
async def cluster(case: str, **settings: Any) -> AsyncIterator[AsyncLLM]:
    config = EngineConfig(model=str(FIXTURES / case), **SETTINGS | settings, compile_ahead=False)
    async with AsyncLLM.from_config(config, cluster=ClusterConfig(prefill=1, decode=1)) as llm:
        yield llm


def told(output: RequestOutput) -> list[list[int]]:
    return [list(one.token_ids) for one in output.outputs]


def test_recorded_runs_are_handed_from_a_prefill_to_a_decode_engine(tmp_path: Path) -> None:
    """Beside requests without DySCO, by a store as well, and after a decode engine was killed in the middle."""
    case = "qwen3_hybrid"
    prompts = [prompt_of(case), *others(3), prompt_of(case)]
    params = [params_of(case) if prompt == prompt_of(case) else VANILLA for prompt in prompts]
    of_case = meta(case)
    observed = first_observed(of_case["prompt_length"], of_case["I"], of_case["C"])
    alone = LLM(FIXTURES / case, **SETTINGS)
    want = [told(output) for output in alone.generate(prompts, params)]

    async def main() -> None:
        store = {"kv_store": str(tmp_path), "kv_store_capacity_bytes": 1 << 30}
        async with cluster(case, **store) as llm:
            first = await complete(llm, prompts[0]["prompt_token_ids"], params[0])
            assert_recorded(case, first.outputs[0])
            stats = await llm.stats()
            assert stats.handed_over_tokens == observed
            assert stats.engines["prefill 0"].computed_prompt_tokens == observed
            watched = of_case["prompt_length"] - 1 - observed  # the last one's row gives the first token
            assert stats.engines["decode 1"].computed_prompt_tokens == watched
            assert stats.generation_tokens == of_case["new_tokens"]
            for _ in range(2):
                work = (
                    complete(llm, prompt["prompt_token_ids"], one) for prompt, one in zip(prompts, params, strict=True)
                )
                got = await asyncio.gather(*work)
                assert_recorded(case, got[0].outputs[0])
                assert_recorded(case, got[-1].outputs[0])
                assert [told(output) for output in got] == want
                assert got[0].num_cached_tokens == observed // SETTINGS["block_size"] * SETTINGS["block_size"]
            await settled(llm)
            stream = await llm.submit(prompts[0], params[0])
            await anext(stream)
            pid = llm.engine_pid
            assert pid is not None
            kill_engine(1)(pid)
            async for output in stream:
                final = output
            assert told(final) == want[0]
            while not (await llm.stats()).restarts:  # what the request had may have come before the engine's end did
                await asyncio.sleep(0.05)
            await settled(llm)

    within(main())


def test_several_outputs_and_prompts_with_nothing_to_hand_over() -> None:
    case = "llama_topk"
    greedy = params_of(case, return_selection=False)
    params = dataclasses.replace(greedy, n=2, temperature=1.0, seed=3, logprobs=None)
    short = {"prompt_token_ids": prompt_of(case)["prompt_token_ids"][:6]}
    prompts = [prompt_of(case), short]
    want = [told(output) for output in LLM(FIXTURES / case, **SETTINGS).generate(prompts, params)]

    async def main() -> None:
        async with cluster(case) as llm:
            got = [await complete(llm, prompt["prompt_token_ids"], params) for prompt in prompts]
            assert [told(output) for output in got] == want
            await settled(llm)

    within(main())
