"""Models with Interleaved Head Attention are served like any other: tokens of their oracle, bytes of their base."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest

import models
from jaxdual import LLM, DyscoParams, SamplingParams
from jaxdual.heads.__main__ import main as heads_command
from tests.engine.models import TieCounter, folder
from tests.iha_models import KINDS, config_of, reference_logits

pytestmark = pytest.mark.usefixtures("shared_programs")

SETTINGS: dict[str, Any] = {"block_size": 8, "max_model_len": 160, "max_num_seqs": 4, "max_num_batched_tokens": 24}
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


def make_prompts(count: int) -> list[list[int]]:
    """Lengths around the borders of pages, windows and chunks."""
    rng = random.Random(1)
    return [[rng.randrange(96) for _ in range(rng.choice([1, 5, 6, 8, 12, 23, 24, 25]))] for _ in range(count)]


@pytest.mark.parametrize("name", KINDS)
def test_greedy_tokens_are_those_of_the_oracle(name: str) -> None:
    prompts = make_prompts(4)
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    llm = LLM(folder(name), **SETTINGS)
    got = [output.outputs[0].token_ids for output in llm.generate(inputs, GREEDY)]
    for prompt, tokens in zip(prompts, got, strict=True):
        logits = reference_logits(folder(name), config_of(name), [*prompt, *tokens])
        for at, token in enumerate(tokens, len(prompt) - 1):
            assert logits[at].max() - logits[at, token] <= 1e-3
    ties = TieCounter(name)  # the second time from the prefix cache
    for prompt, want, output in zip(prompts, got, llm.generate(inputs, GREEDY), strict=True):
        ties.compare(prompt, want, output.outputs[0].token_ids)
    assert ties.ties <= 1
    assert llm.stats().prefix_cache_hits > 0
    llm.check_integrity()


def test_long_requests_that_give_way_get_the_tokens_that_they_get_alone() -> None:
    rng = random.Random(3)
    requests = [([rng.randrange(96) for _ in range(rng.randint(1, 60))], rng.randint(40, 80)) for _ in range(10)]
    requests += [(prompt, count) for prompt, count in requests[:4]]
    params = [
        SamplingParams(max_tokens=count, temperature=0 if number % 3 else 0.8, seed=number, ignore_eos=True)
        for number, (_, count) in enumerate(requests)
    ]
    prompts = [{"prompt_token_ids": prompt} for prompt, _ in requests]
    alone = LLM(folder("iha"), **SETTINGS | {"max_num_seqs": 1, "enable_prefix_caching": False})
    want = [alone.generate([one], param)[0].outputs[0].token_ids for one, param in zip(prompts, params, strict=True)]
    ties = TieCounter("iha")
    for mode, host in (("recompute", 0), ("swap", 1 << 20)):
        llm = LLM(folder("iha"), **SETTINGS, num_kv_blocks=20, preemption_mode=mode, host_cache_bytes=host)
        got = llm.generate(prompts, params)
        for one, expected, output in zip(prompts, want, got, strict=True):
            ties.compare(one["prompt_token_ids"], expected, output.outputs[0].token_ids)
        assert llm.stats().preemptions > 0
        llm.check_integrity()
    ties.check()


@pytest.mark.parametrize("name", ["iha_full", "iha"])
def test_the_cache_takes_the_bytes_of_the_model_without_it(name: str, tmp_path: Path) -> None:
    config = config_of(name)
    base = dataclasses.replace(config, family="mistral", iha=None)
    models.save(models.init(base), tmp_path, dtype="float32")
    arenas = {}
    for kind, place in (("iha", folder(name)), ("base", tmp_path)):
        device = LLM(place, **SETTINGS, num_kv_blocks=40)._engine.runner.device  # type: ignore[attr-defined]
        rows = sum(arena.shape[0] * arena.shape[1] for arena in device.arenas)  # keys or values of a token in a layer
        arenas[kind] = sum(arena.nbytes for arena in device.arenas) / rows
        pages = [device.layout.full_block_bytes(group) for group in range(len(device.arenas))]
        assert sum(pages) == 3 * 2 * 8 * 2 * 16 * 4  # layers, keys and values, tokens, heads, their width, bytes
    assert arenas["iha"] == arenas["base"] == 2 * 16 * 4


def test_a_window_keeps_one_token_more_under_the_flat_mask_alone() -> None:
    windows = {
        name: {group.window for group in LLM(folder(name), **SETTINGS)._engine.runner.device.layout.groups}  # type: ignore[attr-defined]
        for name in KINDS
    }
    assert windows == {"iha": {None, 6}, "iha_token": {11}, "iha_full": {None}}


def test_what_needs_plain_attention_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    llm = LLM(folder("iha_full"), **SETTINGS)
    params = SamplingParams(max_tokens=4, dysco=DyscoParams(heads=[(0, 0)]))
    with pytest.raises(ValueError, match="Interleaved Head Attention"):
        llm.generate([{"prompt_token_ids": [1, 2, 3]}], params)
    assert heads_command(["detect", "--model", str(folder("iha_full"))]) == 2
    assert "Interleaved Head Attention" in capsys.readouterr().err
