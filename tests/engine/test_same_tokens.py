"""The same-tokens rule: greedy tokens don't depend on what else runs, on chunks, caches, loops or preemption."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np
import pytest

from jaxdual import LLM, SamplingParams
from jaxdual.kv.layout import most_blocks
from tests.engine.models import TieCounter, folder, load
from tests.windowed_models import WINDOW

pytestmark = pytest.mark.usefixtures("shared_programs")

PAGE = 8
MODEL_LEN = 160


@dataclass(frozen=True)
class Setting:
    """One engine: loop, memory, preemption, chunking."""

    overlap: bool
    pages: int
    preemption: str
    chunk: int
    prefix_caching: bool
    seqs: int = 6
    host_pages: int = 0
    landing: str = "scatter"


SETTINGS = [
    Setting(overlap=False, pages=200, preemption="recompute", chunk=64, prefix_caching=True),
    Setting(overlap=True, pages=200, preemption="recompute", chunk=16, prefix_caching=True),
    Setting(overlap=True, pages=30, preemption="recompute", chunk=24, prefix_caching=True),
    Setting(overlap=True, pages=30, preemption="swap", chunk=24, prefix_caching=True, host_pages=64),
    Setting(overlap=False, pages=26, preemption="swap", chunk=40, prefix_caching=True, host_pages=12),
    Setting(overlap=True, pages=26, preemption="swap", chunk=7, prefix_caching=False, host_pages=40, seqs=4),
    Setting(overlap=True, pages=30, preemption="swap", chunk=24, prefix_caching=True, host_pages=64, landing="direct"),
]


def prompts_with_shared_prefixes(rng: random.Random, vocab: int, count: int) -> list[list[int]]:
    stems = [[rng.randrange(vocab) for _ in range(rng.randint(10, 60))] for _ in range(3)]
    prompts = []
    for _ in range(count):
        stem = rng.choice(stems) if rng.random() < 0.7 else []
        prompts.append(stem[: rng.randint(0, len(stem))] + [rng.randrange(vocab) for _ in range(rng.randint(1, 40))])
    return prompts


def engine(name: str, setting: Setting) -> LLM:
    model = load(name).config
    block_bytes = model.num_layers * 2 * model.num_kv_heads * model.head_dim * 4 * PAGE
    # Behind a window, sequences hold fewer pages.
    full = None in (model.layer_windows or (None,))
    return LLM(
        folder(name),
        block_size=PAGE,
        max_model_len=MODEL_LEN,
        max_num_seqs=setting.seqs,
        max_num_batched_tokens=setting.chunk,
        num_kv_blocks=setting.pages if full else max(20 if setting.seqs == 1 else 9, setting.pages // 3),
        host_cache_bytes=setting.host_pages * block_bytes,
        preemption_mode=setting.preemption,
        enable_prefix_caching=setting.prefix_caching,
        async_scheduling=setting.overlap,
        kv_landing=setting.landing,
    )


def run_schedule(
    llm: LLM, requests: list[tuple[list[int], SamplingParams]], rng: random.Random
) -> dict[int, list[int]]:
    """Submits requests at random steps, cancels some others at random moments, and returns tokens by request."""
    finished: dict[int, list[int]] = {}
    waiting = list(enumerate(requests))
    rng.shuffle(waiting)
    disturbers = 0
    alive: list[str] = []
    steps, bound = 0, 40 * len(requests) + 4 * sum(params.max_tokens or 0 for _, params in requests)
    while waiting or llm.has_unfinished:
        steps += 1
        assert steps < bound, "no progress"
        for _ in range(rng.randint(0, 3)):
            if waiting:
                number, (prompt, params) = waiting.pop()
                llm.submit({"prompt_token_ids": prompt}, params, f"request-{number}", priority=rng.randint(0, 1))
        if waiting and rng.random() < 0.3:
            disturbers += 1
            prompt = [*list(rng.choice(requests)[0]), 1]
            llm.submit({"prompt_token_ids": prompt}, SamplingParams(max_tokens=30, n=2), f"disturber-{disturbers}")
            alive.append(f"disturber-{disturbers}")
        if alive and rng.random() < 0.25:
            llm.abort(alive.pop(rng.randrange(len(alive))))
        for output in llm.step():
            if output.finished and output.request_id.startswith("request-"):
                finished[int(output.request_id.removeprefix("request-"))] = output.outputs[0].token_ids
        if rng.random() < 0.05:
            llm.check_integrity()
    llm.check_integrity()
    assert llm.stats().kv_blocks_available == llm.stats().kv_blocks
    return finished


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "llama", "qwen3_moe", "mistral", "mistral_mixed", "iha", "pruned"])
def test_random_schedules_give_the_tokens_of_each_request_alone(name: str) -> None:
    rng = random.Random(f"schedules of {name}")
    vocab = load(name).config.vocab_size
    requests = [
        (prompt, SamplingParams(max_tokens=rng.randint(1, 60), temperature=0, ignore_eos=rng.random() < 0.8))
        for prompt in prompts_with_shared_prefixes(rng, vocab, 40 if name == "qwen3" else 24)
    ]
    alone = engine(
        name, Setting(overlap=False, pages=60, preemption="recompute", chunk=160, prefix_caching=False, seqs=1)
    )
    want = [
        alone.generate([{"prompt_token_ids": prompt}], params)[0].outputs[0].token_ids for prompt, params in requests
    ]
    ties = TieCounter(name)
    preempted = hits = host_hits = 0
    for setting in SETTINGS if name == "qwen3" else SETTINGS[3:] if name == "mistral_mixed" else SETTINGS[2:4]:
        llm = engine(name, setting)
        for _ in range(2):  # the second time much of it is cached
            got = run_schedule(llm, requests, rng)
            assert sorted(got) == list(range(len(requests)))
            for number, (prompt, _) in enumerate(requests):
                ties.compare(prompt, want[number], got[number])
        stats = llm.stats()
        preempted += stats.preemptions
        hits += stats.prefix_cache_hits
        host_hits += stats.host_cache_hits
    ties.check()
    # Behind windows alone a sequence hardly grows after its prompt, so nothing has to give way.
    assert preempted > 0 or name == "mistral", "the schedules never preempted anything"
    assert hits > 0, "the schedules never hit the prefix cache"
    assert host_hits > 0, "the schedules never brought a block back from the host tier"


@pytest.mark.slow
def test_a_seed_gives_the_same_output_whatever_runs_beside_it() -> None:
    rng = random.Random(5)
    vocab = load("qwen3").config.vocab_size
    requests = [
        (
            prompt,
            SamplingParams(
                max_tokens=24,
                temperature=0.8,
                seed=number,
                top_p=0.9 if number % 2 else 1.0,
                top_k=20 if number % 3 else 0,
                repetition_penalty=1.1 if number % 4 == 0 else 1.0,
                presence_penalty=0.5 if number % 5 == 0 else 0.0,
                logit_bias={7: 3.0} if number % 6 == 0 else None,
                ignore_eos=True,
            ),
        )
        for number, prompt in enumerate(prompts_with_shared_prefixes(rng, vocab, 24))
    ]
    alone = engine(
        "qwen3", Setting(overlap=False, pages=60, preemption="recompute", chunk=160, prefix_caching=False, seqs=1)
    )
    want = [
        alone.generate([{"prompt_token_ids": prompt}], params)[0].outputs[0].token_ids for prompt, params in requests
    ]
    assert len({tuple(tokens) for tokens in want}) == len(want)
    for setting in SETTINGS[2:5]:
        llm = engine("qwen3", setting)
        got = run_schedule(llm, requests, rng)
        # A seeded draw may turn on the last bits of a logit as an arg-max may; here none does.
        assert [got[number] for number in range(len(requests))] == want
        assert llm.stats().preemptions > 0


PLAIN = Setting(overlap=True, pages=60, preemption="recompute", chunk=24, prefix_caching=False)


def greedy(count: int) -> SamplingParams:
    return SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)


@pytest.mark.parametrize("chunk", [7, 24, 64])
@pytest.mark.parametrize("name", ["mistral", "mistral_mixed"])
def test_windows_give_the_tokens_of_the_dense_forward_pass(name: str, chunk: int) -> None:
    """Prompts and outputs that end before, in and several windows after the first one."""
    rng = random.Random(f"{name} {chunk}")
    prompts = [[rng.randrange(96) for _ in range(length)] for length in (3, WINDOW - 1, WINDOW + 1, 50, 117)]
    llm = engine(name, replace(PLAIN, chunk=chunk, seqs=3))
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy(40))
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = output.outputs[0].token_ids
        row = np.zeros((1, 256), np.int32)
        row[0, : len(prompt) + len(tokens)] = [*prompt, *tokens]
        logits = np.asarray(load(name).logits(row))[0, len(prompt) - 1 :]
        for position, token in enumerate(tokens):
            assert logits[position].max() - logits[position, token] <= 1e-3, (len(prompt), position)
    llm.check_integrity()


@pytest.mark.parametrize("name", ["mistral", "mistral_mixed"])
def test_windowed_layers_hold_few_pages_and_give_them_back(name: str) -> None:
    llm = engine(name, replace(PLAIN, seqs=1))
    group = llm._engine.ranks[0].kv.groups[-1]
    most = most_blocks(WINDOW, PLAIN.chunk, PAGE, MODEL_LEN // PAGE)
    held = []
    llm.submit({"prompt_token_ids": [5] * 80}, greedy(60), "long")
    while llm.has_unfinished:
        llm.step()
        held.append(group.memory.num_pages - group.num_available)
    assert max(held) <= most
    assert held[len(held) // 2] <= most_blocks(WINDOW, 1, PAGE, MODEL_LEN // PAGE)  # decoding
    assert group.num_available == group.memory.num_pages


@pytest.mark.parametrize(("pages", "host_pages"), [(200, 0), (60, 200)])
@pytest.mark.parametrize("name", ["mistral", "mistral_mixed"])
def test_prefix_hits_at_several_depths_give_the_same_tokens(name: str, pages: int, host_pages: int) -> None:
    rng = random.Random(name)
    stem = [rng.randrange(96) for _ in range(120)]
    prompts = [[*stem[:depth], 7, 11, 13] for depth in (8, 16, 24, 56, 80, 112, 119)]
    plain = engine(name, replace(PLAIN, seqs=1))
    want = [plain.generate([{"prompt_token_ids": p}], greedy(30))[0].outputs[0].token_ids for p in prompts]
    cached = engine(name, replace(PLAIN, prefix_caching=True, seqs=2, pages=pages, host_pages=host_pages))
    cached.generate([{"prompt_token_ids": stem}], greedy(1))
    for prompt, tokens in zip(prompts, want, strict=True):
        (output,) = cached.generate([{"prompt_token_ids": prompt}], greedy(30))
        assert output.outputs[0].token_ids == tokens
        assert output.num_cached_tokens == (len(prompt) - 3) // PAGE * PAGE
    if host_pages:
        noise = [{"prompt_token_ids": [rng.randrange(96) for _ in range(120)]} for _ in range(pages // 15)]
        cached.generate(noise, greedy(1))
        before = cached.stats().host_cache_hits
        again = [cached.generate([{"prompt_token_ids": p}], greedy(30))[0].outputs[0].token_ids for p in prompts]
        assert again == want
        assert cached.stats().host_cache_hits > before
    cached.check_integrity()
