"""Prompts that come from another engine: what is granted, read, lost and given back, in any order of events."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jaxdual.agent.wire import AwaitGone, Disconnect, Done, GroupSlots, Load, PeerGone
from jaxdual.engine.handoff import Arrivals
from jaxdual.engine.wire import ArrivalLost, Granted, HitsRead
from jaxdual.kv.group import GroupPages
from jaxdual.kv.lease import Lease, LeaseState
from jaxdual.kv.staging import Staging

PAGE, PAGES = 4, 12


class Link:
    """A KV agent that answers when it is told to, and dies when it is told to."""

    def __init__(self, staging: Staging) -> None:
        self.staging = staging
        self.attached = SimpleNamespace(address="here", descriptor=b"slab")
        self.era = 0
        self.asked: list[tuple[Any, Callable[[Any], None]]] = []
        self.deaths: list[Callable[[], None]] = []
        self.news: list[Callable[[Any], None]] = []

    def ask(self, message: Callable[[int], Any], answer: Callable[[Any], None]) -> None:
        self.asked.append((message(len(self.asked)), answer))

    def on_death(self, tell: Callable[[], None]) -> None:
        self.deaths.append(tell)

    def on_news(self, tell: Callable[[Any], None]) -> None:
        self.news.append(tell)

    def die(self) -> None:
        self.asked.clear()
        self.staging.leases.carrier_dead(self.era)
        self.era += 1
        for tell in self.deaths:
            tell()


class Staged:
    """Where sequences go whose blocks have arrived."""

    def __init__(self) -> None:
        self.leases: list[Lease] = []

    def put(
        self, seq_id: int, lease: Lease, firsts: Any, blocks: int, computed: int, *, stored: int, handed_over: bool
    ) -> None:
        assert handed_over
        assert lease.state is LeaseState.READY, "adopted while somebody may write"
        self.leases.append(lease)


class ArrivalMachine(RuleBasedStateMachine):
    """A decode engine's end, with what a cluster, prefill engines, the agent and time may do."""

    def __init__(self) -> None:
        super().__init__()
        memory = [GroupPages(1, staging_pages=PAGES)]
        self.staging, self.staged, self.now = Staging(memory), Staged(), 0.0
        self.link = Link(self.staging)
        self.arrivals = Arrivals(
            self.link,  # type: ignore[arg-type]
            self.staging,
            self.staged,  # type: ignore[arg-type]
            memory=memory,
            places=[GroupSlots(0, 64, 64)],
            page_size=PAGE,
            timeout=10.0,
            clock=lambda: self.now,
        )
        self.peers = ["peer 0", "peer 1"]
        self.count = 0
        self.expected: dict[str, str] = {}  # announced, and nothing said of it: by request, its peer
        self.granted: dict[str, str] = {}
        self.reading: set[str] = set()
        self.forgotten: dict[str, str] = {}  # granted, and not wanted any more

    @rule(data=st.data(), tokens=st.integers(1, 30))
    def expect(self, data: st.DataObject, tokens: int) -> None:
        name, peer = str(self.count), data.draw(st.sampled_from(self.peers))
        self.count += 1
        hits = data.draw(st.integers(0, (tokens - 1) // PAGE))
        first = data.draw(st.integers(0, hits))
        keys = [bytes([number]) * 32 for number in range(hits - first)]
        self.arrivals.expect(name, tokens, peer, keys, first)
        self.expected[name] = peer
        if keys:
            self.reading.add(name)

    @rule()
    def tell(self) -> None:
        for message in self.arrivals.take_messages():
            name = message.request_id
            match message:
                case Granted(_, None):
                    del self.expected[name]
                    self.reading.discard(name)
                case Granted(_, target):
                    self.granted[name] = self.expected.pop(name)
                    assert target is not None
                    assert target.peer == self.granted[name]
                case HitsRead():
                    self.reading.discard(name)
                case ArrivalLost():
                    self.reading.discard(name)
                    if name in self.granted:
                        self.forgotten[name] = self.granted.pop(name)

    @precondition(lambda self: self.granted)
    @rule(data=st.data())
    def adopt(self, data: st.DataObject) -> None:
        self.tell()
        ready = sorted(self.granted.keys() - self.reading)
        if ready:
            name = data.draw(st.sampled_from(ready))
            del self.granted[name]
            before = len(self.staged.leases)
            adopted = self.arrivals.adopt(name, 0, stored=0)
            assert adopted == (len(self.staged.leases) > before)

    @precondition(lambda self: self.expected or self.granted)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        self.tell()
        names = sorted({*self.expected, *self.granted})
        if names:
            name = data.draw(st.sampled_from(names))
            self.arrivals.forget(name)
            self.reading.discard(name)
            if name in self.granted:
                self.forgotten[name] = self.granted.pop(name)
            else:
                del self.expected[name]

    @precondition(lambda self: self.granted or self.forgotten)
    @rule(data=st.data(), broken=st.booleans())
    def settle(self, data: st.DataObject, broken: bool) -> None:
        name = data.draw(st.sampled_from(sorted({*self.granted, *self.forgotten})))
        used = self.staging.num_used
        self.arrivals.settled(name, broken=broken)
        assert not broken or self.staging.num_used == used, "pages are free that something may still land in"
        self.reading.discard(name)
        self.granted.pop(name, None)
        self.forgotten.pop(name, None)

    @rule(data=st.data())
    def peer_dies(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, 1))
        peer, self.peers[number] = self.peers[number], f"peer {self.count} again {number}"
        self.count += 1
        self.arrivals.peer_died(peer)
        for held in (self.expected, self.granted, self.forgotten):
            for name in [name for name, other in held.items() if other == peer]:
                del held[name]
                self.reading.discard(name)

    @rule(data=st.data())
    def connection_breaks(self, data: st.DataObject) -> None:
        for tell in self.link.news:
            tell(PeerGone(data.draw(st.sampled_from(self.peers))))

    @rule()
    def agent_dies(self) -> None:
        self.link.die()

    @precondition(lambda self: self.link.asked)
    @rule(data=st.data())
    def agent_answers(self, data: st.DataObject) -> None:
        message, answer = self.link.asked.pop(data.draw(st.integers(0, len(self.link.asked) - 1)))
        match message:
            case AwaitGone(number) | Disconnect(number):
                answer(Done(number, [True], 0.0))
            case Load(number, _, keys, slots):
                assert len(keys) == len(slots)
                answer(Done(number, [data.draw(st.booleans()) for _ in keys], 0.0))

    @rule(seconds=st.sampled_from([1.0, 11.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.staged.leases)
    @rule()
    def copied_to_the_device(self) -> None:
        self.staging.leases.end(self.staged.leases.pop())

    @invariant()
    def leases_are_in_order(self) -> None:
        self.staging.check_integrity()

    def teardown(self) -> None:
        """When everybody has said the last word, all pages are free."""
        self.tell()
        for name in list(self.expected):
            self.arrivals.forget(name)
        for name in [*self.granted, *self.forgotten]:
            self.arrivals.settled(name)
        while self.staged.leases:
            self.copied_to_the_device()  # type: ignore[no-untyped-call]
        while self.link.asked:
            message, answer = self.link.asked.pop()
            answer(Done(0, [True] * len(getattr(message, "keys", [0])), 0.0))
        self.arrivals.take_messages()
        assert self.staging.num_free == (PAGES,)


ArrivalMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestArrivals = ArrivalMachine.TestCase
