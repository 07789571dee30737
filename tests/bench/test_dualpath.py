"""The comparison of path modes: a small one, whole."""

import json

import pytest

from bench import dualpath
from bench.dualpath_load import Load, RunTokens


def test_runs_share_their_first_prompts_and_nothing_more():
    load = Load((30, 20), 3, 5, 4)
    sessions = load.sessions
    one, other = RunTokens(90, 1), RunTokens(90, 2)
    first = one.prompt(sessions[0], 0, [])
    assert first == other.prompt(sessions[0], 0, [])
    assert len(first) == 30
    assert first[:20] != one.prompt(sessions[1], 0, [])
    assert one.prompt(sessions[0], 1, first)[:30] == first
    assert one.prompt(sessions[0], 1, first)[30:] != other.prompt(sessions[0], 1, first)[30:]
    assert one.prompt(sessions[0], 1, first)[30:] != one.prompt(sessions[0], 2, first)[30:]


@pytest.mark.slow
def test_modes_are_compared_on_one_cluster(tmp_path, monkeypatch, capsys):
    case = dualpath.Case("io", 1, 1, ("basic", "full", "oracle"), Load((140, 140), 2, 10, 4), (("full", 1.85),), 50e6)
    monkeypatch.setattr(dualpath, "cases", lambda quick: [case])
    file = tmp_path / "results.json"
    assert dualpath.main(["--quick", "--json", str(file), "--plot", str(tmp_path / "plot.png")]) == 0
    results = json.loads(file.read_text())
    runs = {run["mode"]: run for run in results["runs"]}
    assert {mode: run["tokens_equal"] for mode, run in runs.items()} == {"basic": True, "full": True, "oracle": None}
    for run in runs.values():
        assert (run["prefill"], run["decode"], run["errors"]) == (1, 1, [])
        assert run["jct_s"] > 0
        assert run["hit_tokens"] == 4 * 128  # both turns of both agents, in whole blocks
    block = 8 * 2 * 64 * 2 * 64 * 4
    assert runs["basic"]["bytes"]["prefill 0 storage write"] == 8 * block
    assert runs["basic"]["bytes"]["decode 1 storage write"] == 0
    read = [runs["full"]["bytes"][f"{engine} storage write"] for engine in ("prefill 0", "decode 1")]
    assert sum(read) == 8 * block
    assert read[1]  # of equal queues the decode side's
    assert not any(runs["oracle"]["bytes"][f"{engine} storage write"] for engine in ("prefill 0", "decode 1"))
    assert [row["mode"] for row in results["summary"]] == ["basic", "full", "oracle"]
    assert "times faster" in capsys.readouterr().out
    assert (tmp_path / "plot.png").stat().st_size > 0
