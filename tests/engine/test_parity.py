"""The engine gives the tokens that Hugging Face transformers gave for the recorded models."""

import numpy as np
import pytest

from jaxdual import LLM, SamplingParams
from tests.engine.models import FIXTURES, expected

pytestmark = pytest.mark.usefixtures("shared_programs")

GREEDY = SamplingParams(max_tokens=32, temperature=0, ignore_eos=True)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen2", "qwen3", "qwen3_moe"])
def test_greedy_tokens_equal_the_recorded_ones(name: str, overlap: bool) -> None:
    """Chunked prefill (16 tokens a step), paged cache (8 tokens a page), both prompts in one batch."""
    want = expected(name)
    llm = LLM(
        FIXTURES / name,
        block_size=8,
        max_num_seqs=4,
        max_num_batched_tokens=16,
        max_model_len=256,
        async_scheduling=overlap,
    )
    outputs = llm.generate([{"prompt_token_ids": want[f"prompt{i}"].tolist()} for i in (0, 1)], GREEDY)
    for i, output in enumerate(outputs):
        assert output.outputs[0].token_ids == want[f"greedy{i}"].tolist()
        assert output.outputs[0].finish_reason == "length"
    llm.check_integrity()


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
def test_prompt_and_output_logprobs_equal_those_of_the_recorded_logits(name: str) -> None:
    want = expected(name)
    llm = LLM(FIXTURES / name, block_size=8, max_num_seqs=4, max_num_batched_tokens=32, max_model_len=256)
    params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True, logprobs=3, prompt_logprobs=2)
    prompts = [want[f"prompt{i}"] for i in (0, 1)]
    for _ in range(2):  # the second time the prefix cache must not hide prompt positions
        for i, output in enumerate(llm.generate([{"prompt_token_ids": p} for p in prompts], params)):
            logits = want[f"logits{i}"].astype(np.float64)
            logprobs = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
            logprobs -= logits.max(-1, keepdims=True)
            assert output.prompt_logprobs is not None
            assert output.prompt_logprobs[0] is None
            for position, entries in enumerate(output.prompt_logprobs[1:]):
                token = int(prompts[i][position + 1])
                assert entries is not None
                assert set(np.argsort(-logprobs[position])[:2]) <= set(entries)
                assert entries[token].logprob == pytest.approx(logprobs[position, token], abs=5e-3)
                assert entries[token].rank == 1 + (logprobs[position] > logprobs[position, token]).sum()
            first = output.outputs[0].logprobs
            assert first is not None
            assert len(first) == 2
            assert set(first[0]) == set(np.argsort(-logprobs[-1])[:3])
            assert first[0][output.outputs[0].token_ids[0]].rank == 1
