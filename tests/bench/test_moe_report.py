"""What the simulation of scheduling for mixtures of experts reports."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.moe import __main__ as command
from bench.moe.arms import SESSION_ARMS
from bench.moe.campaign import Load, calibrate
from bench.moe.placements import EXPERT_BYTES, candidates, gap_rows, relocation, worth
from bench.moe.points import POINTS
from bench.moe.routing import draw_trace
from bench.moe.search import measure
from bench.moe.sessions import conversations, hit_row, session_arrivals, session_report
from bench.moe.simulation import Cluster
from bench.moe.summary import better_points, cells, change_of_means, changes, compare, interval
from jaxdual.scheduling.experts import Placement, linear_placement


@pytest.fixture
def pool() -> Iterator[Executor]:
    with ThreadPoolExecutor(1) as made:
        yield made


def made_runs() -> list[dict[str, Any]]:
    """Shapes "a" and "b", three seeds; "new" has 0.8 and 1.1 times the baseline's TTFT, which grows with the seed."""
    figures = dict.fromkeys(
        ("ttft_p50_s", "ttft_p95_s", "ttft_p99_s", "ttft_most_s", "tpot_p50_s", "tpot_p95_s", "tpot_p99_s"), 1.0
    ) | {"waited_most_s": 1.0, "tokens_per_s": 1.0, "steps": 5, "preemptions": 1, "relocations": 0, "aged": 0}
    figures |= {"imbalance": 1.1, "kv_full_share": 0.0, "branches": {"load": 2}}
    return [
        {"shape": shape, "rate": 1.4, "arm": arm, "seed": seed, "ttft_s": factor * 10.0**seed, "tpot_s": 2.0} | figures
        for (shape, new), seed in itertools.product((("b", 1.1), ("a", 0.8)), (2, 0, 1))
        for arm, factor in (("rr", 1.0), ("new", new if seed else 1.0))
    ]


def test_changes_compare_the_same_requests() -> None:
    assert changes(made_runs(), "new", "rr", "ttft_s") == pytest.approx(np.array([[0, -0.2, -0.2], [0, 0.1, 0.1]]))
    mean, low, high = change_of_means(made_runs(), "new", "rr", "ttft_s")
    assert mean == pytest.approx(((89 / 111 - 1) + (122 / 111 - 1)) / 2)
    assert low <= mean <= high
    found = compare(made_runs(), "new", "rr", 1.4)
    assert found["ttft_s"]["change"] == pytest.approx(-0.2 / 6, abs=1e-4)
    assert (found["ttft_s"]["shapes_better"], found["ttft_s"]["runs_better"]) == (1, 0.333)
    assert better_points([found, found]) == {("new", "rr"): (2, 0)}


def test_cells_keep_each_seed_in_order() -> None:
    kept = cells(made_runs())
    assert [(one["shape"], one["arm"]) for one in kept] == [("b", "rr"), ("b", "new"), ("a", "rr"), ("a", "new")]
    assert kept[3]["ttft_s"] == [1.0, 8.0, 80.0]
    assert kept[3]["branches"] == {"load": 6}


def test_intervals_hold_the_mean_and_draw_within_each_row() -> None:
    values = np.random.default_rng(0).normal(0.3, 1.0, 400)
    low, high = interval(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(4 * 1.0 / 20, rel=0.2)
    assert interval(np.array([[1.0] * 5, [9.0] * 5])) == (5.0, 5.0)


def test_the_command_reports_changes_and_intervals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "moe.json"
    call = ["--point", "kv_ample", "--shape", "random", "--rate", "1.4", "--arm", "Gimbal", "--arm", "SJFS"]
    assert command.main([*call, "--seeds", "2", "--requests", "40", "--jobs", "1", "--json", str(file)]) == 0
    report = json.loads(file.read_text())["points"]["kv_ample"]
    of_baseline = {base: [one["arm"] for one in report["changes"] if one["baseline"] == base] for base in ("rr",)}
    assert of_baseline == {"rr": ["vllm_counts", "SJFS", "Gimbal"]}
    assert len(report["changes"]) == 6
    assert [len(one["ttft_s"]) for one in report["cells"]] == [2] * 4
    assert "Gimbal" in capsys.readouterr().out


def test_lengths_come_from_a_file_that_must_be_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Such few and short requests never wait for each other.
    monkeypatch.setattr(command, "calibrate_all", lambda pool, point, load, shapes: dict.fromkeys(shapes, 1.0))
    file = tmp_path / "burst.csv"
    file.write_text("Timestamp,Request tokens,Response tokens\n" + "1,50,3\n" * 40)
    call = ["--point", "kv_ample", "--shape", "random", "--rate", "1.4", "--arm", "rr", "--seeds", "2", "--jobs", "1"]
    call += ["--requests", "30", "--variation", "2.0"]
    assert command.main([*call, "--trace", str(file)]) == 0
    with pytest.raises(SystemExit):
        command.main([*call, "--trace", str(tmp_path / "none.csv")])
    assert "none.csv: cannot be read" in capsys.readouterr().err


def test_a_candidate_is_measured_on_its_own_baseline(pool: Executor) -> None:
    row = measure(pool, POINTS["moe_bound"], Load(30), ["random"])
    assert float(row["P99, s"]) > 1
    assert {"Gimbal: TTFT", "Gimbal relaxed: TPOT"} <= row.keys()


# Placements.


def test_worth_of_a_placement_is_that_of_the_choices_it_serves() -> None:
    trace = draw_trace(96, 0, layers=2, experts=8, top_k=2)
    found = worth(linear_placement(2, 8, 2), trace, 32)
    where = trace.choices // 4
    loads = np.array([[(where[layer] == device).sum() for device in range(2)] for layer in range(2)])
    phi = loads.max(axis=1) / loads.mean(axis=1)
    assert (found["phi"], found["worst layer"]) == (pytest.approx(phi.mean()), pytest.approx(phi.max()))
    apart = [a != b for token in range(96) for a in where[0, token] for b in where[1, token]]
    assert found["cut"] == pytest.approx(np.mean(apart))
    remote = [1 - token % 2 in where[layer, token] for layer in range(2) for token in range(96)]
    assert found["remote copies"] == pytest.approx(np.mean(remote))
    most = [
        max(len(set(part[part // 4 == device].ravel())) for device in range(2))
        for layer in range(2)
        for part in np.split(trace.choices[layer], 3)
    ]
    assert found["experts at work"] == pytest.approx(np.mean(most))


def test_relocation_counts_what_changes_its_device() -> None:
    before = Placement(np.array([[0, 1, 2, 3]], np.int32), 2, 4)
    after = Placement(np.array([[3, 0, 1, 2]], np.int32), 2, 4)
    found = {"experts moved": 2, "GB between devices": 2 * EXPERT_BYTES / 1e9, "stall, ms": EXPERT_BYTES / 100e9 * 1000}
    assert relocation(before, after) == found
    assert relocation(before, before) == dict.fromkeys(found, 0)


def test_every_placement_is_a_candidate_and_no_heuristic_beats_the_bound() -> None:
    window = draw_trace(64, 0, layers=3, experts=16, top_k=2).window(8)
    names = [one.name for one in candidates(8, window)]
    assert names == [
        *("linear", "eplb", "eplb, 16 copies", "edr", "edr_column", "source", "metro", "metro, 16 copies"),
        "eplb, 16 copies, 2 nodes",
    ]
    assert all(one.place(window).devices == 8 for one in candidates(8, window))
    rows = gap_rows()
    assert all(row["sum"] >= row["bound"] - 1e-6 for row in rows)
    assert rows[0]["sum"] == pytest.approx(rows[0]["bound"], abs=1e-4)


# Users who come back.


def test_turns_begin_with_all_that_was_said_and_are_the_same_in_every_run() -> None:
    first, other = (session_arrivals(400, 1.4, seed, 0.2) for seed in (0, 1))
    assert len(first) == 400
    assert [one.time for one in first] == sorted(one.time for one in first)
    assert sorted(map(str, (one.tokens for one in first))) == sorted(map(str, (one.tokens for one in other)))
    assert first != other
    latest: dict[str, Any] = {}
    returned = 0
    for turn in first:
        assert turn.tokens is not None
        assert turn.prompt == len(turn.tokens)
        before = latest.get(turn.user or "")
        if before is not None:
            said = [*before.tokens, *([0] * before.output)]
            assert list(turn.tokens[: len(said)]) == said
            assert turn.time > before.time
            returned += 1
        latest[turn.user or ""] = turn
    assert returned == 400 - len(conversations(400, 0.2)) > 50


def test_hits_are_counted_over_runs(pool: Executor) -> None:
    runs = [
        {"arm": arm, "seed": seed, "hit_blocks": hits, "hit_tokens": 16 * hits, "probed_blocks": 100}
        | {"probed_tokens": 1700, "ttft_s": 0.5}
        for arm, of_arm in (("rr", (10, 20)), ("home", (18, 18)))
        for seed, hits in enumerate(of_arm)
    ]
    row = hit_row(runs, "home", "rr")
    assert (row["hits, blocks"], row["deviation"], row["rate"], row["gain"]) == (18, 0, "18.00%", "+20.0%")
    assert hit_row(runs, "rr", "rr")["deviation"] == pytest.approx(7.1)
    report = session_report(pool, 2, 150)
    assert [row["arm"] for row in report["summary"]] == [arm.name for arm in SESSION_ARMS]
    assert report["cluster"]["prefix_caching"]
    assert not Cluster().prefix_caching


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rate", "0"], "must be a number above 0"),
        (["--rate", "nan"], "must be a number above 0"),
        (["--seeds", "1"], "must be a whole number of at least 2"),
        (["--requests", "0"], "must be a whole number of at least 2"),
        (["--jobs", "-1"], "must be a whole number of at least 1"),
        (["--wall-clock", "--rate", "1"], "--rate has no effect with --wall-clock"),
        (["--load", "0.5"], "--load has no effect without --wall-clock"),
        (["--placements", "--seeds", "3"], "--seeds has no effect with --placements"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err


def test_a_baseline_that_never_waits_long_enough_is_no_baseline() -> None:
    with pytest.raises(ValueError, match=r"no factor on all times from 0.2 to 8.0 gives a P99 of 4.9 s"):
        calibrate(POINTS["kv_ample"], Load(requests=2), "central")
