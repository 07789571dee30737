"""Engines of several processes: the logits and tokens of one device, and clear errors when a process is missing."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxdual import LLM, AsyncLLM, EngineConfig, SamplingParams
from jaxdual.config import ConfigError
from jaxdual.engine.follower_wire import Agreed, Alive, Failed, Fetch, Join, Refused, ToFollower, ToLeader
from jaxdual.engine.followers import Followers
from jaxdual.engine.joining import _versions, lead
from jaxdual.engine.wire import Start, ToFront
from jaxdual.errors import EngineDeadError
from jaxdual.frames import MessageSocket
from models.errors import ModelError
from tests.engine.models import FIXTURES, TieCounter, expected, folder
from tests.parallel.logits_of_processes import SIZES
from tests.parallel.models import model
from tests.parallel.test_expert_balancer import prompts
from tests.parallel.test_mesh_programs import assert_close, tokens_of

SETTINGS: dict[str, Any] = {"block_size": 8, "max_num_seqs": 4, "max_num_batched_tokens": 32, "max_model_len": 96}
PROCESSES: dict[str, Any] = {"num_processes": 2, "join_timeout": 120, "compile_ahead": False}
DEADLINE = 600.0  # seconds; reached only by a failing test


def free_port() -> int:
    """One whose successor is free, too."""
    while True:
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", 0)) as one:
            port = int(one.getsockname()[1])
            with socket.create_server(("127.0.0.1", port + 1)):
                return port


def in_a_loop[**P](test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), DEADLINE))

    return run


@contextlib.contextmanager
def running(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A Python module that is ended at last."""
    with subprocess.Popen([sys.executable, "-m", *arguments], text=True, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.slow
def test_logits_of_two_processes_are_those_of_one_device(tmp_path: Path) -> None:
    path, port = str(tmp_path / "logits.npz"), str(free_port())
    module = "tests.parallel.logits_of_processes"
    with running(module, port, "0", path) as first, running(module, port, "1", path) as second:
        for process in (first, second):
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
    with np.load(path) as found:
        for number, (name, sizes, _) in enumerate(SIZES):
            tokens = tokens_of(name, sizes.ranks)
            assert_close(found[str(number)], np.asarray(model(name).logits(tokens)))


async def generate(llm: AsyncLLM, prompt: list[int], params: SamplingParams, request_id: str) -> Any:
    async for output in llm.generate({"prompt_token_ids": prompt}, params, request_id):
        final = output
    return final


def mixed(number: int) -> SamplingParams:
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0, "prompt_logprobs": 1},
        {"temperature": 0, "repetition_penalty": 1.3, "logit_bias": {3: 2.0}},
        {"temperature": 0.8, "seed": 5, "top_p": 0.9},
    ]
    return SamplingParams(max_tokens=12 + number, ignore_eos=True, **kinds[number % len(kinds)])


@pytest.mark.slow
@in_a_loop
async def test_tokens_while_experts_move_and_after_a_process_has_died() -> None:
    """Two processes with two devices each: in the middle one is killed, and requests go on in the next engine."""
    settings = SETTINGS | {"num_kv_blocks": 14}
    alone = LLM(folder("qwen3_moe"), **settings)
    want = alone.generate([{"prompt_token_ids": one} for one in prompts(12)], [mixed(number) for number in range(12)])
    ties = TieCounter("qwen3_moe")
    async with AsyncLLM(
        folder("qwen3_moe"),
        **settings,
        **PROCESSES,
        expert_parallel_size=2,
        tensor_parallel_size=2,
        expert_placement="eplb",
        expert_interval=8,
        expert_window=4,
    ) as llm:
        for kill in (False, True):
            tasks = [
                asyncio.create_task(generate(llm, prompt, mixed(number), f"{kill} {number}"))
                for number, prompt in enumerate(prompts(12))
            ]
            if kill:
                while (await llm.stats()).generation_tokens < 250:
                    await asyncio.sleep(0.02)
                os.kill(follower_of(llm.engine_pid), signal.SIGKILL)
            got = await asyncio.gather(*tasks)
            for number, (prompt, one, other) in enumerate(zip(prompts(12), want, got, strict=True)):
                if number % 4 < 2:
                    ties.compare(prompt, one.outputs[0].token_ids, other.outputs[0].token_ids)
                else:
                    assert one.outputs[0].token_ids == other.outputs[0].token_ids
                if number % 4 == 1 and not kill:
                    for scores, others in zip(one.prompt_logprobs[1:], other.prompt_logprobs[1:], strict=True):
                        np.testing.assert_allclose(
                            [score.logprob for score in scores.values()],
                            [score.logprob for score in others.values()],
                            rtol=1e-4,
                        )
            if not kill:
                assert (await llm.stats()).experts_moved > 0
        assert llm.restarts == 1
        await llm.check_integrity()
    ties.check()


def follower_of(pid: int | None) -> int:
    """The process that an engine has started."""
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


@pytest.mark.slow
@in_a_loop
async def test_processes_that_are_started_by_hand() -> None:
    want, port = expected("qwen3_moe"), free_port()
    address = f"127.0.0.1:{port}"
    command = ["jaxdual.follower", "--coordinator-address", address, "--process-id", "1", "--join-timeout", "120"]
    with running(*command) as follower:
        async with AsyncLLM(
            FIXTURES / "qwen3_moe",
            **SETTINGS | {"max_model_len": 256},
            **PROCESSES,
            data_parallel_size=2,
            coordinator_address=address,
        ) as llm:
            params = SamplingParams(max_tokens=32, temperature=0, ignore_eos=True)
            got = await asyncio.gather(
                *(generate(llm, want[f"prompt{i}"].tolist(), params, str(i)) for i in (0, 1)),
            )
            for i, one in enumerate(got):
                assert one.outputs[0].token_ids == want[f"greedy{i}"].tolist()
        _, errors = follower.communicate(timeout=60)
        assert follower.returncode == 0, errors


@pytest.mark.slow
@in_a_loop
async def test_a_signal_ends_a_follower_and_with_it_the_engine() -> None:
    address = f"127.0.0.1:{free_port()}"
    settings: dict[str, Any] = SETTINGS | PROCESSES | {"join_timeout": 20, "data_parallel_size": 2}
    command = ["jaxdual.follower", "--coordinator-address", address, "--process-id", "1"]
    with running(*command) as follower:
        async with AsyncLLM(FIXTURES / "llama", **settings, coordinator_address=address) as llm:
            first = llm.engine_pid
            follower.send_signal(signal.SIGTERM)
            await asyncio.to_thread(follower.wait, 10)
            assert follower.returncode == -signal.SIGTERM
            while llm.engine_pid == first:
                await asyncio.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("model_of_follower", "message"), [("missing", "missing"), ("llama", "another configuration")])
@in_a_loop
async def test_a_process_without_the_model_is_named(model_of_follower: str, message: str) -> None:
    address = f"127.0.0.1:{free_port()}"
    command = ["jaxdual.follower", "--coordinator-address", address, "--process-id", "1"]
    with running(*command, "--model", str(FIXTURES / model_of_follower)) as follower:
        with pytest.raises((ModelError, ConfigError), match=f"process 1.*{message}"):
            async with AsyncLLM(
                FIXTURES / "qwen3_moe", **SETTINGS, **PROCESSES, data_parallel_size=2, coordinator_address=address
            ):
                pass
        follower.communicate(timeout=60)
        assert follower.returncode == 1


def test_processes_that_never_come_are_named_within_the_deadline() -> None:
    """And whoever comes instead is told what is wrong, or is not listened to."""
    port, versions = free_port(), _versions()
    config = EngineConfig(
        data_parallel_size=3, num_processes=3, coordinator_address=f"127.0.0.1:{port}", join_timeout=8
    )
    errors: list[str] = []

    def leading() -> None:
        with pytest.raises(ConfigError) as caught:
            lead(config)
        errors.append(str(caught.value))

    thread = threading.Thread(target=leading)
    thread.start()
    sockets = []
    for first, answer in (
        (b"GET / HTTP/1.1\r\n\r\n", None),
        (Join(3, versions), "process_id=3 must be from 1 to 2"),
        (Join(1, versions | {"jax": "0.0"}), "process 1 has .*'jax': '0.0'"),
        (Agreed(b""), "the first message is Agreed, not Join"),
        (Join(1, versions), None),
        (Join(1, versions), "process_id=1 has joined already"),
        (None, None),
        (Join(1, versions), None),
    ):
        if first is None:  # the one that has joined ends, and another one takes its place
            sockets[-2].close()
            time.sleep(0.5)
            continue
        while thread.is_alive():
            with contextlib.suppress(ConnectionRefusedError):
                sockets.append(socket.create_connection(("127.0.0.1", port)))
                break
        channel = MessageSocket(sockets[-1], ToFollower, "the leader")
        if isinstance(first, bytes):
            sockets[-1].sendall(first)
            sockets[-1].shutdown(socket.SHUT_WR)
            continue
        channel.send(first)
        if answer is not None:
            (refused,) = channel.receive(10)
            assert isinstance(refused, Refused)
            assert re.search(answer, refused.reason)
    thread.join(30)
    for one in sockets:
        one.close()
    (error,) = errors
    assert "2 of 3 processes have joined within join_timeout=8 seconds; missing: 2. Each is started by" in error


def test_a_follower_without_an_engine_says_so() -> None:
    address = f"127.0.0.1:{free_port()}"
    command = ["jaxdual.follower", "--coordinator-address", address, "--process-id", "1", "--join-timeout", "0.5"]
    with running(*command) as follower:
        _, errors = follower.communicate(timeout=60)
        assert follower.returncode == 2
        assert f"error: nobody leads an engine at {address}" in errors


def test_settings_of_processes_that_cannot_be_used_are_refused() -> None:
    for settings, message in (
        ({"num_processes": 2}, "num_processes=2 must divide the 1 devices"),
        ({"num_processes": 0}, "num_processes=0 must be at least 1"),
        ({"coordinator_address": "a:1"}, "coordinator_address='a:1' needs num_processes above 1"),
        ({"num_processes": 2, "data_parallel_size": 2, "join_timeout": 0}, "join_timeout=0.0 must be above 0"),
        ({"num_processes": 2, "data_parallel_size": 2, "host_cache_bytes": 1}, "host_cache_bytes=1: blocks leave"),
        (
            {"num_processes": 2, "tensor_parallel_size": 2, "kv_store": "memory:", "kv_store_capacity_bytes": 1},
            "kv_store='memory:': blocks leave",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            EngineConfig(**settings)
    for address in ("nowhere", ":1", "host:port", "host:65535"):
        with pytest.raises(ConfigError, match="must be HOST:PORT"):
            lead(EngineConfig(num_processes=2, data_parallel_size=2, coordinator_address=address))


def test_a_process_that_has_used_jax_cannot_lead() -> None:
    model("dense")  # uses it
    with pytest.raises(ConfigError, match="num_processes=2: process 0 can't start"):
        LLM(FIXTURES / "llama", **SETTINGS, **PROCESSES, data_parallel_size=2)


def test_what_needs_no_other_process_is_refused_before_they_are_waited_for() -> None:
    address = f"127.0.0.1:{free_port()}"
    several: dict[str, Any] = {"num_processes": 2, "coordinator_address": address, "join_timeout": 500}
    with pytest.raises(ConfigError, match="tensor_parallel_size=6 must divide the model's 2 key-value heads"):
        LLM(FIXTURES / "llama", **several, tensor_parallel_size=6)
    with pytest.raises(ModelError):
        LLM("/nowhere", **several, data_parallel_size=2)


def test_a_port_that_is_in_use_is_named() -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port + 1)):
        config = EngineConfig(data_parallel_size=2, num_processes=2, coordinator_address=f"127.0.0.1:{port}")
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port + 1}: Address already in use"):
            lead(config)


@pytest.fixture
def pair() -> Iterator[tuple[Followers, MessageSocket]]:
    """A leader's view of one follower, and that one's end."""
    ours, theirs = socket.socketpair()
    followers = Followers({1: MessageSocket(ours, ToLeader, "a follower")}, ())
    channel = MessageSocket(theirs, ToFollower, "the leader")
    yield followers, channel
    channel.close()
    followers.close()


def test_followers_that_fall_silent_are_lost(
    pair: tuple[Followers, MessageSocket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a call, which nothing would ever end, this process ends."""
    followers, channel = pair
    monkeypatch.setattr("jaxdual.engine.followers._SILENT_SECONDS", 5.0)
    monkeypatch.setattr("jaxdual.engine.followers._STUCK_SECONDS", 0.5)
    ended = threading.Event()
    monkeypatch.setattr("jaxdual.engine.followers.os._exit", lambda status: ended.set())
    for _ in range(6):
        channel.send(Alive())
        time.sleep(0.5)
        followers.check()
    assert not select.select(followers.descriptors, [], [], 0)[0]

    def call() -> None:
        with followers.calling(Fetch()):
            assert ended.wait(20)
            raise RuntimeError("what waits for the device would go on")

    with pytest.raises(EngineDeadError, match="process 1 of the engine has given no sign of life"):
        call()
    assert select.select(followers.descriptors, [], [], 0)[0]


@pytest.mark.parametrize("last_words", [None, Failed("ModelError", "no weights"), Failed("OSError", "disk")])
def test_followers_that_end_while_all_load_are_named(
    last_words: Failed | None, pair: tuple[Followers, MessageSocket]
) -> None:
    followers, channel = pair
    if last_words is not None:
        channel.send(last_words)
    channel.close()
    kind = ModelError if last_words is not None and last_words.kind == "ModelError" else EngineDeadError
    text = "process 1 of the engine has ended" if last_words is None else f"process 1: {last_words.text}"
    with pytest.raises(kind, match=text):
        followers.agree("model", b"1")


def test_an_engine_that_waits_for_others_ends_with_its_front() -> None:
    ours, theirs = socket.socketpair()
    config = EngineConfig(
        model=str(FIXTURES / "llama"),
        data_parallel_size=2,
        num_processes=2,
        coordinator_address=f"127.0.0.1:{free_port()}",
        join_timeout=500,
    )
    command = [sys.executable, "-m", "jaxdual.engine.process", str(theirs.fileno())]
    with subprocess.Popen(command, pass_fds=[theirs.fileno()]) as process:
        theirs.close()
        MessageSocket(ours, ToFront, "the engine").send(Start(config))
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(5)
        ours.close()
        assert process.wait(20) == 0
