"""Many callers, cancellations and failures of one engine on its own thread."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxdual import AsyncLLM, EngineDeadError, RequestOutput, SamplingParams

MODEL = Path(__file__).parent.parent / "fixtures" / "hf" / "qwen3"
SETTINGS: dict[str, Any] = {
    "max_model_len": 64,
    "block_size": 8,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "num_kv_blocks": 20,
    "seed": 0,
    "compilation_cache_dir": "",
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0.0, max_tokens=50, ignore_eos=True)
DEADLINE = 60.0  # seconds; reached only by a failing test


@pytest.fixture(scope="module")
def shared() -> Iterator[AsyncLLM]:
    """One engine for all tests that leave it alive."""
    llm = AsyncLLM(MODEL, **SETTINGS)
    yield llm
    llm.shutdown()


@pytest.fixture
def llm(shared: AsyncLLM) -> Iterator[AsyncLLM]:
    """An engine to be killed, with the compiled programs of the other one."""
    llm = AsyncLLM(MODEL, **SETTINGS)
    llm._llm._engine.runner.programs = shared._llm._engine.runner.programs
    yield llm
    llm.shutdown()


def run[T](main: Callable[[], Awaitable[T]]) -> T:
    async def within_deadline() -> T:
        return await asyncio.wait_for(main(), DEADLINE)

    return asyncio.run(within_deadline())


async def last(outputs: AsyncIterator[RequestOutput]) -> RequestOutput:
    final = None
    async for output in outputs:
        final = output
    assert final is not None
    return final


async def settled(llm: AsyncLLM) -> None:
    """All requests have ended, and nothing is held."""
    while await asyncio.wrap_future(llm._call(lambda: llm._llm.has_unfinished)):
        await asyncio.sleep(0)
    await llm.check_integrity()
    stats = await llm.stats()
    assert stats.kv_blocks_free == stats.kv_blocks
    assert await asyncio.wrap_future(llm._call(lambda: llm._llm.num_unfinished)) == 0
    assert llm._listeners == {}


def prompts(count: int) -> list[list[int]]:
    return [[3 + (7 * i + 5 * j) % 300 for j in range(3 + 5 * i)] for i in range(count)]


def test_concurrent_requests_give_what_sequential_ones_give(shared: AsyncLLM) -> None:
    async def main() -> None:
        alone = [(await last(shared.generate(prompt, GREEDY))).outputs[0].token_ids for prompt in prompts(6)]
        together = await asyncio.gather(*(last(shared.generate(prompt, GREEDY)) for prompt in prompts(6)))
        assert [output.outputs[0].token_ids for output in together] == alone
        assert all(output.finished and len(output.outputs[0].token_ids) == 12 for output in together)
        assert len({output.request_id for output in together}) == 6
        await settled(shared)

    run(main)


def test_outputs_only_grow_and_the_last_is_finished(shared: AsyncLLM) -> None:
    async def main() -> None:
        seen = [output async for output in shared.generate([5, 6, 7], GREEDY)]
        lengths = [len(output.outputs[0].token_ids) for output in seen]
        assert lengths == sorted(set(lengths))
        assert [output.finished for output in seen] == [False] * (len(seen) - 1) + [True]

    run(main)


def test_cancelled_tasks_free_all_they_had(shared: AsyncLLM) -> None:
    async def main() -> None:
        for turns in (0, 1, 2, 5, 40):  # before it is sent, while it waits, while it runs
            tasks = [asyncio.create_task(last(shared.generate(prompt, LONG))) for prompt in prompts(6)]
            for _ in range(turns):
                await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(result, asyncio.CancelledError) for result in results)
            await settled(shared)

    run(main)


def test_leaving_the_loop_early_ends_the_request(shared: AsyncLLM) -> None:
    async def main() -> None:
        outputs = shared.generate([5, 6, 7], LONG)
        async with contextlib.aclosing(outputs):  # type: ignore[type-var]
            async for output in outputs:
                assert not output.finished
                break
        await settled(shared)

    run(main)


def test_abort_yields_a_last_output(shared: AsyncLLM) -> None:
    async def main() -> None:
        seen = []
        async for output in shared.generate([5, 6, 7], LONG, "mine"):
            seen.append(output)
            if len(seen) == 1:
                await shared.abort("mine")
                await shared.abort("unknown")
        assert seen[-1].finished
        assert seen[-1].outputs[0].finish_reason == "abort"
        assert len(seen[-1].outputs[0].token_ids) < 50
        await settled(shared)

    run(main)


@pytest.mark.parametrize("prompt", [[], [320], [-1], None, [1.5], list(range(64)), "text without a tokenizer"])
def test_a_bad_prompt_reaches_its_caller_and_no_one_else(shared: AsyncLLM, prompt: Any) -> None:
    async def main() -> None:
        good = asyncio.create_task(last(shared.generate([5, 6, 7], GREEDY)))
        with pytest.raises(ValueError, match=r"\w"):
            await last(shared.generate(prompt, GREEDY))
        assert (await good).outputs[0].finish_reason == "length"
        await settled(shared)

    run(main)


def test_an_id_in_use_is_refused_and_its_owner_goes_on(shared: AsyncLLM) -> None:
    async def main() -> None:
        first = shared.generate([5, 6, 7], GREEDY, "same")
        await anext(first)
        with pytest.raises(ValueError, match="'same' is in use"):
            await last(shared.generate([8, 9], GREEDY, "same"))
        assert len((await last(first)).outputs[0].token_ids) == 12

    run(main)


def test_an_id_may_be_used_again_at_once_after_an_abort(shared: AsyncLLM) -> None:
    async def main() -> None:
        first = shared.generate([5, 6, 7], LONG, "again")
        await anext(first)
        await first.aclose()  # type: ignore[attr-defined]
        output = await last(shared.generate([5, 6, 7], GREEDY, "again"))
        assert output.outputs[0].finish_reason == "length"
        assert len(output.outputs[0].token_ids) == 12
        await settled(shared)

    run(main)


def test_callers_of_several_loops_and_threads_are_served(shared: AsyncLLM) -> None:
    results: list[list[int]] = []

    def caller() -> None:
        async def main() -> None:
            results.append((await last(shared.generate([5, 6, 7], GREEDY))).outputs[0].token_ids)

        run(main)

    threads = [threading.Thread(target=caller) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert len(results) == 3
    assert results[0] == results[1] == results[2]


def test_a_caller_whose_loop_is_gone_disturbs_no_one(shared: AsyncLLM) -> None:
    async def leave() -> None:
        outputs = shared.generate([5, 6, 7], LONG, "left behind")
        await anext(outputs)

    async def stay() -> None:
        assert (await last(shared.generate([5, 6, 7], GREEDY))).finished
        await settled(shared)

    asyncio.run(leave())
    run(stay)


def test_shutdown_reaches_callers_and_later_ones(llm: AsyncLLM) -> None:
    async def main() -> None:
        started = asyncio.Event()

        async def caller() -> None:
            async for _ in llm.generate([5, 6, 7], LONG):
                started.set()

        tasks = [asyncio.create_task(caller()) for _ in range(3)]
        await started.wait()
        await asyncio.to_thread(llm.shutdown)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [EngineDeadError] * 3
        for call in (llm.stats, llm.check_integrity, lambda: last(llm.generate([1], GREEDY)), lambda: llm.abort("x")):
            with pytest.raises(EngineDeadError, match="shut down"):
                await call()
        llm.shutdown()

    run(main)


def test_a_failing_device_reaches_every_caller(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(llm._llm._engine.runner, "dispatch", fail)

    async def main() -> None:
        results = await asyncio.gather(
            *(last(llm.generate(prompt, GREEDY)) for prompt in prompts(5)), return_exceptions=True
        )
        assert [type(result) for result in results] == [EngineDeadError] * 5
        with pytest.raises(EngineDeadError, match="RuntimeError: the device is gone"):
            await llm.stats()

    run(main)


def test_a_cancelled_question_leaves_the_engine_alive(llm: AsyncLLM) -> None:
    async def main() -> None:
        entered, go_on = threading.Event(), threading.Event()

        def busy() -> None:  # stands for a long step
            entered.set()
            go_on.wait(DEADLINE)

        blocked = llm._call(busy)
        await asyncio.to_thread(entered.wait, DEADLINE)
        for call in (llm.stats, llm.check_integrity, lambda: llm.abort("nobody")):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(call(), 0.001)
        go_on.set()
        await asyncio.wrap_future(blocked)
        assert (await llm.stats()).kv_blocks == 20

    run(main)
