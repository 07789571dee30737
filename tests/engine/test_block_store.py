"""An engine with a block store: the same tokens as without one, whatever becomes of store and agent."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxdual import LLM, ConfigError, RequestOutput, SamplingParams
from tests.engine.models import TieCounter, folder

pytestmark = pytest.mark.usefixtures("shared_programs")

BLOCK = 8
SETTINGS: dict[str, Any] = {
    "max_model_len": 160,
    "block_size": BLOCK,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "num_kv_blocks": 40,
}
GREEDY = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)


def make_prompts(count: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(90) for _ in range(rng.choice([8, 9, 40, 63, 64, 65, 100]))] for _ in range(count)]


class Stored:
    """Engines on one store, and one without, that should agree."""

    def __init__(self, name: str, store: Path) -> None:
        self.name = name
        self.store = store
        self.plain = LLM(folder(name), **SETTINGS)
        self.engines: list[LLM] = []

    def engine(self, **settings: Any) -> LLM:
        defaults: dict[str, Any] = {"kv_store": str(self.store), "kv_store_capacity_bytes": 1 << 28}
        llm = LLM(folder(self.name), **SETTINGS | defaults | settings)
        self.engines.append(llm)
        return llm

    def check(self, llm: LLM, prompts: list[list[int]], params: SamplingParams = GREEDY) -> list[RequestOutput]:
        """Runs prompts with the store and without, and compares."""
        ties = TieCounter(self.name)
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = llm.generate(asked, params)
        for want, got in zip(self.plain.generate(asked, params), outputs, strict=True):
            for expected, found in zip(want.outputs, got.outputs, strict=True):
                ties.compare(want.prompt_token_ids, expected.token_ids, found.token_ids)
        assert ties.ties <= 1
        llm.check_integrity()
        return outputs

    @property
    def files(self) -> list[Path]:
        return [path for path in self.store.rglob("*") if path.is_file()]


@pytest.fixture
def stored(tmp_path: Path) -> Iterator[Callable[[str], Stored]]:
    made: list[Stored] = []

    def make(name: str) -> Stored:
        made.append(Stored(name, tmp_path / "store"))
        return made[-1]

    yield make
    for one in made:
        for llm in one.engines:
            llm.close()
            llm.check_integrity()


def agent_of(llm: LLM) -> int:
    transfers = llm._engine.transfers
    assert transfers is not None
    pid = transfers._link._agent.pid  # type: ignore[union-attr]
    assert isinstance(pid, int)
    return pid


def until(condition: Callable[[], bool], llm: LLM) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        llm._engine.poll()


@pytest.mark.parametrize(
    ("name", "landing"),
    [("qwen3", "scatter"), ("mistral_mixed", "scatter"), ("mistral", "direct"), ("qwen3", "direct")],
)
def test_what_one_engine_computed_the_next_one_reads(stored: Callable[[str], Stored], name: str, landing: str) -> None:
    pair = stored(name)
    prompts = make_prompts(6, seed=1)
    first = pair.engine()
    pair.check(first, prompts)
    first.close()
    assert first.stats().store_blocks_lost == 0
    second = pair.engine(kv_landing=landing)
    hits = [(len(prompt) - 1) // BLOCK * BLOCK for prompt in prompts]
    assert [output.num_cached_tokens for output in pair.check(second, prompts)] == hits
    assert second.stats().store_cache_hits == sum(hits)
    # As many as fit side by side: which sequence has to give way otherwise, and computes again, depends on whose
    # blocks come first. A prompt's last token alone is a row as those of decoding are, and isn't counted.
    fitting = pair.engine(kv_landing=landing)
    pair.check(fitting, prompts[1:5])
    rests = [len(prompt) - hit for prompt, hit in zip(prompts[1:5], hits[1:5], strict=True)]
    stats = fitting.stats()
    assert (stats.store_cache_hits, stats.preemptions) == (sum(hits[1:5]), 0)
    assert stats.computed_prompt_tokens == sum(rest for rest in rests if rest > 1)
    # A conversation goes on from the stored answer.
    answers = [list(output.outputs[0].token_ids) for output in pair.check(second, prompts)]
    talk = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    third = pair.engine()
    second.close()
    for prompt, output in zip(talk, pair.check(third, talk), strict=True):
        assert (output.num_cached_tokens or 0) >= (len(prompt) - 2) // BLOCK * BLOCK


def test_outputs_of_a_request_and_requests_alike_share_one_read(stored: Callable[[str], Stored]) -> None:
    pair = stored("qwen3")
    prompt = make_prompts(3, seed=2)[0][:40] + [5] * 40
    pair.check(pair.engine(), [prompt])
    pair.engines[0].close()
    again = pair.engine()
    seeded = SamplingParams(max_tokens=6, temperature=1.0, seed=7, n=3, ignore_eos=True)
    pair.check(again, [prompt, prompt, [*prompt, 3]], seeded)
    assert again.stats().store_blocks_read == (len(prompt) - 1) // BLOCK


def test_a_small_store_and_few_staging_pages_slow_nothing_down_for_good(stored: Callable[[str], Stored]) -> None:
    pair = stored("qwen3")
    prompts = make_prompts(16, seed=3)
    block_bytes = 4 * 2 * BLOCK * 2 * 16 * 4 + 4096
    llm = pair.engine(kv_store_capacity_bytes=10 * block_bytes, kv_staging_bytes=1)
    for _ in range(2):
        pair.check(llm, prompts)
    llm.close()
    assert 0 < len(pair.files) <= 10
    again = pair.engine(kv_store_capacity_bytes=10 * block_bytes, kv_staging_bytes=1)
    pair.check(again, prompts)


def damage(pair: Stored, how: str) -> None:
    for number, path in enumerate(pair.files):
        data = bytearray(path.read_bytes())
        if how == "flipped":
            data[number % len(data)] ^= 1
            path.write_bytes(data)
        elif how == "cut":
            path.write_bytes(data[: len(data) // 2])
        elif how == "swapped":
            path.write_bytes(pair.files[(number + 1) % len(pair.files)].read_bytes())
        elif number % 2:
            path.unlink()


@pytest.mark.parametrize("how", ["flipped", "cut", "swapped", "every other one gone"])
def test_broken_and_missing_blocks_are_computed_again(stored: Callable[[str], Stored], how: str) -> None:
    pair = stored("qwen3")
    prompts = make_prompts(6, seed=4)
    pair.check(pair.engine(), prompts)
    pair.engines[0].close()
    damage(pair, how)
    llm = pair.engine()
    pair.check(llm, prompts)
    if how != "every other one gone":
        assert llm.stats().store_cache_hits == 0
        assert llm.stats().store_blocks_failed > 0
    llm.close()
    whole = pair.engine()
    pair.check(whole, prompts)
    assert whole.stats().store_blocks_failed == 0
    assert whole.stats().store_cache_hits > 0


def test_a_store_that_vanishes_costs_nothing_but_time(stored: Callable[[str], Stored]) -> None:
    pair = stored("qwen3")
    llm = pair.engine()
    pair.check(llm, make_prompts(3, seed=5))
    shutil.rmtree(pair.store)
    pair.check(llm, make_prompts(6, seed=5))


def test_a_killed_agent_is_replaced_and_requests_go_on(stored: Callable[[str], Stored]) -> None:
    pair = stored("qwen3")
    prompts = make_prompts(8, seed=6)
    pair.check(pair.engine(), prompts)
    pair.engines[0].close()
    llm = pair.engine()
    for round_ in range(3):
        for number, prompt in enumerate(prompts):
            llm.submit({"prompt_token_ids": prompt}, GREEDY, f"{round_}-{number}")
        llm.step()
        os.kill(agent_of(llm), signal.SIGKILL)
        while llm.has_unfinished:
            llm.step()
        llm.check_integrity()
    pair.check(llm, prompts)
    assert llm.stats().kv_agent_restarts == 3


def test_an_agent_that_dies_again_and_again_is_given_up(stored: Callable[[str], Stored]) -> None:
    pair = stored("qwen3")
    llm = pair.engine()
    transfers = llm._engine.transfers
    assert transfers is not None
    while transfers._link.alive:
        deaths = transfers._link.restarts
        os.kill(agent_of(llm), signal.SIGKILL)
        until(lambda deaths=deaths: transfers._link.restarts > deaths, llm)  # type: ignore[misc]
    pair.check(llm, make_prompts(4, seed=7))
    assert llm.stats().store_blocks_written == 0


def test_a_stopped_agent_holds_nobody_up_for_longer_than_the_timeout(stored: Callable[[str], Stored]) -> None:
    pair = stored("qwen3")
    prompts = make_prompts(4, seed=8)
    pair.check(pair.engine(), prompts)
    pair.engines[0].close()
    llm = pair.engine(kv_load_timeout=0.2)
    os.kill(agent_of(llm), signal.SIGSTOP)
    try:
        pair.check(llm, prompts)
        assert llm.stats().store_timeouts == len(prompts)
    finally:
        os.kill(agent_of(llm), signal.SIGCONT)
    pair.check(llm, make_prompts(4, seed=9))


def test_aborted_requests_give_their_staging_pages_back(stored: Callable[[str], Stored]) -> None:
    pair = stored("qwen3")
    prompts = make_prompts(8, seed=10)
    pair.check(pair.engine(), prompts)
    pair.engines[0].close()
    llm = pair.engine()
    for steps in range(6):
        for number, prompt in enumerate(prompts):
            llm.submit({"prompt_token_ids": prompt}, GREEDY, f"{steps}-{number}")
        for _ in range(steps):
            llm.step()
        for number in range(len(prompts)):
            llm.abort(f"{steps}-{number}")
        while llm.has_unfinished:
            llm.step()
        llm.check_integrity()
    transfers = llm._engine.transfers
    assert transfers is not None
    until(lambda: not len(transfers._staging.leases), llm)
    assert transfers._staging.num_free == transfers._staging.capacity


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_store": "ftp://somewhere"}, "ftp"),
        ({"kv_store": "/proc/nothing/here"}, "/proc"),
        ({"kv_store_capacity_bytes": 5}, "capacity_bytes=5"),
        ({"kv_store_capacity_bytes": None}, "together"),
        ({"enable_prefix_caching": False}, "prefix"),
        ({"kv_load_timeout": 0}, "kv_load_timeout"),
    ],
)
def test_a_store_that_can_not_be_used_is_told_at_the_start(tmp_path: Path, settings: Any, message: str) -> None:
    defaults = {"kv_store": str(tmp_path), "kv_store_capacity_bytes": 1 << 20}
    with pytest.raises(ConfigError, match=message):
        LLM(folder("qwen3"), **SETTINGS | defaults | settings)
