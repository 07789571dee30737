"""The command: what it writes, and what it says of bad calls."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from jaxdual.sim.__main__ import main
from jaxdual.sim.config import read_sim_config
from jaxdual.sim.plan import format_plan, make_plan

EXAMPLES = Path(__file__).parents[2] / "examples" / "sim"
SMALL = [str(EXAMPLES / "ds660b.toml"), "--no-progress", "--set", "workload.agents=16", "--set", "workload.turns=3"]


@pytest.mark.parametrize("name", ["ds660b", "ds27b", "qwen32b", "loopback"])
def test_the_examples_run(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    call = [str(EXAMPLES / f"{name}.toml"), "--no-progress", "--json", str(report), "--set", "workload.agents=8"]
    assert main([*call, "--set", "workload.turns=2"]) == 0
    assert "JCT" in capsys.readouterr().out
    found = json.loads(report.read_text())
    assert found["jct_s"] > 0
    assert found["requests"] == {"planned": 16, "ok": 16}
    for times in ("ttft_s", "ttst_s", "tpot_s"):
        assert 0 < found[times]["p50"] <= found[times]["p99"]
    assert {"bytes", "utilisation"} == found["nics"]["kinds"]["prefill storage"]["write"].keys()
    assert {"wall_seconds", "cpu_seconds", "peak_bytes"} == found["simulation"].keys()


def test_a_request_s_spans_follow_each_other(tmp_path: Path) -> None:
    path = tmp_path / "spans.json"
    assert main([*SMALL, "--spans", str(path), "--spans-of", "3:2"]) == 0
    spans = [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]
    assert len(spans) == 6
    for before, after in itertools.pairwise(spans):
        assert before["ts"] + before["dur"] == pytest.approx(after["ts"])
    assert main([*SMALL, "--spans", str(path), "--spans-of", "3:9"]) == 2


def test_a_picture_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    assert main([*SMALL, "--plot", str(tmp_path / "over_time.png")]) == 0
    assert (tmp_path / "over_time.png").read_bytes().startswith(b"\x89PNG")
    assert main([*SMALL, "--plot", str(tmp_path / "over_time.none")]) == 2
    assert "--plot" in capsys.readouterr().err


def test_reports_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for mode in ("basic", "full"):
        assert main([*SMALL, "--set", f"mode={mode}", "--json", str(tmp_path / mode)]) == 0
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "basic"), str(tmp_path / "full")]) == 0
    lines = {line.split("  ")[0]: line.split()[-3:] for line in capsys.readouterr().out.splitlines()}
    first, second, ratio = (float(cell) for cell in lines["jct_s"])
    assert second / first == pytest.approx(ratio, abs=1e-3)
    (tmp_path / "none").write_text("[]")
    assert main(["compare", str(tmp_path / "basic"), str(tmp_path / "none")]) == 2
    assert "is no report" in capsys.readouterr().err


def test_a_plan_keeps_what_is_promised_with_no_node_too_many() -> None:
    load = ("workload.max_len=32K", "workload.agents=60", "workload.turns=6", "workload.arrivals_per_second=3.0")
    groups = ("cluster.prefill_group_nodes=1", "cluster.decode_group_nodes=1")
    config = read_sim_config(EXAMPLES / "ds660b.toml", load + groups)
    slo = {"ttft": 0.6, "tpot": 0.0252}
    plan = make_plan(config, slo, 12, lambda trial: None)
    assert plan.chosen is not None
    assert plan.chosen.prefill + plan.chosen.decode > 2
    assert all(plan.chosen.times[name] <= seconds for name, seconds in slo.items())
    tried = {(one.prefill, one.decode): one for one in plan.tried}
    for prefill, decode in (
        (plan.chosen.prefill - 1, plan.chosen.decode),
        (plan.chosen.prefill, plan.chosen.decode - 1),
    ):
        assert not (prefill and decode) or tried[prefill, decode].excess > 1
    assert plan.next_prefill is not None
    assert plan.next_prefill.prefill == plan.chosen.prefill + 1
    none = make_plan(config, {"ttft": 1e-3}, 4, lambda trial: None)
    assert none.chosen is None
    assert "no cluster of up to 4 nodes" in format_plan(none, {"ttft": 1e-3}, 4)


def test_experts_are_not_spread_over_fewer_nodes_than_a_group() -> None:
    config = read_sim_config(EXAMPLES / "ds660b.toml", ("workload.agents=4", "workload.turns=2"))
    plan = make_plan(config, {"ttft": 1e3}, 16, lambda trial: None)
    assert [(one.prefill, one.decode) for one in plan.tried] == [(2, 4), (4, 4), (2, 8)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (["/none.toml"], "/none.toml: cannot be read"),
        ([*SMALL, "--set", "mode=dualpath"], "mode: invalid enum value 'dualpath'; accepted are basic, layerwise"),
        ([*SMALL, "--set", "decode.step_seconds=0", "--set", "decode.sequence_seconds=0"], "must be above 0"),
        (["plan", "--model", SMALL[0], "--trace", "64K", "--slo", "ttft=1", "--most-nodes", "1"], "at least 2"),
        ([*SMALL, "--set", "cluster.gpus=x"], "cluster.gpus: expected `int`"),
        ([*SMALL, "--json", "/none/report.json"], "/none/report.json: cannot be written"),
        ([*SMALL, "--plot", "/none/picture.png"], "/none/picture.png: cannot be written"),
        ([*SMALL, "--spans", "/"], "/: cannot be written"),
        (["plan", "--model", SMALL[0], "--trace", "64K", "--slo", "ttft=0"], "--slo 'ttft=0' must be seconds above 0"),
        (["plan", "--model", SMALL[0], "--trace", "/none", "--slo", "ttft=1"], "/none: cannot be read"),
    ],
)
def test_bad_calls_are_told(call: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(call) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert not told.out, "before anything ran"
