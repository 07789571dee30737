"""The path scheduler in a cluster in which everything happens in any order."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxdual.scheduling.decode_placement import DecodePlacement
from jaxdual.scheduling.loads import EngineReport, PathRequest, Role
from jaxdual.scheduling.path_modes import MODES
from jaxdual.scheduling.paths import PathScheduler, Placement
from jaxdual.scheduling.prefill_placement import PrefillPlacement
from jaxdual.scheduling.read_side import ReadPolicy, ReadSide

BETA, MEMORY = 60, 100
NODES = {0: 0, 1: 0, 2: 1, 3: 2, 10: 10, 11: 10, 12: 11}
GROUPS = {0: (0, 1, 2), 1: (3,), 2: (10, 11), 3: (12,)}
ROLES = {0: Role.PREFILL, 1: Role.PREFILL, 2: Role.DECODE, 3: Role.DECODE}


@dataclass(eq=False)
class Running:
    """What the engines know of a placement."""

    placement: Placement
    unread: dict[ReadSide, int] = field(default_factory=dict)
    prefilled: bool = False
    decoding: bool = False

    @property
    def tokens(self) -> int:
        return self.placement.request.prompt_tokens

    def on(self, engine: int) -> bool:
        prefills = self.placement.prefill_engine == engine and not self.prefilled
        return prefills or self.placement.decode_engine == engine


class Cluster(RuleBasedStateMachine):
    """Engines that report exactly what they do, and a scheduler that must lose nothing and place nothing twice."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = set(NODES)
        self.waiting: dict[int, PathRequest] = {}
        self.running: dict[int, Running] = {}
        self.past: list[int] = []
        self.ids = 0
        self.now = 0.0

    @initialize(mode=st.sampled_from(sorted(MODES)))
    def start(self, mode: str) -> None:
        self.mode = MODES[mode]
        self.scheduler = PathScheduler(self.mode, PrefillPlacement(20, BETA), DecodePlacement(), block_tokens=4)

    def report(self, engine: int, other: int = 0) -> EngineReport:
        group = next(group for group, engines in GROUPS.items() if engine in engines)
        mine = [run for run in self.running.values() if run.on(engine)]
        node = NODES[engine]
        unread = sum(
            tokens
            for run in self.running.values()
            for side, tokens in run.unread.items()
            if NODES[self.reader(run, side)] == node
        )
        held = sum(run.tokens for run in mine if run.decoding) if ROLES[group] is Role.DECODE else 0
        tok = sum(run.tokens for run in mine) + other
        return EngineReport(engine, node, group, len(mine) + (other > 0), tok, unread, MEMORY - held)

    def reader(self, run: Running, side: ReadSide) -> int:
        return run.placement.prefill_engine if side is ReadSide.PREFILL else run.placement.decode_engine

    def take(self, placed: list[Placement]) -> None:
        for placement in placed:
            request = self.waiting.pop(placement.request.request_id)  # fails if it was placed already
            assert request == placement.request
            assert placement.number not in self.past
            assert {placement.prefill_engine, placement.decode_engine} <= self.alive
            assert placement.waited == self.now - request.arrival
            read = placement.read
            total = 0 if self.mode.read is ReadPolicy.NONE else request.hit_tokens
            assert read.prefill_tokens + read.decode_tokens == total
            self.past.append(placement.number)
            unread = {ReadSide.PREFILL: read.prefill_tokens, ReadSide.DECODE: read.decode_tokens}
            self.running[placement.number] = Running(placement, unread)

    def fetch(self, group: int, other: int = 0) -> None:
        self.now += 1.0
        reports = [self.report(engine, other) for engine in GROUPS[group] if engine in self.alive]
        if not reports:
            return
        if ROLES[group] is Role.PREFILL:
            self.take(self.scheduler.fetch_prefill(group, reports, self.now))
        else:
            self.take(self.scheduler.fetch_decode(group, reports, self.now))

    @rule(burst=st.lists(st.tuples(st.integers(1, 40), st.floats(0, 1), st.integers(0, 30)), min_size=1, max_size=4))
    def submit(self, burst: list[tuple[int, float, int]]) -> None:
        for prompt, hit, output in burst:
            request = PathRequest(self.ids, prompt, int(hit * prompt), output, self.now)
            self.ids += 1
            self.waiting[request.request_id] = request
            self.scheduler.submit(request)

    @rule(group=st.sampled_from(sorted(GROUPS)), other=st.sampled_from([0, 0, 0, 25, 70]))
    def group_fetches(self, group: int, other: int) -> None:
        self.fetch(group, other)

    @rule()
    def all_groups_fetch(self) -> None:
        for group in GROUPS:
            self.fetch(group)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), side=st.sampled_from(ReadSide), share=st.floats(0, 1))
    def some_is_read(self, data: st.DataObject, side: ReadSide, share: float) -> None:
        number = data.draw(st.sampled_from(sorted(self.running)))
        run = self.running[number]
        tokens = int(run.unread[side] * share)
        run.unread[side] -= tokens
        self.scheduler.read_progress(number, side, tokens)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), event=st.sampled_from(["prefilled", "decoding", "finished"]))
    def event(self, data: st.DataObject, event: str) -> None:
        self.tell(data.draw(st.sampled_from(sorted(self.running))), event)

    def tell(self, number: int, event: str) -> None:
        run = self.running[number]
        getattr(self.scheduler, event)(number)
        if event == "finished":
            del self.running[number]
        else:
            run.prefilled, run.unread = True, dict.fromkeys(ReadSide, 0)
            run.decoding = run.decoding or event == "decoding"

    @precondition(lambda self: self.past)
    @rule(data=st.data(), event=st.sampled_from(["prefilled", "decoding", "finished"]))
    def late_event(self, data: st.DataObject, event: str) -> None:
        number = data.draw(st.sampled_from(self.past))
        if number not in self.running:
            getattr(self.scheduler, event)(number)
            self.scheduler.read_progress(number, ReadSide.DECODE, 5)

    @precondition(lambda self: self.ids)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request_id = data.draw(st.integers(0, self.ids - 1))
        run = next((r for r in self.running.values() if r.placement.request.request_id == request_id), None)
        placement = self.scheduler.cancelled(request_id)
        assert placement == (run.placement if run else None)
        self.waiting.pop(request_id, None)
        if run:
            del self.running[run.placement.number]

    @precondition(lambda self: len(self.alive) > 3)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        engine = data.draw(st.sampled_from(sorted(self.alive)))
        void = {number: run for number, run in self.running.items() if run.on(engine)}
        redo = self.scheduler.engine_lost(engine)
        assert [r.placement for r in redo] == sorted(
            (run.placement for run in void.values()), key=lambda p: p.request.request_id
        )
        for each in redo:
            run = self.running.pop(each.placement.number)
            self.waiting[run.placement.request.request_id] = run.placement.request
            both = {run.placement.prefill_engine, run.placement.decode_engine}
            assert each.prefilled == run.prefilled
            assert each.survivor == (None if run.prefilled else (both - {engine}).pop())
        self.alive.discard(engine)

    @precondition(lambda self: len(self.alive) < len(NODES))
    @rule()
    def lost_engines_come_back(self) -> None:
        self.alive = set(NODES)

    @invariant()
    def nothing_is_lost_and_counts_agree(self) -> None:
        scheduler = self.scheduler
        scheduler.check_integrity()
        assert len(scheduler) == len(self.waiting) + len(self.running)
        assert scheduler.num_waiting == len(self.waiting)
        promised = dict.fromkeys(NODES, 0)
        for live in scheduler._live.values():
            if live.decode is not None:
                promised[live.decode.engine] += live.request.kv_tokens
        assert max(promised.values()) <= MEMORY

    @invariant()
    def nobody_holds_an_engine_for_which_an_older_one_waits(self) -> None:
        scheduler = self.scheduler
        unplaced = [live for live in scheduler._live.values() if live.placement is None]
        prefill = [live.request.request_id for live in unplaced if live.prefill is not None]
        assert max(prefill, default=-1) < min(scheduler._prefill_queue, default=self.ids)
        decode = [live for live in unplaced if live.decode is not None]
        assert max((live.request.request_id for live in decode), default=-1) < min(
            scheduler._decode_queue, default=self.ids
        )
        for group, queue in scheduler._private.items():
            held = [live.request.request_id for live in decode if live.decode.engine in GROUPS[group]]
            assert max(held, default=-1) < min(queue, default=self.ids)

    def teardown(self) -> None:
        """All that is left gets done, and nothing remains."""
        if not hasattr(self, "scheduler"):
            return
        self.alive = set(NODES)
        for _ in range(3 + len(self.scheduler)):
            for group in GROUPS:
                self.fetch(group)
            for number in list(self.running):
                self.tell(number, "finished")
        assert (len(self.scheduler), self.waiting) == (0, {})
        self.scheduler.check_integrity()
        for group in GROUPS:
            self.fetch(group)
        loads = self.scheduler.loads.now(sorted(NODES))
        assert [(load.seq, load.tok, load.read_q) for load in loads] == [(0, 0, 0)] * len(NODES)
        assert all(load.free_tokens == MEMORY for load in loads)


TestCluster = Cluster.TestCase
TestCluster.settings = settings(max_examples=200, stateful_step_count=40, derandomize=True, deadline=None)
