"""The simulation of scheduling for mixtures of experts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench.moe import routing
from bench.moe.arms import ARMS, SESSION_ARMS, Arm
from bench.moe.points import POINTS
from bench.moe.routing import StepImbalance, draw_trace, load_sums
from bench.moe.simulation import PAGE, Cluster, simulate
from bench.moe.workload import SHAPES, Arrival, Lengths, arrivals, read_lengths
from jaxdual.scheduling.experts import Placement

TRACE = draw_trace(64, 0, layers=3, experts=8, top_k=2)
FAST = Cluster(kv_tokens=4000, max_num_seqs=16, max_num_batched_tokens=256)


@pytest.mark.parametrize(
    ("shape", "mean"), [("random", 610), ("central", 1493), ("descending", 1028), ("two_end", 1496), ("average", 1467)]
)
def test_shapes_have_their_mean_prompts(shape: str, mean: float) -> None:
    requests = [arrivals(shape, 1.0, 1000, seed) for seed in range(3)]
    assert np.mean([one.prompt for of_seed in requests for one in of_seed]) == pytest.approx(mean, rel=0.08)


def test_requests_are_the_same_for_every_arm_and_rate() -> None:
    slow, fast = arrivals("average", 1.0, 50, 4), arrivals("average", 2.0, 50, 4)
    assert [(one.prompt, one.output) for one in slow] == [(one.prompt, one.output) for one in fast]
    assert [one.time / 2 for one in slow] == pytest.approx([one.time for one in fast])
    with pytest.raises(ValueError, match="'flat' must be one of random"):
        arrivals("flat", 1.0, 5, 0)


@pytest.mark.parametrize("variation", [1.0, 1.4, 2.0])
def test_gaps_vary_as_asked_around_the_same_rate(variation: float) -> None:
    times = [one.time for seed in range(4) for one in arrivals("random", 2.0, 4000, seed, variation=variation)]
    gaps = np.diff(np.array(times).reshape(4, -1), axis=1)
    assert gaps.mean() == pytest.approx(0.5, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.05)


def test_lengths_come_from_a_trace(tmp_path: Path) -> None:
    file = tmp_path / "burst.csv"
    rows = [f"{row},gpt,{row + 10},{row % 7},{row},log" for row in range(70)]  # one in seven failed: no tokens
    file.write_text("Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n" + "\n".join(rows))
    lengths = read_lengths(file)
    assert len(lengths.prompts) == 60
    assert lengths.outputs.min() == 1
    pairs = set(zip(lengths.prompts.tolist(), lengths.outputs.tolist(), strict=True))
    for shape in SHAPES:
        drawn = arrivals(shape, 1.0, 50, 0, lengths=lengths)
        assert {(one.prompt, one.output) for one in drawn} <= pairs
    with pytest.raises(ValueError, match="a trace of 60 requests is too short for 61"):
        arrivals("random", 1.0, 61, 0, lengths=lengths)


def test_shapes_of_a_trace_have_their_density() -> None:
    prompts = np.random.default_rng(0).integers(1, 3001, 20_000)
    drawn = arrivals("central", 1.0, 4000, 0, lengths=Lengths(prompts, prompts))
    found = np.array([one.prompt for one in drawn]) / 3000
    assert (found.mean(), found.std()) == (pytest.approx(0.5, abs=0.02), pytest.approx(0.15, abs=0.02))


def test_tilted_routers_load_one_half_of_the_experts_more() -> None:
    even, tilted = (
        load_sums(draw_trace(512, 0, tilt=tilt), "linear", 2, draw_trace(64, 1))[-1] for tilt in (0.0, 0.65)
    )
    assert (even.max(axis=1) / even.mean(axis=1)).mean() < 1.1
    assert 1.15 < (tilted.max(axis=1) / tilted.mean(axis=1)).mean() < 1.25


@pytest.mark.parametrize("redundant", [0, 2])
def test_imbalance_of_a_step_is_that_of_its_tokens(redundant: int, monkeypatch: pytest.MonkeyPatch) -> None:
    row = np.array([0, 1, 2, 3, 4, 5, 6, 7, *([0, 3] if redundant else [])], np.int32)
    placement = Placement(np.tile(row, (3, 1)), 2, 8)
    monkeypatch.setattr(routing, "place", lambda *_: placement)
    imbalance, at = StepImbalance(load_sums.__wrapped__(TRACE, "eplb", 2, TRACE)), 0
    for tokens in (3, 50, 40, 64, 7, 130):
        loads = np.zeros((3, 2))
        for token in range(at, at + tokens):
            for layer in range(3):
                for expert in TRACE.choices[layer, token % 64]:
                    slots = np.flatnonzero(row == expert)
                    for slot in slots:
                        loads[layer, slot * 2 // len(row)] += 1 / len(slots)
        assert imbalance.next(tokens) == pytest.approx((loads.max(axis=1) / loads.mean(axis=1)).mean())
        at += tokens
    assert imbalance.next(0) == 1.0


def test_one_request_takes_what_its_steps_take() -> None:
    cluster = Cluster(engines=1, fixed_seconds=0.5, token_seconds=0.001, context_seconds=0.0, expert_seconds=0.0)
    outcome = simulate(cluster, Arm("alone"), [Arrival(2.0, 100, 5)], TRACE, TRACE)
    assert outcome.ttft == pytest.approx([0.6])
    assert outcome.tpot == pytest.approx([0.501])
    assert (outcome.tokens, outcome.steps) == (5, 5)
    assert outcome.seconds == pytest.approx(2.0 + 0.6 + 4 * 0.501)


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_every_arm_serves_every_request(arm: Arm) -> None:
    requests = [Arrival(one.time, min(one.prompt, 600), min(one.output, 40)) for one in arrivals("two_end", 9.0, 60, 1)]
    outcome = simulate(FAST, arm, requests, TRACE, TRACE)
    assert len(outcome.ttft) == 60
    assert outcome.tokens == sum(one.output for one in requests)
    assert sum(outcome.branches.values()) == 60
    assert outcome.seconds > requests[-1].time
    assert simulate(FAST, arm, requests, TRACE, TRACE) == outcome


def test_balanced_experts_make_steps_shorter() -> None:
    requests = arrivals("average", 1.0, 40, 2)
    trace = draw_trace(512, 0)
    times = {
        arm.name: simulate(Cluster(expert_seconds=3e-4), arm, requests, trace, trace)
        for arm in ARMS
        if arm.name in ("rr", "EPLB")
    }
    assert times["EPLB"].imbalance < times["rr"].imbalance
    assert np.mean(times["EPLB"].tpot) < np.mean(times["rr"].tpot)


def test_requests_out_of_order_or_too_long_are_refused() -> None:
    with pytest.raises(ValueError, match="in the order of their arrival"):
        simulate(FAST, ARMS[0], [Arrival(1.0, 5, 5), Arrival(0.0, 5, 5)], TRACE, TRACE)
    with pytest.raises(ValueError, match="kv_tokens=4000 must hold the longest request, of 5005 tokens"):
        simulate(FAST, ARMS[0], [Arrival(1.0, 5000, 5)], TRACE, TRACE)


def test_waits_percentiles_and_counts_are_those_of_the_requests() -> None:
    times = {"fixed_seconds": 1.0, "token_seconds": 0.0, "context_seconds": 0.0, "expert_seconds": 0.0}
    cluster = Cluster(engines=1, kv_tokens=4000, max_num_seqs=1, **times)
    outcome = simulate(cluster, Arm("sjf", queue="sjf"), [Arrival(3.0, 10, 7), Arrival(3.0, 20, 2)], TRACE, TRACE)
    # One at a time: the first runs for seven steps; the slot is free once its last token is under way.
    assert outcome.waited == {0: 0.0, 1: 7.0}
    assert outcome.ttft == pytest.approx([1.0, 8.0])
    figures = outcome.figures()
    assert figures["ttft_p50_s"] == pytest.approx(4.5)
    assert figures["ttft_p95_s"] == pytest.approx(1.0 + 0.95 * 7)
    assert (figures["waited_most_s"], figures["aged"], figures["preemptions"]) == (7.0, 1, 0)


def test_memory_that_is_nearly_full_preempts_and_shows() -> None:
    cluster = Cluster(engines=1, kv_tokens=320, fixed_seconds=1.0)
    outcome = simulate(cluster, ARMS[0], [Arrival(0.0, 140, 100), Arrival(0.0, 130, 100)], TRACE, TRACE)
    assert outcome.preemptions == 1
    assert 0.05 < outcome.full_share < 0.5
    assert simulate(Cluster(engines=1), ARMS[0], [Arrival(0.0, 140, 100)], TRACE, TRACE).full_share == 0


@pytest.mark.parametrize("arm", SESSION_ARMS, ids=lambda arm: arm.name)
def test_prefixes_are_found_where_the_user_was(arm: Arm) -> None:
    first = list(range(1, 101))
    again = [*first, *([0] * 30), *range(200, 240)]  # answers are zeros
    others = [Arrival(float(at), 20, 2, f"other {at}", [at] * 20) for at in (11, 12)]
    requests = [Arrival(10.0, 100, 30, "ann", first), *others, Arrival(300.0, 170, 2, "ann", again)]
    outcome = simulate(Cluster(prefix_caching=True), arm, requests, TRACE, TRACE)
    assert (outcome.probed_tokens, outcome.probed_blocks) == (310, 6 + 1 + 1 + 10)
    if arm.dispatch in ("affinity", "gimbal"):
        assert outcome.hit_blocks == 129 // PAGE  # the last token's keys and values were never computed
        assert outcome.hit_tokens == outcome.hit_blocks * PAGE
        assert outcome.branches["affinity"] == 1
    elif arm.name == "rr":
        assert outcome.hit_blocks == 0  # it is the other engine's turn


def test_points_hold_what_they_say() -> None:
    ample, tight = POINTS["kv_ample"], POINTS["kv_tight"]
    assert ample.of_shape("random", 2.0) == Cluster(slow=2.0)
    assert tight.of_shape("random", 1.0) == Cluster(kv_tokens=24_000)
    assert POINTS["moe_bound"].of_shape("random", 1.0).kv_tokens > 24_000
