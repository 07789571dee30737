"""Clusters whose engines share a store: whichever way stored blocks take, tokens are those of one engine."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from jaxdual import LLM, AsyncLLM, EngineConfig, RequestOutput, SamplingParams
from jaxdual.config import ClusterConfig
from tests.cluster.test_processes import SETTINGS, alone, complete, complete_all, settled, within
from tests.engine.models import TieCounter, folder
from tests.kv.store.conftest import bucket  # noqa: F401  # a fixture

# Each starts processes that import JAX.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("shared_programs")]

GREEDY = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True)
TWO = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
MODES = ("full", "split", "roundrobin", "layerwise", "basic")


def on_paths(
    store: Path | str, prefill: int, decode: int, *, mode: str = "full", name: str = "qwen3", **settings: Any
) -> AsyncLLM:
    """A cluster with a store."""
    shared = {"kv_store": str(store), "kv_store_capacity_bytes": 1 << 30}
    config = EngineConfig(model=str(folder(name)), **SETTINGS | shared | settings)
    cluster = ClusterConfig(prefill=prefill, decode=decode, path_mode=mode)  # type: ignore[arg-type]
    return AsyncLLM.from_config(config, cluster=cluster)


def make_prompts(count: int, seed: str) -> list[list[int]]:
    """Lengths around the borders of pages and passes."""
    rng = random.Random(seed)
    return [[rng.randrange(90) for _ in range(rng.choice([1, 8, 30, 63, 64, 65, 100, 120]))] for _ in range(count)]


@pytest.mark.parametrize(
    ("name", "prefill", "decode", "modes", "settings"),
    [
        ("qwen3", 1, 1, MODES, {"block_size": 7}),
        ("qwen3", 2, 1, ("full", "split"), {"kv_transport": "tcp"}),
        ("qwen3", 1, 2, ("full", "split"), {"max_num_batched_tokens": 24}),
        ("iha_full", 1, 1, ("full",), {"block_size": 7}),
    ],
)
def test_every_mode_gives_the_tokens_of_one_engine(
    tmp_path: Path, name: str, prefill: int, decode: int, modes: Sequence[str], settings: dict[str, Any]
) -> None:
    prompts = {mode: make_prompts(6, mode) for mode in modes}
    want = {mode: [tokens for (tokens,) in alone(name, prompts[mode], GREEDY)] for mode in modes}
    # A second turn, which finds the first one stored.
    talks = {
        mode: [[*prompt, *tokens, 5, 6, 7] for prompt, tokens in zip(prompts[mode], want[mode], strict=True)]
        for mode in modes
    }
    more = {mode: [tokens for (tokens,) in alone(name, talks[mode], GREEDY)] for mode in modes}
    block = settings.get("block_size", SETTINGS["block_size"])

    async def main() -> None:
        ties = TieCounter(name)
        async with on_paths(tmp_path, prefill, decode, name=name, **settings) as llm:
            for mode in modes:
                await llm.use_path_mode(mode)
                for asked, expected in ((prompts[mode], want[mode]), (talks[mode], more[mode])):
                    got = await complete_all(llm, asked, GREEDY)
                    for prompt, one, (other,) in zip(asked, expected, got, strict=True):
                        ties.compare(prompt, one, other)
                    await settled_cards(llm)
            before = await llm.stats()
            again = await asyncio.gather(*(complete(llm, talk, GREEDY) for talk in talks["full"]))
            assert [output.num_cached_tokens for output in again] == [
                (len(talk) - 1) // block * block for talk in talks["full"]
            ]
            after = await llm.stats()
            hits = sum((len(talk) - 1) // block for talk in talks["full"])
            assert after.store_blocks_read - before.store_blocks_read == hits
            assert after.store_blocks_failed == 0
        assert ties.ties <= 1

    within(main())


def test_outputs_of_all_kinds_are_those_of_one_engine(tmp_path: Path) -> None:
    """Several of a prompt, one that ends with its first token, one that asks for one only: cold, and found stored."""
    prompts = make_prompts(4, "kinds")
    llm = LLM(folder("qwen3"), **SETTINGS)
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    first = [output.outputs[0].token_ids[0] for output in llm.generate(asked, GREEDY)]
    kinds = [
        SamplingParams(max_tokens=9, temperature=1.0, seed=3, n=3, ignore_eos=True),
        SamplingParams(max_tokens=9, temperature=0.0, stop_token_ids=[first[1]]),
        SamplingParams(max_tokens=1, temperature=0.0),
        SamplingParams(max_tokens=9, temperature=0.0, logprobs=2, ignore_eos=True),
    ]

    def told(output: RequestOutput) -> list[tuple[list[int], str | None]]:
        return [(list(one.token_ids), one.finish_reason) for one in output.outputs]

    want = [told(*llm.generate([one], params)) for one, params in zip(asked, kinds, strict=True)]
    assert want[1] == [([first[1]], "stop")]

    async def main() -> None:
        async with on_paths(tmp_path, 1, 1) as cluster:
            for _ in range(2):
                work = (complete(cluster, prompt, params) for prompt, params in zip(prompts, kinds, strict=True))
                assert [told(output) for output in await asyncio.gather(*work)] == want
                await settled_cards(cluster)

    within(main())


def difference(after: Mapping[str, int], before: Mapping[str, int]) -> dict[str, int]:
    return {card: nbytes - before[card] for card, nbytes in after.items()}


def test_bytes_of_each_card_are_those_of_the_paper_s_formulas(tmp_path: Path) -> None:
    """DualPath 4.2 (section 5 of the analysis): H hit, M computed, S stored, in bytes; one pass a prompt."""
    rng = random.Random(1)
    context = [rng.randrange(90) for _ in range(96)]

    async def passed(llm: AsyncLLM, mode: str) -> dict[str, int]:
        await llm.use_path_mode(mode)
        stats = await llm.stats()
        before, stored = stats.card_bytes, stats.store_blocks_written
        prompt = [*context, *(rng.randrange(90) for _ in range(35))]
        output: RequestOutput = await complete(
            llm, prompt, SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
        )
        assert output.num_cached_tokens == 96
        await settled_cards(llm, stored + 4)
        return difference((await llm.stats()).card_bytes, before)

    async def main() -> None:
        async with on_paths(tmp_path, 1, 1) as llm:
            await complete(llm, [*context, 1], TWO)
            await settled_cards(llm, 12)
            size = llm.info.kv_block_bytes
            # 131 tokens: 12 blocks are hit, 4 and a part of one computed; of the output, none becomes full.
            hit, computed, stored = 12 * size, 5 * size, 4 * size
            assert (
                await passed(llm, "layerwise")
                == await passed(llm, "basic")
                == {
                    "prefill 0 storage write": hit,
                    "prefill 0 storage read": 0,
                    "prefill 0 compute read": hit + (hit + computed),
                    "prefill 0 compute write": hit,
                    "decode 1 storage write": 0,
                    "decode 1 storage read": stored,
                    "decode 1 compute read": (hit + computed) + stored,
                    "decode 1 compute write": (hit + computed) + (hit + computed) + stored,
                }
            )
            # The shorter queue: of equal ones the decode side's.
            assert await passed(llm, "full") == {
                "prefill 0 storage write": 0,
                "prefill 0 storage read": 0,
                "prefill 0 compute read": computed,
                "prefill 0 compute write": hit,
                "decode 1 storage write": hit,
                "decode 1 storage read": stored,
                "decode 1 compute read": hit + (hit + computed) + stored,
                "decode 1 compute write": computed + (hit + computed) + stored,
            }
            here = there = hit // 2
            assert await passed(llm, "split") == {
                "prefill 0 storage write": here,
                "prefill 0 storage read": 0,
                "prefill 0 compute read": here + (here + computed),
                "prefill 0 compute write": hit,
                "decode 1 storage write": there,
                "decode 1 storage read": stored,
                "decode 1 compute read": there + (hit + computed) + stored,
                "decode 1 compute write": (here + computed) + (hit + computed) + stored,
            }
            assert set((await passed(llm, "roundrobin")).values()) <= {0, *range(0, 40 * size, size)}

    within(main())


async def settled_cards(llm: AsyncLLM, stored: int = 0) -> None:
    """Nothing is under way, and all that is full is stored: so many blocks at least."""
    before: Mapping[str, int] = {}
    looks = 0
    while looks < 4:
        await settled(llm)
        stats = await llm.stats()
        looks = looks + 1 if stats.card_bytes == before and stats.store_blocks_written >= stored else 0
        before = stats.card_bytes
        await asyncio.sleep(0.1)


def test_nothing_moved_is_nothing_that_counts(tmp_path: Path) -> None:
    prompts = make_prompts(5, "oracle")
    (want,) = alone("qwen3", prompts[:1], GREEDY)

    async def main() -> None:
        async with on_paths(tmp_path, 1, 1, mode="oracle") as llm:
            for _ in range(2):
                outputs = await asyncio.gather(*(complete(llm, prompt, GREEDY) for prompt in prompts))
                assert all(len(output.outputs[0].token_ids) == 10 for output in outputs)
                await settled_cards(llm, sum((len(prompt) + 9) // 8 for prompt in prompts))
            assert [output.num_cached_tokens for output in outputs] == [
                (len(prompt) - 1) // 8 * 8 for prompt in prompts
            ]
            stats = await llm.stats()
            assert stats.store_blocks_read == 0
            assert sum(nbytes for card, nbytes in stats.card_bytes.items() if "prefill" in card) == 0
            # What it has stored is not taken for what the model computes.
            await llm.use_path_mode("full")
            output = await complete(llm, prompts[0], GREEDY)
            assert output.num_cached_tokens == 0
            assert [output.outputs[0].token_ids] == [list(tokens) for tokens in want]

    within(main())


def test_engines_share_a_bucket_like_a_folder(bucket: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    for name, value in (
        ("ENDPOINT_URL", bucket["endpoint"]),
        ("REGION", bucket["region"]),
        ("ACCESS_KEY_ID", bucket["access_key_id"]),
        ("SECRET_ACCESS_KEY", bucket["secret_access_key"]),
        ("ALLOW_HTTP", "true"),
    ):
        monkeypatch.setenv(f"AWS_{name}", value)
    prompts = [prompt for prompt in make_prompts(12, "bucket") if len(prompt) > 60][:3]
    want = alone("qwen3", prompts, GREEDY)

    async def main() -> None:
        async with on_paths("s3://blocks/cluster", 1, 1, mode="split") as llm:
            for read in (0, sum((len(prompt) - 1) // 8 for prompt in prompts)):
                assert await complete_all(llm, prompts, GREEDY) == want
                await settled_cards(llm, sum((len(prompt) + 9) // 8 for prompt in prompts))
                assert (await llm.stats()).store_blocks_read == read

    within(main())


def test_a_prompt_of_one_token_more_is_stored_too(tmp_path: Path) -> None:
    one = SamplingParams(max_tokens=1, temperature=0.0)
    prompts = make_prompts(4, "one token")

    async def main() -> None:
        async with on_paths(tmp_path, 1, 1, mode="split") as llm:
            first = await complete_all(llm, prompts, one)
            await settled_cards(llm, sum(len(prompt) // 8 for prompt in prompts))
            again = await asyncio.gather(*(complete(llm, prompt, one) for prompt in prompts))
            assert [[list(output.outputs[0].token_ids)] for output in again] == first
            assert [output.num_cached_tokens for output in again] == [(len(prompt) - 1) // 8 * 8 for prompt in prompts]
            await settled(llm)

    within(main())


def test_modes_are_refused_where_they_mean_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with on_paths(tmp_path, 1, 1) as llm:
            with pytest.raises(ValueError, match="mode='quick' must be one of basic"):
                await llm.use_path_mode("quick")
            stream = await llm.submit({"prompt_token_ids": [1, 2, 3]}, SamplingParams(max_tokens=100, ignore_eos=True))
            with pytest.raises(ValueError, match="1 requests are under way"):
                await llm.use_path_mode("basic")
            stream.close()
            # What is left of it is waited for, and who comes meanwhile waits.
            switch = asyncio.create_task(llm.use_path_mode("basic"))
            outputs = await asyncio.gather(*(complete(llm, [1, 2, number], GREEDY) for number in range(4)))
            assert all(len(output.outputs[0].token_ids) == GREEDY.max_tokens for output in outputs)
            with contextlib.suppress(ValueError):  # those may have been quicker
                await switch
        async with AsyncLLM(folder("qwen3"), **SETTINGS) as llm:
            with pytest.raises(ValueError, match="has no path modes"):
                await llm.use_path_mode("basic")

    within(main())
