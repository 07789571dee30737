"""The cluster's state machine with engines that act in any order, fail, die and come back."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jaxdual import SamplingParams
from jaxdual.cluster.cluster import Cluster
from jaxdual.engine.request import Hits, Request, Target, TokenEvent
from jaxdual.engine.wire import (
    Abort,
    Add,
    Adopt,
    AgentAt,
    ArrivalLost,
    Events,
    Expect,
    Forget,
    Granted,
    HandedOff,
    HitsRead,
    PeerDied,
    Prefill,
    Settled,
)
from jaxdual.kv.keys import KeyChain, root_key
from jaxdual.outputs import EngineStats
from jaxdual.scheduling.loads import Role
from jaxdual.scheduling.path_modes import PathMode
from jaxdual.scheduling.paths import PathScheduler
from jaxdual.scheduling.prefill_placement import PrefillPlacement
from jaxdual.scheduling.read_side import ReadPolicy

PAGE = 4


FIGURES = EngineStats(kv_blocks_available=10**6)


def token_after(prompt: tuple[int, ...], index: int, before: int) -> int:
    """What the model gives: any engine the same."""
    return hash((prompt, index, before)) % 1000


@dataclass
class Running:
    """A request at an engine, and the tokens of each output."""

    request: Request
    tokens: list[list[int] | None]
    target: Target | None = None
    hits: Hits = field(default_factory=Hits)
    read_there: int | None = 0  # blocks, as the prefill engine knows; None while it does not


@dataclass
class EngineModel:
    """An engine as its messages show it: what it runs, and what memory it has let others write."""

    number: int
    role: Role
    address: str
    inbox: deque[Any] = field(default_factory=deque)
    running: dict[str, Running] = field(default_factory=dict)
    writing: dict[str, bool] = field(default_factory=dict)  # prompts that are being written elsewhere: still wanted
    expected: dict[str, Expect] = field(default_factory=dict)  # what is not granted
    reading: dict[str, int] = field(default_factory=dict)  # blocks that are read from the store into what is granted
    granted: dict[str, str] = field(default_factory=dict)
    quarantined: dict[str, str] = field(default_factory=dict)

    @property
    def ready(self) -> list[str]:
        """Those that run and wait for nothing that is read."""
        return sorted(name for name, running in self.running.items() if running.read_there is not None)


def make_scheduler() -> PathScheduler:
    return PathScheduler(PathMode(ReadPolicy.SPLIT), PrefillPlacement(10**6, 10**6), block_tokens=PAGE)


class ClusterMachine(RuleBasedStateMachine):
    """Requests of one to two outputs over two prefill and two decode engines."""

    def __init__(self) -> None:
        super().__init__()
        self.engines: dict[int, EngineModel] = {}
        self.wanted: dict[str, Request] = {}
        self.got: dict[tuple[str, int], list[int]] = {}
        self.ended: dict[tuple[str, int], str] = {}
        self.aborted: set[tuple[str, int]] = set()
        self.addresses = 0
        self.requests = 0
        self.looking: list[tuple[int, int]] = []
        self.held = False
        self.cluster = Cluster(
            make_scheduler(),
            send=self.send,
            deliver=self.deliver,
            page_size=PAGE,
            clock=lambda: 0.0,
            key_chain=lambda salt: KeyChain(root_key(b"model", b"layout", salt), PAGE),
            look=lambda number, keys: self.looking.append((number, len(keys))),
        )
        for number in range(4):
            self.come(number)

    # The world around the cluster.

    def send(self, number: int, message: Any) -> None:
        assert not self.held or not isinstance(message, (Add, Expect, Prefill, Adopt)), "work for engines that switch"
        if number in self.engines:
            self.engines[number].inbox.append(message)

    def deliver(self, events: list[TokenEvent]) -> None:
        for event in events:
            key = (event.request_id, event.index)
            assert key not in self.ended, "a token after the end"
            assert key not in self.aborted, "a token of an output that was aborted"
            if event.token is not None:
                self.got.setdefault(key, []).append(event.token)
            if event.finish_reason is not None:
                self.ended[key] = event.finish_reason

    def come(self, number: int) -> None:
        role = Role.PREFILL if number < 2 else Role.DECODE
        self.addresses += 1
        self.engines[number] = EngineModel(number, role, f"agent {self.addresses}")
        self.cluster.joined(number, role, self.engines[number].address, FIGURES)

    @rule(length=st.integers(1, 25), outputs=st.integers(1, 2), tokens=st.integers(1, 4))
    def submit(self, length: int, outputs: int, tokens: int) -> None:
        self.requests += 1
        name = str(self.requests)
        params = SamplingParams(max_tokens=tokens, n=outputs)
        self.wanted[name] = Request(name, [self.requests] * length, params, float(self.requests))
        self.cluster.add(self.wanted[name])

    @precondition(lambda self: self.wanted)
    @rule(data=st.data(), index=st.sampled_from([None, 0, 1]))
    def abort(self, data: st.DataObject, index: int | None) -> None:
        name = data.draw(st.sampled_from(sorted(self.wanted)))
        for number in range(self.wanted[name].params.n):
            if index in (None, number) and (name, number) not in self.ended:
                self.aborted.add((name, number))
        self.cluster.abort(name, index)

    @precondition(lambda self: self.engines)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.engines)))
        del self.engines[number]
        self.cluster.died(number)

    @precondition(lambda self: not self.held)
    @rule()
    def hold(self) -> None:
        if len(self.cluster) or self.cluster.num_unsettled:
            with pytest.raises(ValueError, match="requests are under way"):
                self.cluster.hold()
        else:
            self.cluster.hold()
            self.held = True

    @precondition(lambda self: self.held)
    @rule(switched=st.booleans())
    def go_on(self, switched: bool) -> None:
        self.held = False
        self.cluster.go_on(make_scheduler() if switched else None)

    @precondition(lambda self: self.engines)
    @rule(data=st.data())
    def lose_agent(self, data: st.DataObject) -> None:
        engine = self.engines[data.draw(st.sampled_from(sorted(self.engines)))]
        engine.address = ""
        self.cluster.message(engine.number, AgentAt(""))

    @rule(number=st.integers(0, 3))
    def start_agent(self, number: int) -> None:
        engine = self.engines.get(number)
        if engine is not None and not engine.address:
            self.addresses += 1
            engine.address = f"agent {self.addresses}"
            self.cluster.message(number, AgentAt(engine.address))

    @rule(number=st.integers(0, 3))
    def come_back(self, number: int) -> None:
        if number not in self.engines:
            self.come(number)

    @precondition(lambda self: self.looking)
    @rule(data=st.data())
    def find(self, data: st.DataObject) -> None:
        number, most = self.looking.pop(0)
        self.cluster.found(number, data.draw(st.sampled_from(range(most, -1, -1))))

    # What engines do.

    @precondition(lambda self: any(engine.inbox for engine in self.engines.values()))
    @rule(data=st.data())
    def hear(self, data: st.DataObject) -> None:
        engine = self.engines[data.draw(st.sampled_from([n for n, e in sorted(self.engines.items()) if e.inbox]))]
        match engine.inbox.popleft():
            case Prefill(request, target, hits, moves):
                assert engine.role is Role.PREFILL
                assert moves
                assert request.params.n == 1
                given = [list(tokens) for tokens in request.resumed or ((),)]
                assert request.params.max_tokens == len(given[0]) + 1
                assert (hits.here + hits.there) * PAGE < len(request.prompt_token_ids) + len(given[0])
                waits = None if hits.there else 0
                engine.running[request.request_id] = Running(request, list(given), target, hits, waits)
                engine.writing[request.request_id] = True
            case Add(request):
                self.run(engine, request)
            case Adopt(request):
                # Or it is lost, and computed again.
                assert request.request_id not in engine.reading, "adopted what is still read"
                known = engine.granted.pop(request.request_id, None)
                assert known or engine.quarantined.pop(request.request_id, None), "adopted what was not granted"
                self.run(engine, request)
            case Abort(name, index):
                if name in engine.writing:
                    engine.writing[name] = False
                running = engine.running.get(name)
                if running is not None:
                    for number in range(len(running.tokens)):
                        running.tokens[number] = None if index in (None, number) else running.tokens[number]
                    if all(tokens is None for tokens in running.tokens):
                        del engine.running[name]
            case Expect(name, tokens) as expect:
                assert len(expect.keys) * PAGE < tokens
                assert expect.peer, "given to an engine whose agent is away"
                engine.expected[name] = expect
            case HitsRead(name, blocks):
                assert engine.role is Role.PREFILL
                if name in engine.running:
                    assert engine.running[name].read_there is None, "said twice"
                    assert blocks <= engine.running[name].hits.there
                    engine.running[name].read_there = blocks
            case Forget(name):
                engine.expected.pop(name, None)
                engine.reading.pop(name, None)
                if name in engine.granted:
                    engine.quarantined[name] = engine.granted.pop(name)
            case Settled(name):
                engine.granted.pop(name, None)
                engine.quarantined.pop(name, None)
            case PeerDied(peer):
                for held in (engine.granted, engine.quarantined):
                    for name in [name for name, other in held.items() if other == peer]:
                        del held[name]
                        engine.reading.pop(name, None)
                for name in [name for name, expect in engine.expected.items() if expect.peer == peer]:
                    del engine.expected[name]

    def run(self, engine: EngineModel, request: Request) -> None:
        assert engine.role is Role.DECODE
        given = request.resumed or ((),) * request.params.n
        engine.running[request.request_id] = Running(request, [None if t is None else list(t) for t in given])

    @precondition(lambda self: any(engine.expected for engine in self.engines.values()))
    @rule(data=st.data(), fits=st.booleans())
    def grant(self, data: st.DataObject, fits: bool) -> None:
        engine = self.engines[data.draw(st.sampled_from([n for n, e in sorted(self.engines.items()) if e.expected]))]
        name = next(iter(engine.expected))
        expect = engine.expected.pop(name)
        target = None
        if fits:
            engine.granted[name] = expect.peer
            target = Target(expect.peer, engine.address, b"", (0,), ((0,),))
            if expect.keys:
                engine.reading[name] = len(expect.keys)
        self.cluster.message(engine.number, Granted(name, target))

    @precondition(lambda self: any(engine.reading for engine in self.engines.values()))
    @rule(data=st.data())
    def read_there(self, data: st.DataObject) -> None:
        engine = self.engines[data.draw(st.sampled_from([n for n, e in sorted(self.engines.items()) if e.reading]))]
        name = next(iter(engine.reading))
        most = engine.reading.pop(name)
        self.cluster.message(engine.number, HitsRead(name, data.draw(st.sampled_from(range(most, -1, -1)))))

    @precondition(lambda self: any(engine.writing for engine in self.engines.values()))
    @rule(data=st.data())
    def read_here(self, data: st.DataObject) -> None:
        engine = self.engines[data.draw(st.sampled_from([n for n, e in sorted(self.engines.items()) if e.writing]))]
        self.cluster.message(engine.number, HitsRead(data.draw(st.sampled_from(sorted(engine.writing))), 0))

    @precondition(lambda self: any(engine.granted for engine in self.engines.values()))
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        engine = self.engines[data.draw(st.sampled_from([n for n, e in sorted(self.engines.items()) if e.granted]))]
        name = next(iter(engine.granted))
        engine.quarantined[name] = engine.granted.pop(name)
        engine.reading.pop(name, None)
        self.cluster.message(engine.number, ArrivalLost(name, slow=data.draw(st.booleans())))

    @precondition(lambda self: any(engine.ready for engine in self.engines.values()))
    @rule(data=st.data(), fails=st.sampled_from([False] * 7 + [True]))
    def step(self, data: st.DataObject, fails: bool) -> None:
        engine = self.engines[data.draw(st.sampled_from([n for n, e in sorted(self.engines.items()) if e.ready]))]
        name = data.draw(st.sampled_from(engine.ready))
        running = engine.running[name]
        events = []
        for index, tokens in enumerate(running.tokens):
            if tokens is None:
                continue
            if fails:
                events.append(TokenEvent(name, index, None, finish_reason="error", error="it failed"))
                running.tokens[index] = None
                continue
            tokens.append(token_after(tuple(running.request.prompt_token_ids), index, len(tokens)))
            done = len(tokens) >= (running.request.params.max_tokens or 0)
            events.append(TokenEvent(name, index, tokens[-1], finish_reason="length" if done else None))
            running.tokens[index] = None if done else tokens
        if all(tokens is None for tokens in running.tokens):
            del engine.running[name]
        self.cluster.message(engine.number, Events(events, FIGURES))

    @precondition(lambda self: any(engine.writing for engine in self.engines.values()))
    @rule(data=st.data(), arrives=st.sampled_from([True] * 5 + [False]))
    def hand_off(self, data: st.DataObject, arrives: bool) -> None:
        engine = self.engines[data.draw(st.sampled_from([n for n, e in sorted(self.engines.items()) if e.writing]))]
        ready = [name for name in sorted(engine.writing) if name not in engine.running]
        if ready:
            name = data.draw(st.sampled_from(ready))
            wanted = engine.writing.pop(name)
            self.cluster.message(engine.number, HandedOff(name, wanted and arrives, broken=not arrives))

    # What must hold.

    @invariant()
    def the_cluster_is_in_order(self) -> None:
        self.cluster.check_integrity()
        for (name, index), tokens in self.got.items():
            prompt = tuple(self.wanted[name].prompt_token_ids)
            assert tokens == [token_after(prompt, index, before) for before in range(len(tokens))]

    def teardown(self) -> None:
        """With no more faults, every request comes to its end, and all memory comes back."""
        if self.held:
            self.go_on(switched=True)
        for number in range(4):
            self.come_back(number)
            self.start_agent(number)
        for _ in range(10_000):
            if not self.work_once():
                break
        assert not len(self.cluster)
        for name, request in self.wanted.items():
            for index in range(request.params.n):
                key = (name, index)
                if key in self.aborted:
                    continue
                assert self.ended[key] in ("length", "error")
                if self.ended[key] == "length":
                    assert len(self.got[key]) == request.params.max_tokens
        for engine in self.engines.values():
            left = (engine.running, engine.writing, engine.expected, engine.reading, engine.granted, engine.quarantined)
            assert not any(left), engine

    def work_once(self) -> bool:
        data = First()
        if self.looking:
            self.find(data)  # type: ignore[no-untyped-call]
            return True
        for rule_, ready in (
            (self.hear, lambda engine: engine.inbox),
            (lambda data: self.grant(data, True), lambda engine: engine.expected),
            (self.read_there, lambda engine: engine.reading),
            (lambda data: self.step(data, False), lambda engine: engine.ready),
            (lambda data: self.hand_off(data, True), lambda engine: engine.writing),
        ):
            if any(ready(engine) for engine in self.engines.values()):
                rule_(data)  # type: ignore[no-untyped-call]
                return True
        return False


class First:
    """Draws the first of what could be drawn."""

    def draw(self, strategy: Any) -> Any:
        return strategy.elements[0]


ClusterMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)
TestCluster = ClusterMachine.TestCase
