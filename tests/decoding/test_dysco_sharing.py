"""DySCO in an engine that is shared: prefix caches, pages dealt anew, several outputs of a prompt; and limits that take
in everything."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jaxdual import LLM, SamplingParams
from jaxdual.outputs import CompletionOutput, RequestOutput
from tests.decoding.test_dysco import CASES, FIXTURES, meta, recorded
from tests.decoding.test_dysco_engine import SETTINGS, assert_recorded, dysco_of, others, params_of, prompt_of

pytestmark = pytest.mark.usefixtures("shared_programs")

CASE = "qwen3_hybrid"
PLAIN = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logprobs=20)


def assert_alike(found: CompletionOutput, wanted: CompletionOutput, atol: float) -> None:
    """The same tokens, with the same log-probabilities up to rounding."""
    assert found.token_ids == wanted.token_ids
    assert found.logprobs is not None
    assert wanted.logprobs is not None
    for one, other in zip(found.logprobs, wanted.logprobs, strict=True):
        for token in one.keys() & other.keys():
            assert one[token].logprob == pytest.approx(other[token].logprob, abs=atol)


def answer(llm: LLM, params: SamplingParams) -> RequestOutput:
    (output,) = llm.generate([prompt_of(CASE)], params)
    llm.check_integrity()
    return output


@pytest.mark.parametrize("limits", [{"top_p": None, "top_k": 10_000}, {"top_p": 1.0, "top_k": None}])
@pytest.mark.parametrize("case", CASES)
def test_attention_that_is_raised_everywhere_is_as_always(case: str, limits: dict[str, Any]) -> None:
    """A softmax does not change when the same is added to all of its scores."""
    llm = LLM(FIXTURES / case, **SETTINGS, enable_prefix_caching=False)
    (wanted,) = llm.generate([prompt_of(case)], PLAIN)
    dysco = dysco_of(case, **limits, strength=3.0, template_sequences=[])
    raised = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logprobs=20, dysco=dysco)
    (found,) = llm.generate([prompt_of(case)], raised)
    assert_alike(found.outputs[0], wanted.outputs[0], 1e-4)
    selection = found.outputs[0].selection
    assert selection is not None
    assert all(step.selected == list(range(step.position + 1)) for step in selection)


def test_a_plain_request_after_a_raised_one_sees_none_of_its_blocks() -> None:
    llm, fresh = (LLM(FIXTURES / CASE, **SETTINGS) for _ in range(2))
    assert_recorded(CASE, answer(llm, params_of(CASE)).outputs[0])
    found, wanted = answer(llm, PLAIN), answer(fresh, PLAIN)
    assert 0 < found.num_cached_tokens <= first_watched()
    assert_alike(found.outputs[0], wanted.outputs[0], 1e-4)
    # What the raised request has generated, as a prompt: blocks of raised tokens would be hits.
    longer = {"prompt_token_ids": [*recorded(CASE)["prompt_ids"].tolist(), *recorded(CASE)["generated"].tolist()]}
    again, other = (engine.generate([longer], PLAIN)[0] for engine in (llm, fresh))
    assert_alike(again.outputs[0], other.outputs[0], 1e-4)


def test_a_raised_request_after_a_plain_one_takes_no_block_of_watched_or_raised_tokens() -> None:
    llm = LLM(FIXTURES / CASE, **SETTINGS)
    plain = answer(llm, PLAIN)
    assert plain.num_cached_tokens == 0
    assert answer(llm, PLAIN).num_cached_tokens > first_watched()  # there is more to be had
    found = answer(llm, params_of(CASE))
    assert 0 < found.num_cached_tokens <= first_watched()
    assert_recorded(CASE, found.outputs[0])


def test_raised_requests_of_other_strengths_share_blocks_before_what_is_raised_only() -> None:
    llm = LLM(FIXTURES / CASE, **SETTINGS)
    stronger = params_of(CASE, strength=5.0)
    wanted = answer(LLM(FIXTURES / CASE, **SETTINGS), stronger)
    for _ in range(2):
        assert_recorded(CASE, answer(llm, params_of(CASE)).outputs[0])
        found = answer(llm, stronger)
        assert 0 < found.num_cached_tokens <= first_watched()
        assert_alike(found.outputs[0], wanted.outputs[0], 1e-4)


def first_watched() -> int:
    """Position of the first token whose attention counts: its attention is not in the cache, so no hit goes so far."""
    of_case = meta(CASE)
    return int(of_case["prompt_length"] - of_case["I"] - of_case["C"])


@pytest.mark.parametrize("block_size", [4, 64])
def test_recorded_runs_on_pages_of_any_size_in_any_order(block_size: int) -> None:
    """Pages come back from requests of all lengths, and are dealt out in another order each time."""
    settings = SETTINGS | {"block_size": block_size, "enable_prefix_caching": False}
    llm = LLM(FIXTURES / CASE, **settings)
    short = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
    for seed in range(3):
        llm.generate(others(6, seed), short)
        assert_recorded(CASE, answer(llm, params_of(CASE)).outputs[0])


def test_sequences_that_give_way_tell_each_step_once() -> None:
    """Pages for three of four prompts: those that wait compute some raised tokens a second time."""
    llm = LLM(FIXTURES / CASE, **SETTINGS, num_kv_blocks=32, enable_prefix_caching=False)
    outputs = llm.generate([prompt_of(CASE)] * 4, params_of(CASE))
    assert llm.stats().preemptions > 0
    for output in outputs:
        assert_recorded(CASE, output.outputs[0])


def test_each_of_several_outputs_of_a_prompt_is_the_recorded_one() -> None:
    dysco = dysco_of(CASE)
    params = SamplingParams(n=3, max_tokens=12, temperature=0, ignore_eos=True, logprobs=20, dysco=dysco)
    outputs = answer(LLM(FIXTURES / CASE, **SETTINGS), params).outputs
    assert [output.index for output in outputs] == [0, 1, 2]
    for output in outputs:
        assert_recorded(CASE, output)


def test_sampled_outputs_of_a_prompt_are_those_of_requests_of_their_own() -> None:
    """They part after the prompt, and each goes on with a relevance of its own."""
    llm = LLM(FIXTURES / CASE, **SETTINGS)
    drawn = SamplingParams(n=3, max_tokens=8, temperature=1.0, seed=5, ignore_eos=True, dysco=dysco_of(CASE))
    outputs = answer(llm, drawn).outputs
    assert len({tuple(output.token_ids) for output in outputs}) > 1
    prompt = recorded(CASE)["prompt_ids"].tolist()
    for output in outputs:
        assert output.selection is not None
        forced = SamplingParams(
            max_tokens=1, temperature=0, ignore_eos=True, dysco=dysco_of(CASE, tail=tail_of(output))
        )
        (whole,) = llm.generate([{"prompt_token_ids": [*prompt, *output.token_ids[:-1]]}], forced)
        selection = whole.outputs[0].selection
        assert selection is not None
        for found, wanted in zip(output.selection, selection, strict=True):
            assert (found.position, found.selected) == (wanted.position, wanted.selected)
            np.testing.assert_allclose(found.relevance, wanted.relevance, atol=1e-5)


def tail_of(output: CompletionOutput) -> int:
    """Of a prompt that ends with an output but for its last token: raised tokens begin where they began for it."""
    return int(meta(CASE)["I"]) + len(output.token_ids) - 1
