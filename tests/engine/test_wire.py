"""Messages between processes, and the engine's side of them."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdual import EngineConfig, SamplingParams
from jaxdual.engine.process import EngineLoop
from jaxdual.engine.request import Request, Target, TokenEvent, TokenLogprobs
from jaxdual.engine.wire import (
    Abort,
    Add,
    Adopt,
    Ask,
    Events,
    Expect,
    Forget,
    PeerDied,
    Prefill,
    Settled,
    Start,
    Stop,
    ToEngine,
    ToFront,
)
from jaxdual.frames import Frames, MessageSocket

PARAMS = SamplingParams(logit_bias={3: 1.5}, stop=["end"], stop_token_ids=[1, 2], seed=-5, n=2, logprobs=0)
MESSAGES = [
    Start(EngineConfig(model="somewhere", seed=3, max_model_len=None)),
    Add(Request("7", [1, 2, 2**31 - 1], PARAMS, 1.25, -3, "Zoë", b"\x00\xff", ((1, 2), None))),
    Prefill(Request("7", [1], PARAMS, 1.25), Target("a", "b", b"\x00", (0, 3), ((4096, 0), ()))),
    Expect("7", 12, "a"),
    Adopt(Request("7", [1], PARAMS, 1.25, resumed=((5,),)), 3),
    Forget("7"),
    Settled("7"),
    PeerDied("a"),
    Abort("7", 1),
    Abort("8"),
    Ask(1, check_integrity=True),
    Stop(),
]
EVENT = TokenEvent(
    "7",
    1,
    55,
    logprobs=TokenLogprobs(-0.5, 1, ((55, -0.5), (3, float("-inf")))),
    finish_reason="stop",
    stop_token=55,
    cached_tokens=64,
    prompt_logprobs=(TokenLogprobs(-1.0, 2, ()),),
    error="none",
)


@given(st.lists(st.integers(1, 200), min_size=1, max_size=20))
def test_messages_arrive_as_they_were_however_the_bytes_are_cut(sizes: list[int]) -> None:
    sender, receiver = Frames(ToEngine), Frames(ToEngine)
    data = b"".join(sender.encode(message) for message in MESSAGES)
    got: list[Any] = []
    position = 0
    while position < len(data):
        size = sizes[position % len(sizes)]
        got += receiver.feed(data[position : position + size])
        position += size
    assert got == MESSAGES


def test_events_arrive_as_they_were() -> None:
    message = Events([EVENT, TokenEvent("8", 0, None)], None)
    assert list(Frames(ToFront).feed(Frames(ToFront).encode(message))) == [message]


def test_what_is_no_message_is_refused() -> None:
    frame = Frames(ToFront).encode(Events([], None))
    with pytest.raises(msgspec.DecodeError):
        list(Frames(ToEngine).feed(frame))


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, MessageSocket]]:
    front, engine = socket.socketpair()
    with front, engine:
        yield front, MessageSocket(engine, ToEngine, "the front")


def test_a_channel_gives_what_is_there_and_waits_only_when_told(ends: tuple[socket.socket, MessageSocket]) -> None:
    front, channel = ends
    assert channel.receive(0.0) == []
    frame = Frames(ToEngine).encode(Abort("7"))
    front.sendall(frame + frame[:5])
    assert channel.receive(None) == [Abort("7")]
    front.sendall(frame[5:] + frame)
    assert channel.receive(0.0) == [Abort("7"), Abort("7")]
    front.close()
    with pytest.raises(ConnectionError):
        channel.receive(0.0)


class Broken:
    """An engine whose second step fails."""

    descriptors = ()
    patience = 0.0

    def __init__(self) -> None:
        self.engine = self
        self.has_work = False
        self.steps = 0
        self.shapes: list[tuple[str, Callable[[], float]]] = []

    def warm_ups(self) -> Iterator[tuple[str, Callable[[], float]]]:
        return iter(self.shapes)

    def stats(self) -> None:
        return None

    def add(self, request: Request) -> None:
        if request.params.n > 1:
            raise ValueError("no more than one output")
        self.has_work = True

    def poll(self) -> None:
        pass

    def take_messages(self) -> list[Any]:
        return []

    def step(self) -> list[TokenEvent]:
        self.steps += 1
        if self.steps == 2:
            raise RuntimeError("the device is gone")
        return [TokenEvent("1", 0, 5)]


def test_a_loop_ends_with_its_engine_s_failure_and_refuses_what_it_must(
    ends: tuple[socket.socket, MessageSocket],
) -> None:
    front, channel = ends
    frames = Frames(ToEngine)
    front.sendall(frames.encode(Add(Request("0", [1], SamplingParams(n=2), 0.0))))
    front.sendall(frames.encode(Add(Request("1", [1], SamplingParams(), 0.0))))
    with pytest.raises(RuntimeError, match="the device is gone"):
        EngineLoop(Broken(), channel).run()  # type: ignore[arg-type]
    refused, first = Frames(ToFront).feed(front.recv(1 << 16))
    assert [(e.request_id, e.index, e.error) for e in refused.events] == [
        ("0", index, "no more than one output") for index in range(2)
    ]
    assert [(e.request_id, e.token) for e in first.events] == [("1", 5)]


def test_shapes_are_compiled_beside_requests_too(
    ends: tuple[socket.socket, MessageSocket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jaxdual.engine.process._WARM_UP_SECONDS", 0.0)
    front, channel = ends
    engine = Broken()
    engine.shapes = [("first", lambda: 1.0), ("second", lambda: 2.0)]
    front.sendall(Frames(ToEngine).encode(Add(Request("1", [1], SamplingParams(), 0.0))))
    with pytest.raises(RuntimeError, match="the device is gone"):
        EngineLoop(engine, channel).run()  # type: ignore[arg-type]
    messages = list(Frames(ToFront).feed(front.recv(1 << 16)))
    assert [type(message).__name__ for message in messages] == ["Events", "Compiled"]
    assert messages[1].name == "first"
    assert not messages[1].last
