"""DySCO in engines of several devices: tokens, selections and relevance of one device, and the same bits on each."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from jaxdual import LLM, DyscoParams, SamplingParams
from tests.decoding.test_dysco import FIXTURES
from tests.decoding.test_dysco_engine import SETTINGS, VANILLA, assert_recorded, others, params_of, prompt_of
from tests.engine.models import FIXTURES as MODELS


def test_recorded_runs_on_several_devices() -> None:
    """Beside requests without DySCO, on ranks that have sequences of their own, in all of them."""
    case, sizes = "llama_topk", {"tensor_parallel_size": 2, "data_parallel_size": 2}
    llm = LLM(FIXTURES / case, **SETTINGS, **sizes)
    prompts = [prompt_of(case), prompt_of(case), *others(3), prompt_of(case)]
    params = [params_of(case) if prompt == prompt_of(case) else VANILLA for prompt in prompts]
    outputs = llm.generate(prompts, params)
    alone = LLM(FIXTURES / case, **SETTINGS)
    for prompt, one, output in zip(prompts, params, outputs, strict=True):
        if one is VANILLA:
            (want,) = alone.generate([prompt], one)
            assert output.outputs[0].token_ids == want.outputs[0].token_ids
        else:
            assert_recorded(case, output.outputs[0])
    llm.check_integrity()
    dysco = llm._engine.runner._dysco
    assert dysco is not None
    copies: dict[Any, list[np.ndarray]] = {}
    for shard in dysco.state.relevance.addressable_shards:
        copies.setdefault(str(shard.index), []).append(np.asarray(shard.data))
    assert len(copies) == llm.config.num_ranks
    for first, *rest in copies.values():
        assert first.any(), "every rank has had a request"
        assert len(rest) == llm.config.tensor_parallel_size - 1
        for other in rest:
            np.testing.assert_array_equal(other, first)


def test_beside_experts_on_other_devices() -> None:
    rng = random.Random(5)
    prompts = [{"prompt_token_ids": [rng.randrange(320) for _ in range(length)]} for length in (60, 33, 60, 12)]
    dysco = DyscoParams(heads=[(0, 1), (1, 2)], top_k=6, top_p=None, strength=3.0, return_selection=True)
    params = [
        SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, dysco=one) for one in (dysco, None, dysco, dysco)
    ]
    name = MODELS / "qwen3_moe"
    want = LLM(name, **SETTINGS).generate(prompts, params)
    several = LLM(name, **SETTINGS, expert_parallel_size=2, tensor_parallel_size=2, data_parallel_size=2)
    for one, other in zip(want, several.generate(prompts, params), strict=True):
        first, second = one.outputs[0], other.outputs[0]
        assert first.token_ids == second.token_ids
        for step, again in zip(first.selection or (), second.selection or (), strict=True):
            assert step.selected == again.selected
            np.testing.assert_allclose(step.relevance, again.relevance, atol=1e-5)
