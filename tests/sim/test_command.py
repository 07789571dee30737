"""The command: what it writes, and what it says of bad calls."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from jaxdual.config import ConfigError
from jaxdual.sim.__main__ import main
from jaxdual.sim.config import read_sim_config
from jaxdual.sim.plan import Trial, format_plan, make_plan

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
    assert {"bytes", "left_bytes", "utilisation"} == found["nics"]["kinds"]["prefill storage"]["write"].keys()
    assert found["nics"]["each"].keys() >= {"prefill storage 0 read", "decode compute 0 write"}
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
        (
            ["plan", "--model", SMALL[0], "--trace", "/none", "--slo", "ttft=1"],
            "/none: is neither a file nor one of 32K",
        ),
    ],
)
def test_bad_calls_are_told(call: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(call) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert not told.out, "before anything ran"


def report_of(tmp_path: Path, *settings: str) -> dict[str, Any]:
    file = tmp_path / "report.json"
    call = [part for setting in settings for part in ("--set", setting)]
    assert main([SMALL[0], *call, "--json", str(file), "--no-progress"]) == 0
    found: dict[str, Any] = json.loads(file.read_text())
    return found


TRACE = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n" + "".join(
    f"{time},m,{prompt},20,{prompt + 20},log\n" for time, prompt in ((0, 100), (3, 2000), (9, 300))
)


def test_a_trace_is_run_as_it_is_whatever_load_the_file_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "three.csv").write_text(TRACE)
    here, example = tmp_path, SMALL[0]
    monkeypatch.chdir(here)
    whole = report_of(here, "workload.trace=three.csv", "workload.speed=1")
    assert whole["tokens"]["prompt"] == 2400
    assert whole["jct_s"] > 9
    assert report_of(here, "workload.trace=three.csv", "workload.agents=5")["tokens"]["generation"] >= 5 * 20
    both = ["--set", "workload.trace=three.csv", "--set", "workload.max_len=32K"]
    assert main([example, *both]) == 2


def test_a_set_takes_the_place_of_a_file_s_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loopback = str(Path(SMALL[0]).parent / "loopback.toml")
    settings = ["workload.max_len=32K", "workload.agents=2", "workload.turns=1", "workload.append_scale=0.01"]
    settings += ["cluster.decode_buffer=1e9", "cluster.prefill_buffer=1e9", "decode.kv_bytes=1e9"]
    assert main([loopback, *(part for one in settings for part in ("--set", one)), "--no-progress"]) == 0
    assert "2 of 2" in capsys.readouterr().out


def test_use_of_cards_ends_with_the_last_agent(tmp_path: Path) -> None:
    settings = ("workload.agents=8", "workload.max_len=32K", "workload.turns=1", "cluster.snic=3e6")
    writes = report_of(tmp_path, *settings)["nics"]["kinds"]["decode storage"]["read"]
    assert writes["utilisation"] <= 1
    assert 0 < writes["left_bytes"] < writes["bytes"]


def test_waiting_for_a_buffer_is_not_reading(tmp_path: Path) -> None:
    settings = ("workload.agents=64", "workload.max_len=32K", "workload.turns=1", "cluster.decode_buffer=3e8")
    parts = report_of(tmp_path, *settings)["ttft_parts_s"]
    assert parts["read"]["mean"] == pytest.approx(0, abs=0.05)
    assert parts["allocation"]["mean"] > 0.1


def test_a_plan_has_no_more_nodes_than_it_may() -> None:
    config = read_sim_config(
        Path(SMALL[0]), ["workload.agents=8", "workload.max_len=32K", "workload.turns=2", "seed=1"]
    )
    tried: list[Trial] = []
    make_plan(config, {"ttft": 0.05}, 8, tried.append)
    assert tried
    assert max(one.prefill + one.decode for one in tried) <= 8
    silent = read_sim_config(
        Path(SMALL[0]), ["workload.agents=2", "workload.turns=1", "workload.generation_scale=1e-9"]
    )
    with pytest.raises(ConfigError, match="no request of this load has a TPOT"):
        make_plan(silent, {"tpot": 0.001}, 8, tried.append)
    with pytest.raises(ConfigError, match="--most-nodes 5 must be at least 6"):
        make_plan(config, {"ttft": 5.0}, 5, tried.append)


@pytest.mark.parametrize("setting", ["window_seconds=0.0005", "cluster.fetch_seconds=3000"])
def test_slow_fetches_and_fine_windows_are_no_deadlock(setting: str, tmp_path: Path) -> None:
    settings = ("workload.agents=2", "workload.max_len=32K", "workload.turns=1", setting)
    assert report_of(tmp_path, *settings)["jct_s"] > 0


def test_reports_that_are_none_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.json").write_text('{"jct_s": 3, "ttft_s": 3}')
    assert main(["compare", str(tmp_path / "bad.json"), str(tmp_path / "bad.json")]) == 2
    assert "its figures are no numbers" in capsys.readouterr().err
