"""Cheaper modes of DySCO: each as the dense reference defines it, alone, beside others, and after giving way."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

import models
from jaxdual import LLM, DyscoParams, SamplingParams
from tests.decoding.dense_dysco import DenseDysco, Settings, Trace
from tests.decoding.test_dysco import FIXTURES, meta, recorded
from tests.decoding.test_dysco_engine import SETTINGS, VANILLA, assert_recorded, dysco_of, others, params_of, prompt_of

pytestmark = pytest.mark.usefixtures("shared_programs")

MODES = ("tail_chunk", "lag", "split", "lag_fresh", "refresh")
TOKENS = 12


def reference(case: str, prompt: list[int], mode: str) -> Trace:
    of_case = meta(case)
    names = ("heads", "C", "I", "p", "K", "beta", "gamma", "template_sequences")
    settings = Settings(**{name: of_case[name] for name in names})
    return DenseDysco(models.load(FIXTURES / case, dtype="float32"), settings).run(prompt, TOKENS, mode, 3)


def params(case: str, mode: str) -> SamplingParams:
    dysco = dysco_of(case, mode=mode, refresh_every=3)
    return SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True, dysco=dysco)


def assert_is(output: Any, want: Trace) -> None:
    assert output.token_ids == want.generated
    assert len(output.selection) == len(want.selected)
    for step, selected, relevance in zip(output.selection, want.selected, want.relevance, strict=True):
        np.testing.assert_array_equal(step.selected, np.flatnonzero(selected))
        np.testing.assert_allclose(step.relevance, relevance, atol=2e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", ["qwen3_hybrid", "llama_topk"])
def test_modes_are_those_of_the_dense_reference(case: str, mode: str) -> None:
    """Prompts of all lengths, too: shorter than the tail, and than what is observed."""
    llm = LLM(FIXTURES / case, **SETTINGS)
    full = prompt_of(case)["prompt_token_ids"]
    for length in (len(full), 1, 4, 9):
        want = reference(case, full[:length], mode)
        (output,) = llm.generate([{"prompt_token_ids": full[:length]}], params(case, mode))
        assert_is(output.outputs[0], want)
    llm.check_integrity()


def test_modes_share_steps() -> None:
    """All of them, the authors' own and requests without DySCO side by side: each gives what it gives alone."""
    case = "qwen3_hybrid"
    llm = LLM(FIXTURES / case, **SETTINGS | {"max_num_seqs": 8, "max_num_batched_tokens": 24})
    static = params_of(case, static=True)
    prompts = [prompt_of(case)] * (len(MODES) + 2) + others(2)
    asked = [*(params(case, mode) for mode in MODES), static, params_of(case), VANILLA, VANILLA]
    alone = LLM(FIXTURES / case, **SETTINGS)
    outputs = llm.generate(prompts, asked)
    for mode, output in zip(MODES, outputs, strict=False):
        assert_is(output.outputs[0], reference(case, prompt_of(case)["prompt_token_ids"], mode))
    assert_recorded(case, outputs[len(MODES) + 1].outputs[0])
    for number in (len(MODES), -2, -1):
        (want,) = alone.generate([prompts[number]], asked[number])
        assert outputs[number].outputs[0].token_ids == want.outputs[0].token_ids
    llm.check_integrity()


def test_modes_on_several_devices() -> None:
    case, modes = "qwen3_hybrid", ("tail_chunk", "lag_fresh")
    sizes = {"data_parallel_size": 2, "tensor_parallel_size": 2, "max_num_seqs": 2}
    llm = LLM(FIXTURES / case, **SETTINGS | sizes)
    outputs = llm.generate([prompt_of(case)] * 2, [params(case, mode) for mode in modes])
    for mode, output in zip(modes, outputs, strict=True):
        assert_is(output.outputs[0], reference(case, prompt_of(case)["prompt_token_ids"], mode))
    llm.check_integrity()


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_modes_go_on_after_they_gave_way(preemption: str) -> None:
    case = "qwen3_hybrid"
    host = {"host_cache_bytes": 1 << 20} if preemption == "swap" else {}
    llm = LLM(FIXTURES / case, **SETTINGS, **host, num_kv_blocks=32, preemption_mode=preemption)
    growing = dataclasses.replace(VANILLA, max_tokens=90)
    before = [{"prompt_token_ids": list(range(number, number + 40))} for number in range(2)]
    kinds = [mode for mode in MODES for _ in range(2)]
    outputs = llm.generate(
        [*before, *[prompt_of(case)] * len(kinds)], [growing, growing, *(params(case, mode) for mode in kinds)]
    )
    want = {mode: reference(case, prompt_of(case)["prompt_token_ids"], mode) for mode in MODES}
    for mode, output in zip(kinds, outputs[2:], strict=True):
        assert_is(output.outputs[0], want[mode])
    assert llm.stats().preemptions > 0
    llm.check_integrity()


def test_tokens_of_modes_differ_from_the_authors_own() -> None:
    """The tail at once gives theirs here, as it did for the authors' code; the others don't, so each needs its name."""
    case = "qwen3_hybrid"
    prompt, exact = prompt_of(case)["prompt_token_ids"], recorded(case)["generated"].tolist()
    different = {mode for mode in MODES if reference(case, prompt, mode).generated != exact}
    assert different >= {"lag", "lag_fresh"}


def test_a_tail_is_never_longer_than_the_prompt_nor_than_a_chunk_may_be() -> None:
    case = "llama_topk"
    llm = LLM(FIXTURES / case, **SETTINGS)
    prompt = prompt_of(case)["prompt_token_ids"]

    def asked(tail: int) -> SamplingParams:
        dysco = dysco_of(case, mode="tail_chunk", tail=tail, return_selection=False)
        return SamplingParams(max_tokens=3, temperature=0, dysco=dysco)

    short = llm.generate([{"prompt_token_ids": prompt[:9]}] * 2, [asked(2**31 - 1), asked(9)])
    assert short[0].outputs[0].token_ids == short[1].outputs[0].token_ids
    (output,) = llm.generate([{"prompt_token_ids": prompt}], asked(63))
    assert len(output.outputs[0].token_ids) == 3
    for tail in (64, 2**31 - 1):
        with pytest.raises(ValueError, match="must be below 64 for mode='tail_chunk'"):
            llm.generate([{"prompt_token_ids": prompt}], asked(tail))


def test_parameters_of_modes_are_checked() -> None:
    heads = [(0, 0)]
    for settings, message in (
        ({"mode": "fast"}, "mode='fast' must be one of exact, tail_chunk, lag, split, lag_fresh, refresh"),
        ({"mode": "lag", "static": True}, "static and mode='lag' exclude each other"),
        ({"mode": "refresh", "refresh_every": 1}, "refresh_every=1 must be a whole number of at least 2"),
        ({"observe": 65}, "observe=65 must be a whole number of at least 0 and at most 64"),
        ({"top_k": 2**31}, "top_k=2147483648 must be a whole number of at least 1"),
        ({"tail": 10**26}, "must be a whole number of at least 0"),
        ({"template_sequences": [[10**26]]}, "must be a whole number of at least 0"),
        ({"template_sequences": [[1]] * 257}, "257 template_sequences; at most 256 are possible"),
        ({"template_sequences": [[1] * 257]}, "a template sequence of 257 tokens; at most 256 are one"),
    ):
        with pytest.raises(ValueError, match=message):
            DyscoParams(heads=heads, **settings)  # type: ignore[arg-type]
