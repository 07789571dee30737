"""The simulation of scheduling for mixtures of experts."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bench.moe import __main__ as command
from bench.moe.routing import StepImbalance, draw_trace
from bench.moe.simulation import ARMS, Arm, Cluster, simulate
from bench.moe.workload import Arrival, arrivals
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


@pytest.mark.parametrize("redundant", [0, 2])
def test_imbalance_of_a_step_is_that_of_its_tokens(redundant: int) -> None:
    row = np.array([0, 1, 2, 3, 4, 5, 6, 7, *([0, 3] if redundant else [])], np.int32)
    placement = Placement(np.tile(row, (3, 1)), 2, 8)
    imbalance, at = StepImbalance(TRACE, placement), 0
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


def test_the_command_reports_changes_and_intervals(tmp_path, capsys) -> None:
    file = tmp_path / "moe.json"
    call = ["--point", "kv_ample", "--shape", "random", "--rate", "1.4", "--arm", "Gimbal", "--arm", "SJFS"]
    assert command.main([*call, "--seeds", "2", "--requests", "40", "--jobs", "1", "--json", str(file)]) == 0
    report = json.loads(file.read_text())["points"]["kv_ample"]
    assert [(row["arm"], row["rate"]) for row in report["summary"]] == [("SJFS", 1.4), ("Gimbal", 1.4)]
    assert len(report["runs"]) == 6
    assert "Gimbal" in capsys.readouterr().out
    values = command.changes(report["runs"], ARMS[0], "ttft_s")
    assert not values.any()


def test_intervals_hold_the_mean() -> None:
    values = np.random.default_rng(0).normal(0.3, 1.0, 400)
    low, high = command.interval(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(4 * 1.0 / 20, rel=0.2)
