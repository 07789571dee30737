"""Many callers, cancellations and failures of one engine in its own process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxdual import (
    AsyncLLM,
    ConfigError,
    EngineDeadError,
    NotServingError,
    QueueFullError,
    RequestOutput,
    SamplingParams,
    async_api,
)
from jaxdual.engine import supervisor
from jaxdual.engine.supervisor import EngineState
from models import ModelError

MODEL = Path(__file__).parent.parent / "fixtures" / "hf" / "qwen3"
SETTINGS: dict[str, Any] = {
    "max_model_len": 64,
    "block_size": 8,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "num_kv_blocks": 20,
    "seed": 0,
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0.0, max_tokens=50, ignore_eos=True)
DEADLINE = 60.0  # seconds; reached only by a failing test


class Loop:
    """An event loop for a whole module."""

    def __init__(self, runner: asyncio.Runner) -> None:
        self._runner = runner

    def __call__[T](self, main: Coroutine[Any, Any, T]) -> T:
        async def within_deadline() -> T:
            return await asyncio.wait_for(main, DEADLINE)

        return self._runner.run(within_deadline())


@pytest.fixture(scope="module")
def run() -> Iterator[Loop]:
    with asyncio.Runner() as runner:
        yield Loop(runner)


@pytest.fixture(scope="module")
def shared(run: Loop) -> Iterator[AsyncLLM]:
    """One engine for all tests that leave it alive."""
    llm = AsyncLLM(MODEL, max_queued_requests=20, **SETTINGS)
    run(llm.warmed_up())
    yield llm
    run(llm.shutdown())


@pytest.fixture
def llm(run: Loop) -> Iterator[AsyncLLM]:
    """An engine to be killed."""
    llm = AsyncLLM(MODEL, **SETTINGS)
    run(llm.start())
    yield llm
    run(llm.shutdown())


async def last(outputs: AsyncIterator[RequestOutput]) -> RequestOutput:
    final = None
    async for output in outputs:
        final = output
    assert final is not None
    return final


async def settled(llm: AsyncLLM) -> None:
    """All requests have ended, and nothing is held."""
    while (stats := await llm.stats()).num_running or stats.num_waiting or stats.kv_blocks_available < stats.kv_blocks:
        await asyncio.sleep(0)
    await llm.check_integrity()
    assert llm.num_unfinished == 0
    assert not llm._engine.waiting


def children() -> str:
    """Ids of this process's children, ended ones that nobody has waited for included."""
    return " ".join(path.read_text() for path in sorted(Path("/proc/self/task").glob("*/children")))


def prompts(count: int) -> list[list[int]]:
    return [[3 + (7 * i + 5 * j) % 300 for j in range(3 + 5 * i)] for i in range(count)]


def test_shapes_that_are_not_compiled_ahead_are_when_a_step_needs_them(run: Loop, shared: AsyncLLM) -> None:
    async def main() -> None:
        (prompt,) = prompts(1)
        async with AsyncLLM(MODEL, **SETTINGS, compile_ahead=False) as llm:
            assert llm.state is EngineState.SERVING
            await llm.warmed_up()
            assert llm.startup_report()["compile_seconds_by_shape"] == {}
            output = await last(llm.generate(prompt, GREEDY))
            assert output.outputs[0].token_ids == (await last(shared.generate(prompt, GREEDY))).outputs[0].token_ids
            assert (llm.state, llm.startup_report()["compile_seconds_by_shape"]) == (EngineState.SERVING, {})

    run(main())


def test_an_engine_that_compiles_nothing_ahead_has_proved_itself_by_an_answer(
    run: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def kill(llm: AsyncLLM) -> None:
        assert llm.engine_pid is not None
        os.kill(llm.engine_pid, signal.SIGKILL)
        while llm.state is EngineState.SERVING:
            await asyncio.sleep(0.01)

    async def main() -> None:
        (prompt,) = prompts(1)
        async with AsyncLLM(MODEL, **SETTINGS, compile_ahead=False) as llm:
            for _ in range(2):
                await last(llm.generate(prompt, GREEDY))
                await kill(llm)
                await llm.ready()
                while llm.state is not EngineState.SERVING:
                    await asyncio.sleep(0.01)
            await kill(llm)  # nothing was asked of this one
            assert llm.state is EngineState.STOPPED

    monkeypatch.setattr(supervisor, "_MOST_FAILED_STARTS", 1)
    run(main())


def test_concurrent_requests_give_what_sequential_ones_give(run: Loop, shared: AsyncLLM) -> None:
    async def main() -> None:
        alone = [(await last(shared.generate(prompt, GREEDY))).outputs[0].token_ids for prompt in prompts(6)]
        together = await asyncio.gather(*(last(shared.generate(prompt, GREEDY)) for prompt in prompts(6)))
        assert [output.outputs[0].token_ids for output in together] == alone
        assert all(output.finished and len(output.outputs[0].token_ids) == 12 for output in together)
        assert len({output.request_id for output in together}) == 6
        await settled(shared)

    run(main())


def test_outputs_only_grow_and_the_last_is_finished(run: Loop, shared: AsyncLLM) -> None:
    async def main() -> None:
        seen = [
            (len(output.outputs[0].token_ids), output.finished) async for output in shared.generate([5, 6, 7], GREEDY)
        ]
        lengths = [length for length, _ in seen]
        assert lengths == sorted(set(lengths))
        assert [finished for _, finished in seen] == [False] * (len(seen) - 1) + [True]

    run(main())


def test_a_slow_reader_gets_all_that_came_meanwhile_at_once(run: Loop, shared: AsyncLLM) -> None:
    async def main() -> None:
        slow = await shared.submit([5, 6, 7], GREEDY)
        quick = await last(shared.generate([5, 6, 7], LONG))  # ends long after the other
        seen = [len(output.outputs[0].token_ids) async for output in slow]
        assert seen == [12]
        assert slow.output.outputs[0].token_ids == quick.outputs[0].token_ids[:12]

    run(main())


def test_cancelled_tasks_free_all_they_had(run: Loop, shared: AsyncLLM) -> None:
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

    run(main())


def test_leaving_the_loop_early_ends_the_request(run: Loop, shared: AsyncLLM) -> None:
    async def main() -> None:
        outputs = shared.generate([5, 6, 7], LONG)
        async with contextlib.aclosing(outputs):  # type: ignore[type-var]
            async for output in outputs:
                assert not output.finished
                break
        await settled(shared)

    run(main())


def test_abort_yields_a_last_output(run: Loop, shared: AsyncLLM) -> None:
    async def main() -> None:
        stream = await shared.submit([5, 6, 7], LONG, "mine")
        await anext(stream)
        assert shared.abort("mine")
        assert not shared.abort("mine")
        assert not shared.abort("unknown")
        output = await last(stream)
        assert output.outputs[0].finish_reason == "abort"
        assert 0 < len(output.outputs[0].token_ids) < 50
        await settled(shared)

    run(main())


@pytest.mark.parametrize("prompt", [[], [320], [-1], None, [1.5], list(range(64)), "text without a tokenizer"])
def test_a_bad_prompt_reaches_its_caller_and_no_one_else(run: Loop, shared: AsyncLLM, prompt: Any) -> None:
    async def main() -> None:
        good = asyncio.create_task(last(shared.generate([5, 6, 7], GREEDY)))
        with pytest.raises(ValueError, match=r"\w"):
            await last(shared.generate(prompt, GREEDY))
        assert (await good).outputs[0].finish_reason == "length"
        await settled(shared)

    run(main())


def test_an_id_in_use_is_refused_and_its_owner_goes_on(run: Loop, shared: AsyncLLM) -> None:
    async def main() -> None:
        first = await shared.submit([5, 6, 7], LONG, "same")  # nothing is awaited before the second one comes
        with pytest.raises(ValueError, match="'same' is in use"):
            await shared.submit([8, 9], GREEDY, "same")
        assert len((await last(first)).outputs[0].token_ids) == 50

    run(main())


def test_an_id_may_be_used_again_at_once_after_an_abort(run: Loop, shared: AsyncLLM) -> None:
    async def main() -> None:
        first = await shared.submit([5, 6, 7], LONG, "again")
        await anext(first)
        first.close()
        first.close()
        output = await last(shared.generate([5, 6, 7], GREEDY, "again"))
        assert output.outputs[0].finish_reason == "length"
        assert len(output.outputs[0].token_ids) == 12
        await settled(shared)

    run(main())


def test_a_full_queue_refuses_at_the_door_and_takes_again_later(run: Loop, shared: AsyncLLM) -> None:
    async def main() -> None:
        streams = [await shared.submit([5, 6, 7], LONG) for _ in range(23)]  # 4 run, 19 wait
        with pytest.raises(QueueFullError, match="23 outputs are under way, 24 may be, and 2 more are asked for"):
            await shared.submit([5, 6, 7], SamplingParams(n=2))
        streams.append(await shared.submit([5, 6, 7], LONG))
        with pytest.raises(QueueFullError, match="24 outputs are under way, 24 may be"):
            await shared.submit([5, 6, 7], LONG)
        streams[0].close()
        streams.append(await shared.submit([5, 6, 7], LONG))
        for stream in streams:
            stream.close()
        await settled(shared)

    run(main())


def test_more_outputs_than_ever_fit_are_refused_for_good(run: Loop, shared: AsyncLLM) -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match="25 outputs are asked for together; at most 24"):
            await shared.submit([5, 6, 7], SamplingParams(n=25))
        output = await last(shared.generate([5, 6, 7], SamplingParams(n=24, max_tokens=2)))
        assert len(output.outputs) == 24
        await settled(shared)

    run(main())


def test_a_stream_has_one_reader_at_a_time(run: Loop, shared: AsyncLLM) -> None:
    async def main() -> None:
        stream = await shared.submit([5, 6, 7], GREEDY)
        first = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="one reader"):
            await anext(stream)
        await first
        stream.close()
        await settled(shared)

    run(main())


def test_figures_follow_what_runs(run: Loop, shared: AsyncLLM) -> None:
    async def main() -> None:
        streams = [await shared.submit([5, 6, 7 + i], LONG) for i in range(6)]
        for stream in streams:
            await anext(stream)
            stats = await shared.stats()
            if (stats.num_running, stats.num_waiting) == (4, 2):
                break
        else:
            raise AssertionError("4 of 6 never ran together")
        for stream in streams:
            stream.close()
        await settled(shared)
        for output in (stream.output for stream in streams):
            assert (output.metrics.queue_seconds is not None) == bool(output.outputs[0].token_ids)
        # The last figures come by themselves.
        while (load := shared.load()) is None or load.num_running or load.num_waiting:
            await asyncio.sleep(0)

    run(main())


def test_the_start_is_reported_by_shape(shared: AsyncLLM) -> None:
    assert shared.state is EngineState.SERVING
    report = shared.startup_report()
    shapes = report["compile_seconds_by_shape"]
    assert len(shapes) >= 5
    assert any(name == "decode rows=4" for name in shapes)
    assert report["compile_seconds"] == pytest.approx(sum(shapes.values()))
    assert report["load_seconds"] > 0


def kill(llm: AsyncLLM) -> None:
    assert llm.engine_pid is not None
    os.kill(llm.engine_pid, signal.SIGKILL)


def test_requests_go_on_from_their_last_token_when_the_engine_is_killed(run: Loop, llm: AsyncLLM) -> None:
    seeded = SamplingParams(temperature=1.0, seed=3, n=3, max_tokens=40, ignore_eos=True)

    async def main() -> None:
        prompts = [[5, 6, 7 + i] for i in range(6)]
        want = [(await last(llm.generate(prompt, LONG))).outputs[0].token_ids for prompt in prompts]
        drawn = [output.token_ids for output in (await last(llm.generate([9, 9], seeded))).outputs]
        states: list[EngineState] = []
        llm.on_state(states.append)
        streams = [await llm.submit(prompt, LONG) for prompt in prompts]
        of_seeds = await llm.submit([9, 9], seeded)
        await anext(streams[0])
        pid = llm.engine_pid
        kill(llm)
        outputs = [await last(stream) for stream in streams]
        assert [output.outputs[0].token_ids for output in outputs] == want
        assert {output.outputs[0].finish_reason for output in outputs} == {"length"}
        assert [output.token_ids for output in (await last(of_seeds)).outputs] == drawn
        await settled(llm)
        killed = states.index(EngineState.RESTARTING)  # the first engine may have got warm before
        assert states[killed : killed + 2] == [EngineState.RESTARTING, EngineState.WARMING]
        assert llm.restarts == 1
        assert llm.engine_pid != pid

    run(main())


def test_a_request_that_is_lost_with_engine_after_engine_ends_with_the_reason(
    run: Loop, llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_api, "_MOST_ENGINES_LOST", 1)

    async def main() -> None:
        stream = await llm.submit([5, 6, 7], LONG)
        for restarts in (0, 1):
            before = len(stream.output.outputs[0].token_ids)
            while len(stream.output.outputs[0].token_ids) == before:
                await anext(stream)
            assert llm.restarts == restarts
            kill(llm)
        output = (await last(stream)).outputs[0]
        assert (output.finish_reason, output.error) == ("error", "the engine process has ended (signal 9)")
        with pytest.raises(EngineDeadError):
            await llm.stats()
        # Taken while there is no engine; it waits for the next one.
        assert len((await last(llm.generate([5, 6, 7], GREEDY))).outputs[0].token_ids) == 12
        await settled(llm)

    run(main())


def test_requests_that_wait_for_an_engine_can_be_cancelled(run: Loop, llm: AsyncLLM) -> None:
    async def main() -> None:
        kill(llm)
        while llm.state is not EngineState.RESTARTING:
            await asyncio.sleep(0)
        streams = [await llm.submit([5, 6, 7], LONG) for _ in range(3)]
        assert len(llm._engine.waiting) == 3
        streams[1].close()
        assert len(llm._engine.waiting) == 2
        assert len((await last(streams[2])).outputs[0].token_ids) == 50
        assert len((await last(streams[0])).outputs[0].token_ids) == 50
        await settled(llm)

    run(main())


def test_an_engine_that_dies_before_it_serves_counts_as_a_failed_start(
    run: Loop, llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "_MOST_FAILED_STARTS", 1)

    async def main() -> None:
        assert llm.state is EngineState.WARMING
        kill(llm)
        while llm.state is EngineState.WARMING:
            await asyncio.sleep(0)
        assert llm.state is EngineState.STOPPED

    run(main())


def test_a_shutdown_during_the_start_reaches_those_who_wait_for_it(run: Loop) -> None:
    async def main() -> None:
        before = children()
        llm = AsyncLLM(MODEL, **SETTINGS)
        waiting = [asyncio.create_task(call) for call in (llm.start(), llm.ready(), llm.submit([5], GREEDY))]
        await asyncio.sleep(0)
        await llm.shutdown()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(result) for result in results] == [NotServingError] * 3
        assert children() == before

    run(main())


@pytest.mark.slow
def test_an_engine_that_cannot_be_started_again_is_given_up(
    run: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "_MOST_FAILED_STARTS", 2)
    shutil.copytree(MODEL, tmp_path / "model")
    llm = AsyncLLM(tmp_path / "model", **SETTINGS)

    async def main() -> None:
        await llm.start()
        (tmp_path / "model" / "config.json").unlink()
        kill(llm)
        while llm.state is not EngineState.RESTARTING:
            await asyncio.sleep(0)
        with pytest.raises(EngineDeadError, match="2 times in a row"):
            await last(llm.generate([5, 6, 7], GREEDY))
        assert llm.state is EngineState.STOPPED
        with pytest.raises(NotServingError, match="2 times in a row"):
            await llm.submit([5, 6, 7], GREEDY)
        await llm.shutdown()

    run(main())


def test_a_model_or_setting_that_cannot_be_used_is_told_at_the_start(run: Loop, tmp_path: Path) -> None:
    async def start(*args: Any, **settings: Any) -> None:
        llm = AsyncLLM(*args, **settings)
        try:
            await llm.start()
        finally:
            await llm.shutdown()

    with pytest.raises(ConfigError, match="unknown setting 'blok_size'"):
        AsyncLLM(MODEL, blok_size=4)
    with pytest.raises(ConfigError, match="max_model_len=4096 must be at most"):
        run(start(MODEL, **{**SETTINGS, "max_model_len": 4096}))
    with pytest.raises(ModelError, match="no such folder"):
        run(start(tmp_path / "nothing"))


def test_draining_finishes_what_runs_and_refuses_what_comes(run: Loop, llm: AsyncLLM) -> None:
    async def main() -> None:
        streams = [await llm.submit([5, 6, 7 + i], GREEDY) for i in range(6)]
        drained = asyncio.create_task(llm.drain(DEADLINE))
        await asyncio.sleep(0)
        assert llm.state is EngineState.DRAINING
        with pytest.raises(NotServingError, match="shutting down"):
            await llm.submit([5, 6, 7], GREEDY)
        await drained
        assert [stream.output.outputs[0].finish_reason for stream in streams] == ["length"] * 6

    run(main())


def test_draining_ends_what_takes_too_long(run: Loop, llm: AsyncLLM) -> None:
    async def main() -> None:
        stream = await llm.submit([5, 6, 7], LONG)
        await anext(stream)
        await llm.drain(0.0)
        assert stream.output.outputs[0].finish_reason == "abort"

    run(main())


def test_shutdown_reaches_callers_and_later_ones(run: Loop, llm: AsyncLLM) -> None:
    async def main() -> None:
        streams = [await llm.submit([5, 6, 7], LONG) for _ in range(3)]
        await anext(streams[0])
        pid = llm.engine_pid
        assert pid is not None
        await llm.shutdown()
        for stream in streams:
            assert (await last(stream)).outputs[0].error == "the engine was shut down"
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        for call in (llm.stats, llm.check_integrity, lambda: last(llm.generate([1], GREEDY)), llm.start):
            with pytest.raises(NotServingError, match="shut down"):
                await call()
        await llm.shutdown()

    run(main())
