"""The path scheduler: single transitions with known results."""

from __future__ import annotations

import dataclasses

import pytest

from jaxdual.kv.slots import IntegrityError
from jaxdual.scheduling.decode_placement import DecodePlacement
from jaxdual.scheduling.loads import EngineReport, PathRequest, Role
from jaxdual.scheduling.path_modes import MODES, PathMode
from jaxdual.scheduling.paths import PathScheduler, Placement
from jaxdual.scheduling.prefill_placement import PrefillPlacement
from jaxdual.scheduling.read_side import ReadPlan, ReadPolicy, ReadSide

# Prefill group 0 has engine 0 on node 0; decode group 1 has engine 10 on node 10.
IDLE_PREFILL = EngineReport(engine=0, node=0, group=0, seq=0, tok=0, read_q=0)
IDLE_DECODE = EngineReport(engine=10, node=10, group=1, seq=0, tok=0, read_q=0, free_tokens=1000)


def scheduler_of(mode: PathMode = MODES["full"], beta: int = 10**6) -> PathScheduler:
    return PathScheduler(mode, PrefillPlacement(alpha=1000, beta=beta), DecodePlacement())


def request(number: int, prompt: int = 100, hit: int = 64, output: int = 10, arrival: float = 0.0) -> PathRequest:
    return PathRequest(number, prompt, hit, output, arrival)


def place(scheduler: PathScheduler, *requests: PathRequest, now: float = 0.0) -> list[Placement]:
    """Places requests on engine 0 and engine 10."""
    for each in requests:
        scheduler.submit(each)
    assert scheduler.fetch_prefill(0, [IDLE_PREFILL], now) == []
    placed = scheduler.fetch_decode(1, [IDLE_DECODE], now)
    scheduler.check_integrity()
    return placed


def load(scheduler: PathScheduler, engine: int) -> tuple[int, int, int, int]:
    report = scheduler.loads.now([engine])[0]
    return report.seq, report.tok, report.read_q, report.free_tokens


# The join.


def test_a_request_is_placed_by_the_fetch_that_brings_its_second_engine() -> None:
    scheduler = scheduler_of()
    scheduler.submit(request(7, arrival=2.0))
    assert scheduler.fetch_decode(1, [IDLE_DECODE], 3.0) == []
    (placement,) = scheduler.fetch_prefill(0, [IDLE_PREFILL], 5.5)
    assert placement == Placement(0, request(7, arrival=2.0), 0, 10, ReadPlan(0, 64), waited=3.5)
    assert scheduler.fetch_prefill(0, [IDLE_PREFILL], 6.0) == []
    assert scheduler.fetch_decode(1, [IDLE_DECODE], 6.0) == []
    assert (len(scheduler), scheduler.num_waiting) == (1, 0)


def test_a_burst_does_not_herd_to_one_side() -> None:
    placed = place(scheduler_of(), *(request(i, hit=50) for i in range(4)))
    assert [p.read for p in placed] == [ReadPlan(0, 50), ReadPlan(50, 0), ReadPlan(0, 50), ReadPlan(50, 0)]


def test_the_side_is_chosen_with_the_queues_at_the_join() -> None:
    scheduler = scheduler_of()
    scheduler.submit(request(0))
    scheduler.fetch_prefill(0, [IDLE_PREFILL], 0.0)
    (placement,) = scheduler.fetch_decode(1, [dataclasses.replace(IDLE_DECODE, read_q=1)], 0.0)
    assert placement.read == ReadPlan(64, 0)


@pytest.mark.parametrize(
    ("mode", "reads"),
    [
        ("basic", [(128, 0), (128, 0)]),
        ("layerwise", [(128, 0), (128, 0)]),
        ("roundrobin", [(128, 0), (0, 128)]),
        ("full", [(0, 128), (128, 0)]),
        ("split", [(64, 64), (64, 64)]),
        ("oracle", [(0, 0), (0, 0)]),
    ],
)
def test_reads_of_each_mode(mode: str, reads: list[tuple[int, int]]) -> None:
    placed = place(scheduler_of(MODES[mode]), *(request(i, prompt=200, hit=128) for i in range(2)))
    assert [p.read for p in placed] == [ReadPlan(*read) for read in reads]


def test_without_load_engines_take_turns_over_all_groups() -> None:
    scheduler = scheduler_of(MODES["basic"], beta=1)
    other = dataclasses.replace(IDLE_PREFILL, engine=1, node=1, group=5)
    scheduler.report(Role.PREFILL, 5, [other])
    placed = place(scheduler, *(request(i) for i in range(4)))
    assert [p.prefill_engine for p in placed] == [0, 1, 0, 1]


def test_a_request_is_submitted_once() -> None:
    scheduler = scheduler_of()
    scheduler.submit(request(1))
    with pytest.raises(ValueError, match="submitted already"):
        scheduler.submit(request(1))
    assert scheduler.cancelled(1) is None
    scheduler.submit(request(1))


# Counts.


def test_what_a_request_counts_for_follows_its_events() -> None:
    scheduler = scheduler_of(dataclasses.replace(MODES["full"], read=ReadPolicy.PREFILL_ONLY))
    (placement,) = place(scheduler, request(0, prompt=100, hit=64, output=10))
    assert load(scheduler, 0) == (1, 100, 64, 0)
    assert load(scheduler, 10) == (1, 100, 0, 890)
    scheduler.read_progress(placement.number, ReadSide.PREFILL, 40)
    scheduler.read_progress(placement.number, ReadSide.DECODE, 40)  # reads nothing there
    assert load(scheduler, 0) == (1, 100, 24, 0)
    scheduler.prefilled(placement.number)
    assert load(scheduler, 0) == (0, 0, 0, 0)
    assert load(scheduler, 10) == (1, 100, 0, 890)
    scheduler.decoding(placement.number)
    assert load(scheduler, 10) == (1, 100, 0, 890)
    scheduler.report(Role.DECODE, 1, [dataclasses.replace(IDLE_DECODE, seq=1, tok=100, free_tokens=900)])
    assert load(scheduler, 10) == (1, 100, 0, 890)  # ten tokens are still to come
    scheduler.check_integrity()
    scheduler.finished(placement.number)
    scheduler.report(Role.DECODE, 1, [IDLE_DECODE])
    assert load(scheduler, 10) == (0, 0, 0, 1000)
    scheduler.check_integrity()


def test_events_of_two_engines_may_come_in_either_order_and_twice() -> None:
    scheduler = scheduler_of()
    (placement,) = place(scheduler, request(0))
    for _ in range(2):
        scheduler.decoding(placement.number)
        scheduler.prefilled(placement.number)
        scheduler.read_progress(placement.number, ReadSide.DECODE, 64)
        scheduler.check_integrity()
    assert load(scheduler, 0) == (0, 0, 0, 0)
    for _ in range(2):
        scheduler.finished(placement.number)
    scheduler.prefilled(placement.number)
    scheduler.check_integrity()
    assert len(scheduler) == 0


def test_negative_progress_is_refused() -> None:
    with pytest.raises(ValueError, match="tokens"):
        scheduler_of().read_progress(0, ReadSide.PREFILL, -1)


def test_an_engine_is_as_loaded_as_the_larger_of_report_and_count() -> None:
    scheduler = scheduler_of(beta=150)
    # Work of somebody else.
    scheduler.report(Role.PREFILL, 0, [dataclasses.replace(IDLE_PREFILL, seq=2, tok=90, read_q=30)])
    assert load(scheduler, 0) == (2, 90, 30, 0)
    scheduler.submit(request(0, prompt=70))
    scheduler.submit(request(1, prompt=1, hit=0))
    scheduler.fetch_prefill(0, [dataclasses.replace(IDLE_PREFILL, seq=2, tok=90, read_q=30)], 0.0)
    assert load(scheduler, 0) == (3, 160, 30, 0)  # above beta: the second one waits
    # A report from before the assignment does not undo it.
    scheduler.report(Role.PREFILL, 0, [IDLE_PREFILL])
    assert load(scheduler, 0) == (1, 70, 0, 0)
    scheduler.check_integrity()


def test_requests_in_private_queues_count_for_their_group() -> None:
    scheduler = scheduler_of()
    second = dataclasses.replace(IDLE_DECODE, engine=11, node=11, group=2)
    full = [dataclasses.replace(IDLE_DECODE, free_tokens=0), dataclasses.replace(second, free_tokens=0)]
    scheduler.report(Role.DECODE, 2, full[1:])
    for i in range(4):
        scheduler.submit(request(i, prompt=100))
        scheduler.fetch_decode(1, full[:1], 0.0)
    scheduler.fetch_prefill(0, [IDLE_PREFILL], 0.0)
    assert [p.request.request_id for p in scheduler.fetch_decode(1, [IDLE_DECODE], 0.0)] == [0, 2]
    assert [p.request.request_id for p in scheduler.fetch_decode(2, [second], 0.0)] == [1, 3]


@pytest.mark.parametrize(
    "wrong",
    [
        dataclasses.replace(IDLE_DECODE, node=3),
        dataclasses.replace(IDLE_DECODE, group=2),
        dataclasses.replace(IDLE_DECODE, engine=0),
    ],
)
def test_engines_stay_where_they_are(wrong: EngineReport) -> None:
    scheduler = scheduler_of()
    scheduler.report(Role.PREFILL, 0, [IDLE_PREFILL])
    scheduler.report(Role.DECODE, 1, [IDLE_DECODE])
    with pytest.raises(ValueError, match="engine"):
        scheduler.fetch_decode(wrong.group, [wrong], 0.0)
    with pytest.raises(ValueError, match="report"):
        scheduler.fetch_decode(1, [dataclasses.replace(IDLE_DECODE, group=2)], 0.0)
    with pytest.raises(ValueError, match="fetches as"):
        scheduler.fetch_decode(0, [dataclasses.replace(IDLE_DECODE, engine=12, group=0)], 0.0)
    with pytest.raises(ValueError, match="no engine"):
        scheduler.fetch_decode(1, [], 0.0)
    with pytest.raises(ValueError, match="twice"):
        scheduler.fetch_decode(1, [IDLE_DECODE, IDLE_DECODE], 0.0)
    scheduler.check_integrity()


# Cancellation and loss.


def test_cancellation_works_wherever_the_request_is() -> None:
    scheduler = scheduler_of()
    full = dataclasses.replace(IDLE_DECODE, free_tokens=0)
    scheduler.submit(request(0))
    assert scheduler.cancelled(0) is None  # in both queues
    scheduler.submit(request(1))
    scheduler.fetch_decode(1, [full], 0.0)
    assert scheduler.cancelled(1) is None  # in a private queue
    scheduler.submit(request(2))
    scheduler.fetch_prefill(0, [IDLE_PREFILL], 0.0)
    assert scheduler.cancelled(2) is None  # with a prefill engine
    scheduler.submit(request(3))
    scheduler.fetch_decode(1, [IDLE_DECODE], 0.0)
    assert scheduler.cancelled(3) is None  # with a decode engine
    (placement,) = place(scheduler, request(4))
    assert scheduler.cancelled(4) == placement
    assert scheduler.cancelled(4) is None
    scheduler.check_integrity()
    assert (len(scheduler), load(scheduler, 0), load(scheduler, 10)) == (0, (0, 0, 0, 0), (0, 0, 0, 1000))


def test_loss_of_a_prefill_engine_voids_what_it_had_not_prefilled() -> None:
    scheduler = scheduler_of()
    done, under_way = place(scheduler, request(0), request(1))
    scheduler.prefilled(done.number)
    (redo,) = scheduler.engine_lost(0)
    assert (redo.placement, redo.survivor, redo.prefilled) == (under_way, 10, False)
    scheduler.check_integrity()
    assert load(scheduler, 10)[:2] == (1, 100)
    assert scheduler.engine_lost(0) == []
    scheduler.finished(under_way.number)  # the survivor's last word on a placement that is void
    assert scheduler.num_waiting == 1
    (again,) = place(scheduler)
    assert (again.request, again.number) == (under_way.request, 2)


def test_loss_of_a_decode_engine_voids_all_of_its_requests() -> None:
    scheduler = scheduler_of()
    decoding, under_way = place(scheduler, request(0), request(1))
    scheduler.decoding(decoding.number)
    first, second = scheduler.engine_lost(10)
    assert (first.placement, first.survivor, first.prefilled) == (decoding, None, True)
    assert (second.placement, second.survivor, second.prefilled) == (under_way, 0, False)
    assert load(scheduler, 0) == (0, 0, 0, 0)
    scheduler.check_integrity()
    assert [p.request.request_id for p in place(scheduler, request(2))] == [0, 1, 2]


def test_requests_of_a_lost_group_go_to_another_one_in_their_order() -> None:
    scheduler = scheduler_of()
    for i in range(3):
        scheduler.submit(request(i))
    scheduler.fetch_decode(1, [dataclasses.replace(IDLE_DECODE, free_tokens=150)], 0.0)
    assert scheduler.engine_lost(10) == []  # nobody else knew of the one that it held
    scheduler.check_integrity()
    scheduler.submit(request(3))
    scheduler.fetch_prefill(0, [IDLE_PREFILL], 0.0)
    other = dataclasses.replace(IDLE_DECODE, engine=11, node=11, group=2)
    assert [p.request.request_id for p in scheduler.fetch_decode(2, [other], 0.0)] == [0, 1, 2, 3]


def test_two_requests_do_not_wait_for_each_other_s_engine_after_a_loss() -> None:
    """The older one has lost its prefill engine and holds all decode memory, the younger one fills the other."""
    scheduler = scheduler_of(beta=50)
    other = dataclasses.replace(IDLE_PREFILL, engine=1, node=1)
    small = dataclasses.replace(IDLE_DECODE, free_tokens=110)
    scheduler.submit(request(0))
    scheduler.submit(request(1))
    scheduler.fetch_prefill(0, [IDLE_PREFILL, other], 0.0)
    (first,) = scheduler.fetch_decode(1, [small], 0.0)
    assert first.request.request_id == 0
    scheduler.engine_lost(0)
    placed = scheduler.fetch_prefill(0, [other], 0.0) + scheduler.fetch_decode(1, [small], 0.0)
    assert [p.request.request_id for p in placed] == [0]


def test_a_lost_engine_may_come_back() -> None:
    scheduler = scheduler_of()
    place(scheduler, request(0))
    for engine in (0, 10):
        scheduler.engine_lost(engine)
    scheduler.check_integrity()
    assert len(place(scheduler)) == 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.loads.add_unread(0, 1), "to read"),
        (lambda s: s._prefill_queue.update({0: request(0)}), "one place"),
        (lambda s: s._decode_queue.update({9: request(9)}), "is over"),
        (lambda s: s._placed.clear(), "placements"),
        (lambda s: s._private_tok.update({1: 5}), "queue of group"),
        (lambda s: setattr(s._live[0], "decode", None), "one place"),
        (lambda s: setattr(s._live[0], "placement", None), "both engines"),
        (lambda s: setattr(s.loads._engines[10], "promised", 0), "engine 10"),
        (lambda s: setattr(s.loads._groups[1], "tok", 0), "group 1"),
        (lambda s: s._private.update({2: {}}) or s._private_tok.update({2: 0}), "private queues"),
    ],
)
def test_integrity_check_finds_damage(damage: object, message: str) -> None:
    scheduler = scheduler_of()
    place(scheduler, request(0))
    assert callable(damage)
    damage(scheduler)
    with pytest.raises(IntegrityError, match=message):
        scheduler.check_integrity()
