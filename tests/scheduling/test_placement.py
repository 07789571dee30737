"""Choice of engines and read side: single decisions at their limits, and all of them against the paper's loops."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdual.scheduling.decode_placement import DecodePlacement
from jaxdual.scheduling.loads import EngineReport, PathRequest
from jaxdual.scheduling.path_modes import MODES
from jaxdual.scheduling.paths import PathScheduler
from jaxdual.scheduling.prefill_placement import PrefillPlacement
from jaxdual.scheduling.read_side import ReadChooser, ReadPlan, ReadPolicy, split_read
from jaxdual.scheduling.round_robin import RoundRobin


def queue_of(*prompts: int, output: int = 0) -> list[PathRequest]:
    return [PathRequest(i, prompt, 0, output) for i, prompt in enumerate(prompts)]


def prefill_engine(engine: int, tok: int, read_q: int = 0) -> EngineReport:
    return EngineReport(engine, engine, 0, 1, tok, read_q)


def decode_engine(engine: int, seq: int, tok: int, free: int = 10**6) -> EngineReport:
    return EngineReport(engine, engine, 0, seq, tok, 0, free)


def chosen(assigned: Sequence[tuple[PathRequest, int]]) -> list[int]:
    assert [request.request_id for request, _ in assigned] == list(range(len(assigned))), "not a prefix of the queue"
    return [engine for _, engine in assigned]


# Prefill engines.

PREFILL = PrefillPlacement(alpha=100, beta=1000)


def test_an_engine_at_beta_is_not_overloaded_and_one_above_is() -> None:
    assert chosen(PREFILL.place(queue_of(5), [prefill_engine(0, 1000)])) == [0]
    assert chosen(PREFILL.place(queue_of(5), [prefill_engine(0, 1001)])) == []


def test_a_queue_at_alpha_is_short_and_one_above_is_long() -> None:
    busier = prefill_engine(1, 900, read_q=100)
    assert chosen(PREFILL.place(queue_of(5), [prefill_engine(0, 0, read_q=100), busier])) == [0]
    assert chosen(PREFILL.place(queue_of(5), [prefill_engine(0, 0, read_q=101), busier])) == [1]


def test_long_queues_serve_when_there_is_no_short_one() -> None:
    engines = [prefill_engine(0, 30, read_q=500), prefill_engine(1, 20, read_q=900), prefill_engine(2, 1001)]
    assert chosen(PREFILL.place(queue_of(5), engines)) == [1]


def test_overloaded_engines_get_nothing_even_when_all_are() -> None:
    assert PREFILL.place(queue_of(5), [prefill_engine(0, 2000), prefill_engine(1, 1500)]) == []
    assert PREFILL.place(queue_of(5), []) == []


def test_equal_engines_are_taken_by_number_whatever_the_order_of_the_report() -> None:
    assert chosen(PREFILL.place(queue_of(5, 5, 5), [prefill_engine(e, 0) for e in (2, 0, 1)])) == [0, 1, 2]


def test_an_assignment_counts_for_the_next_and_may_overload_its_engine() -> None:
    engines = [prefill_engine(0, 0), prefill_engine(1, 50, read_q=101)]
    # Engine 0 goes to 600, then to 1200; only then engine 1 with its long queue, until it is above 1000 as well.
    assert chosen(PREFILL.place(queue_of(600, 600, 900, 100, 1), engines)) == [0, 0, 1, 1]


def test_classified_once_an_engine_takes_all_of_a_fetch() -> None:
    once = PrefillPlacement(alpha=100, beta=1000, reclassify=False)
    engines = [prefill_engine(0, 0), prefill_engine(1, 50, read_q=101)]
    assert chosen(once.place(queue_of(600, 600, 900, 100, 1), engines)) == [0] * 5


def test_limits_come_from_rates() -> None:
    assert PrefillPlacement.from_rates(1000.0, 70.0) == PrefillPlacement(alpha=3000, beta=350)
    with pytest.raises(ValueError, match="alpha"):
        PrefillPlacement(-1, 5)


def algorithm_1(
    queue: Sequence[int], engines: dict[int, tuple[float, float]], alpha: float, beta: float, once: bool
) -> list[int]:
    """The pseudo-code, line by line: engines as `(tok, read_q)`."""
    tok = {e: t for e, (t, _) in engines.items()}
    read_q = {e: q for e, (_, q) in engines.items()}

    def classes() -> tuple[list[int], list[int]]:
        c1 = {e for e in tok if tok[e] > beta}
        c2 = [e for e in sorted(tok) if e not in c1 and read_q[e] <= alpha]
        c3 = [e for e in sorted(tok) if e not in c1 and e not in c2]
        return c2, c3

    c2, c3 = classes()
    assigned = []
    for length in queue:
        if not once:
            c2, c3 = classes()
        if c2:
            best = min(c2, key=lambda e: tok[e])
        elif c3:
            best = min(c3, key=lambda e: tok[e])
        else:
            break
        assigned.append(best)
        tok[best] += length
    return assigned


@settings(max_examples=400, derandomize=True, deadline=None)
@given(
    prompts=st.lists(st.integers(1, 12), max_size=20),
    engines=st.dictionaries(st.integers(0, 9), st.tuples(st.integers(0, 25), st.integers(0, 4)), max_size=6),
    alpha=st.integers(0, 4),
    beta=st.integers(0, 25),
    once=st.booleans(),
)
def test_prefill_placement_is_algorithm_1(
    prompts: list[int], engines: dict[int, tuple[int, int]], alpha: int, beta: int, once: bool
) -> None:
    reports = [prefill_engine(e, tok, read_q) for e, (tok, read_q) in engines.items()]
    got = PrefillPlacement(alpha, beta, reclassify=not once).place(queue_of(*prompts), reports)
    assert chosen(got) == algorithm_1(prompts, dict(engines), alpha, beta, once)


# Decode engines.

DECODE = DecodePlacement()


def test_the_whole_queue_drains_to_the_emptiest_group_each_time() -> None:
    drained = DECODE.drain(queue_of(30, 10, 10, 10), {7: 100, 3: 100, 5: 125})
    assert [group for _, group in drained] == [3, 7, 7, 7]
    assert [request.request_id for request, _ in drained] == [0, 1, 2, 3]


def test_an_engine_at_z_is_low_and_one_above_is_high() -> None:
    # Three engines with 280 tokens and 20 to come: Z = 1.05 * 300 / 3 = 105.
    others = [decode_engine(1, seq=9, tok=80), decode_engine(2, seq=0, tok=115)]
    assert chosen(DECODE.place(queue_of(20), [decode_engine(0, seq=1, tok=85), *others])) == [0]  # 105: fewer requests
    others = [decode_engine(1, seq=9, tok=80), decode_engine(2, seq=0, tok=114)]
    assert chosen(DECODE.place(queue_of(20), [decode_engine(0, seq=1, tok=86), *others])) == [1]  # 106


def test_among_low_engines_requests_count_and_then_the_number() -> None:
    engines = [decode_engine(2, seq=3, tok=0), decode_engine(1, seq=3, tok=9), decode_engine(0, seq=4, tok=0)]
    assert chosen(DecodePlacement(balance_percent=1000).place(queue_of(1), engines)) == [1]


def test_high_engines_are_chosen_by_tokens() -> None:
    engines = [decode_engine(0, seq=0, tok=60), decode_engine(1, seq=5, tok=50)]
    assert chosen(DECODE.place(queue_of(1000), engines)) == [1]


def test_the_first_that_fits_nowhere_ends_the_fetch() -> None:
    engines = [decode_engine(0, 0, 0, free=30), decode_engine(1, 0, 0, free=20)]
    assert chosen(DECODE.place(queue_of(25, 21, 1), engines)) == [0]
    assert chosen(DECODE.place(queue_of(20, 30, 1), engines)) == [0]  # the memory of both is enough, but in two pieces
    assert DECODE.place(queue_of(20, output=11), engines[:1]) == []  # the output needs memory too


def test_what_memory_can_not_hold_is_no_part_of_the_mean() -> None:
    # Memory for 100 of the 10 + 100 tokens: Z = 1.05 * (40 + 10) / 2 = 26.25, so engine 0 is low at 20 + 5 only.
    engines = [decode_engine(0, seq=0, tok=20, free=50), decode_engine(1, seq=9, tok=10, free=50)]
    assert chosen(DECODE.place(queue_of(10, 100), engines)) == [1]
    # If it counted, Z would be 1.05 * 140 / 2 = 73.5, both low, and engine 0 has fewer requests.
    assert chosen(DECODE.place(queue_of(10, 90), engines)) == [0]


def test_a_limit_below_the_mean_is_refused() -> None:
    with pytest.raises(ValueError, match="balance_percent"):
        DecodePlacement(99)


def phase_1(queue: Sequence[int], totals: dict[int, float]) -> list[int]:
    assigned = []
    for length in queue:
        best = None
        for group in sorted(totals):
            if best is None or totals[group] < totals[best]:
                best = group
        assert best is not None
        totals[best] += length
        assigned.append(best)
    return assigned


def phase_2(queue: Sequence[tuple[int, int]], engines: dict[int, tuple[int, int, int]], percent: int) -> list[int]:
    """The pseudo-code, line by line: requests as `(len, need)`, engines as `(seq, tok, free)`."""
    seq, tok, free = ({e: state[i] for e, state in engines.items()} for i in range(3))
    total_free = sum(free.values())
    fitting = 0
    while fitting < len(queue) and sum(need for _, need in queue[: fitting + 1]) <= total_free:
        fitting += 1
    lengths = sum(length for length, _ in queue[:fitting])
    z = Fraction(percent, 100) * (lengths + sum(tok.values())) / len(engines)
    assigned = []
    for length, need in queue:
        fit = [e for e in engines if free[e] >= need]
        if not fit:
            break
        low = [e for e in fit if tok[e] + length <= z]
        best = min((seq[e], e) for e in low)[1] if low else min((tok[e], e) for e in fit)[1]
        assigned.append(best)
        tok[best] += length
        seq[best] += 1
        free[best] -= need
    return assigned


@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    prompts=st.lists(st.integers(1, 9), max_size=20),
    totals=st.dictionaries(st.integers(0, 9), st.integers(0, 20), min_size=1, max_size=5),
)
def test_decode_drain_is_phase_1(prompts: list[int], totals: dict[int, int]) -> None:
    drained = DECODE.drain(queue_of(*prompts), totals)
    assert chosen(drained) == phase_1(prompts, dict(totals))


@settings(max_examples=600, derandomize=True, deadline=None)
@given(
    queue=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 6)), max_size=14),
    engines=st.dictionaries(
        st.integers(0, 9),
        st.tuples(st.integers(0, 5), st.integers(0, 40), st.integers(0, 60)),
        min_size=1,
        max_size=5,
    ),
    percent=st.sampled_from([100, 105, 150]),
)
def test_decode_placement_is_phase_2(
    queue: list[tuple[int, int]], engines: dict[int, tuple[int, int, int]], percent: int
) -> None:
    requests = [PathRequest(i, prompt, 0, output) for i, (prompt, output) in enumerate(queue)]
    reports = [decode_engine(e, *state) for e, state in engines.items()]
    got = DecodePlacement(percent).place(requests, reports)
    expected = phase_2([(prompt, prompt + output) for prompt, output in queue], dict(engines), percent)
    assert chosen(got) == expected


# Without load.


def test_round_robin_goes_on_where_it_stopped() -> None:
    ring, engines = RoundRobin(), [1, 4, 6]
    assert chosen(ring.place(queue_of(1, 1, 1, 1), engines)) == [1, 4, 6, 1]
    assert chosen(ring.place(queue_of(1), engines)) == [4]
    assert chosen(ring.place(queue_of(1, 1), [1])) == [1, 1]
    assert ring.place(queue_of(1), []) == []


def test_round_robin_passes_over_full_engines_and_stops_when_all_are() -> None:
    free = {0: 5, 1: 50, 2: 20}
    assert chosen(RoundRobin().place(queue_of(10, 10, 10, 10, 40), [0, 1, 2], free.__getitem__)) == [1, 2, 1, 2]


# Read side.


@pytest.mark.parametrize(("prefill", "decode", "on_prefill"), [(4, 5, True), (5, 5, False), (6, 5, False)])
def test_the_shorter_queue_reads_and_a_tie_goes_to_the_decode_side(prefill: int, decode: int, on_prefill: bool) -> None:
    plan = ReadChooser(ReadPolicy.SHORTER_QUEUE).choose(100, prefill, decode)
    assert plan == (ReadPlan(100, 0) if on_prefill else ReadPlan(0, 100))


def test_fixed_sides_and_turns_look_at_no_queue() -> None:
    def plans(policy: ReadPolicy) -> list[tuple[int, int]]:
        chooser = ReadChooser(policy)
        found = [chooser.choose(hit, 9, 0) for hit in (8, 0, 8, 8)]
        return [(plan.prefill_tokens, plan.decode_tokens) for plan in found]

    assert plans(ReadPolicy.PREFILL_ONLY) == [(8, 0), (0, 0), (8, 0), (8, 0)]
    assert plans(ReadPolicy.DECODE_ONLY) == [(0, 8), (0, 0), (0, 8), (0, 8)]
    assert plans(ReadPolicy.ROUND_ROBIN) == [(8, 0), (0, 0), (0, 8), (8, 0)]
    assert plans(ReadPolicy.NONE) == [(0, 0)] * 4


@pytest.mark.parametrize(
    ("hit", "prefill", "decode", "expected"),
    [
        (0, 5, 9, (0, 0)),
        (64, 0, 1, (64, 0)),  # one block goes whole
        (64, 7, 7, (0, 64)),
        (640, 0, 0, (320, 320)),
        (640, 128, 0, (256, 384)),
        (640, 0, 640, (640, 0)),
        (640, 10_000, 0, (0, 640)),
        (192, 0, 0, (64, 128)),  # three blocks: the odd one on the decode side
        (100, 0, 0, (64, 36)),  # a part of a block is the last
    ],
)
def test_split_ends_both_queues_together(hit: int, prefill: int, decode: int, expected: tuple[int, int]) -> None:
    assert ReadChooser(ReadPolicy.SPLIT, 64).choose(hit, prefill, decode) == ReadPlan(*expected)


@settings(max_examples=500, derandomize=True, deadline=None)
@given(hit=st.integers(1, 70), prefill=st.integers(0, 120), decode=st.integers(0, 120), block=st.integers(1, 20))
def test_no_other_split_is_complete_earlier(hit: int, prefill: int, decode: int, block: int) -> None:
    def complete(first: int) -> int:
        return max((prefill + first) * (first > 0), (decode + hit - first) * (first < hit))

    plan = split_read(hit, prefill, decode, block)
    splits = [*range(0, hit, block), hit]
    assert plan.prefill_tokens in splits
    assert plan.prefill_tokens + plan.decode_tokens == hit
    assert complete(plan.prefill_tokens) == min(map(complete, splits))


def test_a_block_has_tokens() -> None:
    with pytest.raises(ValueError, match="block_tokens"):
        ReadChooser(ReadPolicy.SPLIT, 0)


@pytest.mark.parametrize(("prompt", "hit", "output"), [(0, 0, 1), (5, 6, 1), (5, -1, 1), (5, 5, -1)])
def test_requests_out_of_range_are_refused(prompt: int, hit: int, output: int) -> None:
    with pytest.raises(ValueError, match="tokens"):
        PathRequest(0, prompt, hit, output)


def test_the_modes_are_the_steps_of_the_ablation() -> None:
    steps = [
        (name, mode.layerwise, mode.read, mode.by_load, mode.quota, mode.transfers) for name, mode in MODES.items()
    ]
    assert steps == [
        ("basic", False, ReadPolicy.PREFILL_ONLY, False, False, True),
        ("layerwise", True, ReadPolicy.PREFILL_ONLY, False, False, True),
        ("roundrobin", True, ReadPolicy.ROUND_ROBIN, False, False, True),
        ("full", True, ReadPolicy.SHORTER_QUEUE, True, True, True),
        ("split", True, ReadPolicy.SPLIT, True, True, True),
        ("oracle", True, ReadPolicy.NONE, True, True, False),
    ]


def test_engines_and_sides_in_turn_use_all_storage_cards() -> None:
    scheduler = PathScheduler(MODES["roundrobin"], PrefillPlacement(0, 0), block_tokens=8)
    for number in range(8):
        scheduler.submit(PathRequest(number, 9, 8, 1))
    groups = [[EngineReport(e, e, g, 0, 0, 0, 10**6) for e in (2 * g, 2 * g + 1)] for g in range(2)]
    placed = scheduler.fetch_prefill(0, groups[0], 0.0) + scheduler.fetch_decode(1, groups[1], 0.0)
    readers = [one.prefill_engine if one.read.prefill_tokens else one.decode_engine for one in placed]
    assert sorted(readers) == [0, 0, 1, 1, 2, 2, 3, 3]
