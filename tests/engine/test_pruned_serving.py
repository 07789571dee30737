"""Models with uneven widths and biases of their own are served like any other."""

from __future__ import annotations

import random
from typing import Any

import pytest

from jaxdual import LLM, SamplingParams
from jaxdual.telemetry import CompileCounter
from tests.engine.models import TieCounter, folder, logits_after
from tests.pruned_models import KINDS

pytestmark = pytest.mark.usefixtures("shared_programs")

SETTINGS: dict[str, Any] = {"block_size": 8, "max_model_len": 160, "max_num_seqs": 3, "max_num_batched_tokens": 24}
GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)


@pytest.mark.parametrize("name", KINDS)
def test_greedy_tokens_are_those_of_the_full_forward_pass(name: str) -> None:
    rng = random.Random(name)
    prompts = [[rng.randrange(96) for _ in range(length)] for length in (1, 8, 19, 25, 60)]
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    llm = LLM(folder(name), **SETTINGS)
    got = [output.outputs[0].token_ids for output in llm.generate(inputs, GREEDY)]
    for prompt, tokens in zip(prompts, got, strict=True):
        for at, token in enumerate(tokens):
            logits = logits_after(name, [*prompt, *tokens[:at]])
            assert logits.max() - logits[token] <= 1e-3
    ties = TieCounter(name)  # the second time from the prefix cache
    for prompt, want, output in zip(prompts, got, llm.generate(inputs, GREEDY), strict=True):
        ties.compare(prompt, want, output.outputs[0].token_ids)
    assert ties.ties <= 1
    llm.check_integrity()


def test_nothing_compiles_after_warm_up() -> None:
    llm = LLM(folder("pruned"), **SETTINGS)
    llm.warmup()
    with CompileCounter() as counter:
        llm.generate([{"prompt_token_ids": [1] * 40}], GREEDY)
    assert counter.compilations == 0
