"""Engines on several devices give the tokens of one on one device."""

from __future__ import annotations

import random
from typing import Any

import pytest

from jaxdual import LLM, SamplingParams
from jaxdual.config import ConfigError
from jaxdual.telemetry import CompileCounter
from tests.engine.models import FIXTURES, TieCounter, expected, folder

SIZES: list[dict[str, Any]] = [
    {"tensor_parallel_size": 2},
    {"expert_parallel_size": 4},
    {"data_parallel_size": 2, "expert_parallel_size": 2, "tensor_parallel_size": 2},
    {"expert_parallel_size": 2, "redundant_experts": 4, "dispatch_policy": "rr"},
]


def name_of(sizes: dict[str, Any]) -> str:
    return ",".join(f"{key.removesuffix('_size')}={value}" for key, value in sizes.items())


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        *(("qwen3_moe", sizes) for sizes in SIZES),
        ("mixtral", {"expert_parallel_size": 2, "tensor_parallel_size": 2}),
        ("llama", {"data_parallel_size": 3, "tensor_parallel_size": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else name_of(value),
)
def test_greedy_tokens_equal_the_recorded_ones(name: str, sizes: dict[str, Any]) -> None:
    want = expected(name)
    llm = LLM(FIXTURES / name, block_size=8, max_num_seqs=2, max_num_batched_tokens=16, max_model_len=256, **sizes)
    prompts = [{"prompt_token_ids": want[f"prompt{i}"].tolist()} for i in (0, 1)]
    outputs = llm.generate(prompts * 3, SamplingParams(max_tokens=32, temperature=0, ignore_eos=True))
    for i, output in enumerate(outputs):
        assert output.outputs[0].token_ids == want[f"greedy{i % 2}"].tolist()
    llm.check_integrity()
    if llm.config.num_ranks > 1:
        assert all(rank.kv.stats.prefix_queries for rank in llm._engine.ranks), "every rank has had a request"


def mixed_load(llm: LLM, seed: int) -> dict[str, tuple[list[int], list[list[int]]]]:
    """Prompts and outputs by request: shared prefixes, sampling of all kinds, more than fits into memory."""
    rng, submitted = random.Random(seed), {}
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0, "logprobs": 2},
        {"temperature": 0, "prompt_logprobs": 1},
        {"temperature": 0, "repetition_penalty": 1.3, "logit_bias": {3: 2.0}},
        {"temperature": 0.8, "seed": 5, "top_p": 0.9},
    ]
    for number in range(30):
        prompt = [rng.randrange(320) for _ in range(rng.choice([1, 7, 8, 20, 33]))]
        if number % 3 == 0:
            prompt = [9] * 24 + prompt
        params = SamplingParams(max_tokens=rng.randint(4, 24), ignore_eos=True, **kinds[number % len(kinds)])
        submitted[str(number)] = (prompt, llm.submit({"prompt_token_ids": prompt}, params, str(number)))
        if number % 4 == 0:
            llm.step()
    while llm.has_unfinished:
        llm.step()
    llm.check_integrity()
    return {key: (prompt, [one.token_ids for one in output.outputs]) for key, (prompt, output) in submitted.items()}


@pytest.mark.slow
@pytest.mark.parametrize("sizes", SIZES, ids=name_of)
@pytest.mark.parametrize("swap", [False, True])
def test_a_mixed_load_gives_the_tokens_of_one_device_and_compiles_nothing_more(
    sizes: dict[str, Any], swap: bool
) -> None:
    settings: dict[str, Any] = {
        "block_size": 8,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 32,
        "max_model_len": 96,
        "num_kv_blocks": 14,
        "seed": 0,
    }
    if swap:
        settings |= {"host_cache_bytes": 1 << 20, "preemption_mode": "swap"}
    want = mixed_load(LLM(folder("qwen3_moe"), **settings), 1)
    llm = LLM(folder("qwen3_moe"), **settings, **sizes)
    llm.warmup()
    with CompileCounter() as counter:
        got = mixed_load(llm, 1)
    assert counter.compilations == 0
    ties = TieCounter("qwen3_moe")
    for key, (prompt, outputs) in want.items():
        for one, other in zip(outputs, got[key][1], strict=True):
            if int(key) % 5 in (3, 4):  # penalised or drawn: a tie may turn out either way, which rarely happens
                assert one == other
            else:
                ties.compare(prompt, one, other)
    ties.check()
    assert llm.stats().preemptions > 0


def test_settings_that_do_not_go_together_are_refused() -> None:
    for settings, message in (
        ({"tensor_parallel_size": 16}, "needs 16 devices|must divide the model's 2 key-value heads"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size=0 must be at least 1"),
        ({"expert_parallel_size": 3}, "expert_parallel_size=3 must divide the 8 experts"),
        ({"expert_parallel_size": 2, "kv_store": "memory:", "kv_store_capacity_bytes": 1}, "one rank"),
        ({"tensor_parallel_size": 2, "kv_landing": "direct"}, "writes to one device"),
    ):
        with pytest.raises(ConfigError, match=message):
            LLM(FIXTURES / "qwen3_moe", **settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("iha", {"data_parallel_size": 2, "tensor_parallel_size": 2}),
        ("iha_full", {"tensor_parallel_size": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else name_of(value),
)
def test_pseudo_heads_of_heads_on_several_devices_give_the_tokens_of_one(name: str, sizes: dict[str, Any]) -> None:
    """Each device has its own query heads, and the keys and values of all."""
    settings: dict[str, Any] = {"block_size": 8, "max_num_seqs": 3, "max_num_batched_tokens": 24, "max_model_len": 160}
    settings |= {"num_kv_blocks": 20, "preemption_mode": "swap", "host_cache_bytes": 1 << 20}
    rng = random.Random(6)
    stem = [rng.randrange(96) for _ in range(20)]
    prompts = [stem[: rng.choice([0, 20])] + [rng.randrange(96) for _ in range(rng.randint(1, 40))] for _ in range(8)]
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    params = SamplingParams(max_tokens=50, temperature=0, ignore_eos=True)
    want = LLM(folder(name), **settings).generate(inputs, params)
    llm = LLM(folder(name), **settings, **sizes)
    ties = TieCounter(name)
    for prompt, alone, output in zip(prompts, want, llm.generate(inputs, params), strict=True):
        ties.compare(prompt, alone.outputs[0].token_ids, output.outputs[0].token_ids)
    ties.check()
    llm.check_integrity()
    specs = [arena.sharding.spec for arena in llm._engine.runner.device.arenas]
    whole = [group.every_head for group in llm._engine.runner.device.layout.groups]
    assert ["tensor" not in spec for spec in specs] == whole
    assert any(whole)
