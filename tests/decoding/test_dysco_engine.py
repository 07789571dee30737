"""DySCO in the engine: recorded runs of the authors' code, alone and beside other requests, in chunks, preempted."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

import models
from jaxdual import LLM, AsyncLLM, DyscoParams, SamplingParams
from jaxdual.config import ConfigError
from jaxdual.engine.dysco_slots import DyscoSlots
from jaxdual.outputs import CompletionOutput
from jaxdual.scheduling.plan import ParkedSlot
from jaxdual.telemetry import CompileCounter
from tests.decoding.dense_dysco import DenseDysco, Settings
from tests.decoding.test_dysco import CASES, FIXTURES, meta, recorded, unpacked
from tests.engine.models import folder

SETTINGS: dict[str, Any] = {
    "block_size": 8,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "max_model_len": 256,
    "seed": 0,
}


def dysco_of(case: str, **changes: Any) -> DyscoParams:
    of_case = meta(case)
    settings: dict[str, Any] = {
        "heads": of_case["heads"],
        "top_p": of_case["p"],
        "top_k": of_case["K"],
        "strength": of_case["beta"],
        "decay": of_case["gamma"],
        "observe": of_case["C"],
        "tail": of_case["I"],
        "template_sequences": of_case["template_sequences"],
        "static": not of_case["dynamic"],
        "return_selection": True,
    }
    return DyscoParams(**settings | changes)


def params_of(case: str, **changes: Any) -> SamplingParams:
    return SamplingParams(
        max_tokens=meta(case)["new_tokens"],
        temperature=0,
        ignore_eos=True,
        logprobs=20,
        dysco=dysco_of(case, **changes),
    )


def assert_recorded(case: str, output: CompletionOutput) -> None:
    want, of_case = recorded(case), meta(case)
    assert output.token_ids == want["generated"].tolist()
    selected = unpacked(want["selected_packed"], want["n_keys"])
    assert output.selection is not None
    assert [step.position for step in output.selection] == want["step_position"].tolist()
    for number, step in enumerate(output.selection):
        np.testing.assert_array_equal(step.selected, np.flatnonzero(selected[number]))
        np.testing.assert_allclose(step.relevance, want["r"][number, : want["n_keys"][number]], atol=1e-5)
    logits = want["logits"][of_case["I"] :].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert output.logprobs is not None
    for row, scores in zip(logprobs, output.logprobs, strict=True):
        for token, score in scores.items():
            assert abs(score.logprob - row[token]) <= 4e-4 * np.abs(want["logits"]).max()


def prompt_of(case: str) -> dict[str, list[int]]:
    return {"prompt_token_ids": recorded(case)["prompt_ids"].tolist()}


def others(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    rng = random.Random(seed)
    return [{"prompt_token_ids": [rng.randrange(256) for _ in range(rng.randint(1, 60))]} for _ in range(count)]


pytestmark = pytest.mark.usefixtures("shared_programs")

VANILLA = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_recorded_runs_alone(case: str, overlap: bool) -> None:
    llm = LLM(FIXTURES / case, **SETTINGS, async_scheduling=overlap)
    (output,) = llm.generate([prompt_of(case)], params_of(case))
    assert_recorded(case, output.outputs[0])
    llm.check_integrity()


@pytest.mark.parametrize("case", CASES)
def test_recorded_runs_beside_other_requests_in_small_chunks(case: str) -> None:
    """And those others, without DySCO or with other heads and limits, are what they are alone."""
    llm = LLM(FIXTURES / case, **SETTINGS | {"max_num_batched_tokens": 16})
    other = params_of(case, heads=[(0, 1), (4, 6)], top_k=5, top_p=None, strength=3.0, preset="paper", decay=None)
    prompts = [*others(3), prompt_of(case), *others(2, seed=1), prompt_of(case)]
    params = [VANILLA, other, VANILLA, params_of(case), other, VANILLA, params_of(case)]
    together = llm.generate(prompts, params)
    for number in (3, 6):
        assert_recorded(case, together[number].outputs[0])
    alone = LLM(FIXTURES / case, **SETTINGS)
    for prompt, one, output in zip(prompts, params, together, strict=True):
        (again,) = alone.generate([prompt], one)
        assert again.outputs[0].token_ids == output.outputs[0].token_ids


@pytest.mark.parametrize(("mode", "ranks"), [("recompute", 1), ("swap", 1), ("swap", 2)])
def test_recorded_runs_that_give_way_and_go_on(
    mode: Literal["recompute", "swap"], ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come last beside requests that grow until memory is full, so that they give way amid what they raise."""
    case, parked = "qwen3_hybrid", list[int]()
    park = DyscoSlots.park

    def noted(self: DyscoSlots, rank: int, one: ParkedSlot) -> None:
        park(self, rank, one)
        parked.append(one.seq_id)

    monkeypatch.setattr(DyscoSlots, "park", noted)
    host = {"host_cache_bytes": 1 << 20} if mode == "swap" else {}
    llm = LLM(FIXTURES / case, **SETTINGS, **host, num_kv_blocks=32, preemption_mode=mode, data_parallel_size=ranks)
    growing = dataclasses.replace(VANILLA, max_tokens=90)
    before = [{"prompt_token_ids": list(range(number, number + 40))} for number in range(2 * ranks)]
    outputs = llm.generate(
        [*before, *[prompt_of(case)] * (4 * ranks)], [*[growing] * len(before), *[params_of(case)] * (4 * ranks)]
    )
    for output in outputs[len(before) :]:
        assert_recorded(case, output.outputs[0])
    stats = [rank.scheduler.stats for rank in llm._engine.ranks]
    if mode == "swap":
        assert parked
        assert not any(one.preemptions_recompute for one in stats)
    else:
        assert any(one.preemptions_recompute for one in stats)
    llm.check_integrity()
    assert llm._engine.runner._dysco is not None
    assert not llm._engine.runner._dysco._parked


def test_without_raised_attention_tokens_are_as_always() -> None:
    for case in CASES:
        llm = LLM(FIXTURES / case, **SETTINGS)
        (output,) = llm.generate([prompt_of(case)], params_of(case, strength=1.0))
        assert output.outputs[0].token_ids == recorded(case)["vanilla_generated"].tolist()


def test_prefix_caches_hold_nothing_that_was_raised() -> None:
    """A request without DySCO after one with it, of the same prompt, and the other way round."""
    case = "qwen3_hybrid"
    llm = LLM(FIXTURES / case, **SETTINGS)
    vanilla = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    full: Sequence[int] = [*recorded(case)["prompt_ids"].tolist(), *recorded(case)["generated"].tolist()]
    want = LLM(FIXTURES / case, **SETTINGS).generate([{"prompt_token_ids": list(full)}], vanilla)[0]
    for _ in range(2):
        (output,) = llm.generate([prompt_of(case)], params_of(case))
        assert_recorded(case, output.outputs[0])
        (other,) = llm.generate([prompt_of(case)], vanilla)
        assert other.outputs[0].token_ids == recorded(case)["vanilla_generated"].tolist()
    assert output.num_cached_tokens == 104  # of 108 tokens before those that are watched, whole blocks
    (longer,) = llm.generate([{"prompt_token_ids": list(full)}], vanilla)
    assert longer.outputs[0].token_ids == want.outputs[0].token_ids


def test_without_tail_and_observation_only_generated_tokens_are_raised() -> None:
    """Also where the last token of the prompt is computed by itself, since all before it were cached."""
    case = "qwen3_hybrid"
    llm = LLM(FIXTURES / case, **SETTINGS)
    prompt = {"prompt_token_ids": prompt_of(case)["prompt_token_ids"][:33]}
    outputs = [llm.generate([prompt], params_of(case, observe=0, tail=0))[0] for _ in range(2)]
    assert [output.num_cached_tokens for output in outputs] == [0, 32]
    for output in outputs:
        assert output.outputs[0].token_ids == outputs[0].outputs[0].token_ids
        assert [step.position for step in output.outputs[0].selection or ()] == list(range(33, 33 + 11))


def test_an_engine_in_a_process_of_its_own() -> None:
    case = "llama_topk"

    async def run() -> CompletionOutput:
        async with AsyncLLM(FIXTURES / case, **SETTINGS) as llm:
            async for output in llm.generate(prompt_of(case), params_of(case)):
                final = output
            return final.outputs[0]

    assert_recorded(case, asyncio.run(asyncio.wait_for(run(), 300)))


def test_requests_that_cannot_be_decoded_so_are_refused() -> None:
    case = "llama_topk"
    llm = LLM(FIXTURES / case, **SETTINGS)
    for dysco, message in (
        (DyscoParams(), "no profile for the model 'llama_topk': give heads"),
        (DyscoParams(profile="mine"), "profile='mine' must be a file, or one of llama-3.1-8b, mixtral-8x7b"),
        (DyscoParams(profile="qwen3-8b"), "profile='qwen3-8b' is of a model of 36 layers with 32 heads each, and this"),
        (DyscoParams(profile=str(FIXTURES / case / "config.json")), "is not a profile: KeyError: 'num_layers'"),
        (DyscoParams(profile="./nowhere.json"), "can't be read"),
        (DyscoParams(heads=[(5, 0)]), r"heads=\[5, 0\] must be below \[5, 8\]"),
        (DyscoParams(heads=[(0, 8)]), r"heads=\[0, 8\] must be below \[5, 8\]"),
    ):
        with pytest.raises(ValueError, match=message):
            llm.generate([prompt_of(case)], SamplingParams(dysco=dysco))
    with pytest.raises(ValueError, match="prompt_logprobs and dysco exclude each other"):
        SamplingParams(dysco=DyscoParams(heads=[(0, 0)]), prompt_logprobs=1)
    with pytest.raises(ValueError, match="return_selection=True: without dysco nothing is selected"):
        SamplingParams(return_selection=True)
    asked = SamplingParams(dysco=DyscoParams(heads=[(0, 0)]), return_selection=True)
    assert asked == SamplingParams(dysco=DyscoParams(heads=[(0, 0)], return_selection=True), return_selection=True)
    with pytest.raises(ValueError, match="must be DyscoParams"):
        SamplingParams(dysco={"heads": [(0, 0)]})  # type: ignore[arg-type]


# A static selection of which nothing was observed is of what the first raised token looks at: the reference has none.
@pytest.mark.parametrize(
    ("length", "static"), [*((length, False) for length in (1, 2, 3, 7, 12, 13)), (7, True), (12, True), (13, True)]
)
def test_short_prompts_and_static_selections_are_those_of_the_dense_reference(length: int, static: bool) -> None:
    """Prompts shorter than what is observed and the tail together, too."""
    case = "qwen3_hybrid"
    prompt, of_case = recorded(case)["prompt_ids"].tolist()[:length], meta(case)
    names = ("heads", "C", "I", "p", "K", "beta", "gamma", "template_sequences")
    reference = DenseDysco(
        models.load(FIXTURES / case, dtype="float32"),
        Settings(**{name: of_case[name] for name in names}, dynamic=not static),
    )
    want = reference.run(prompt, 8)
    llm = LLM(FIXTURES / case, **SETTINGS)
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, dysco=dysco_of(case, static=static))
    (output,) = llm.generate([{"prompt_token_ids": prompt}], params)
    assert output.outputs[0].token_ids == want.generated
    assert output.outputs[0].selection is not None
    for step, selected in zip(output.outputs[0].selection, want.selected, strict=True):
        np.testing.assert_array_equal(step.selected, np.flatnonzero(selected))


@pytest.mark.parametrize("sizes", [{}, {"tensor_parallel_size": 2}], ids=["one", "two"])
def test_with_a_profile_nothing_is_compiled_after_warm_up(tmp_path: Path, sizes: dict[str, int]) -> None:
    """And requests that name neither heads nor a profile are decoded by it: alone, several, and in small chunks."""
    case = "qwen3_hybrid"
    of_case = meta(case)
    profile = {
        "models": [],
        "num_layers": 5,
        "num_heads": 8,
        "heads": of_case["heads"],
        "template_sequences": of_case["template_sequences"],
        "limits": [{"max_tokens": None, "top_p": of_case["p"], "top_k": of_case["K"], "strength": of_case["beta"]}],
    }
    path = tmp_path / "heads.json"
    path.write_text(json.dumps(profile))
    dysco = {"dysco_profile": str(path), "dysco_requests": "compiled"}
    dysco |= {"preemption_mode": "swap", "host_cache_bytes": 1 << 20}
    llm = LLM(FIXTURES / case, **SETTINGS | {"max_num_batched_tokens": 32}, **sizes, **dysco, num_kv_blocks=32)
    llm.warmup()
    open_ones = {"heads": None, "top_p": "auto", "top_k": "auto", "strength": "auto", "template_sequences": None}
    asked = params_of(case, decay=None, **open_ones)
    with CompileCounter() as counter:
        for count in (1, 4):
            prompts = [*others(count), *[prompt_of(case)] * count]
            outputs = llm.generate(prompts, [*[VANILLA] * count, *[asked] * count])
            for output in outputs[count:]:
                assert_recorded(case, output.outputs[0])
        for refused in (
            DyscoParams(heads=[(1, 1)]),
            DyscoParams(profile=str(path)),
            DyscoParams(mode="lag"),
            DyscoParams(static=True),
            DyscoParams(observe=10),
        ):
            with pytest.raises(ValueError, match="here"):
                llm.generate([prompt_of(case)], SamplingParams(dysco=refused))
    assert counter.compilations == 0


def test_profiles_that_do_not_fit_are_told_while_loading(tmp_path: Path) -> None:
    for name, message in (
        ("qwen3-8b", "is of a model of 36 layers with 32 heads each, and this one has 5 with 8"),
        ("nowhere", "must be a file, or one of"),
    ):
        with pytest.raises(ConfigError, match=message):
            LLM(FIXTURES / "llama_topk", **SETTINGS, dysco_profile=name)
    with pytest.raises(ConfigError, match="dysco_requests='compiled' needs dysco_profile"):
        LLM(FIXTURES / "llama_topk", **SETTINGS, dysco_requests="compiled")
    with pytest.raises(ConfigError, match="dysco_profile"):
        LLM(FIXTURES / "llama_topk", **SETTINGS, dysco_requests="none", dysco_profile="qwen3-8b")
    with pytest.raises(ConfigError, match="dysco_profile='qwen3-8b': the model has layers that don't see all tokens"):
        LLM(folder("mistral_mixed"), **SETTINGS, dysco_profile="qwen3-8b")
