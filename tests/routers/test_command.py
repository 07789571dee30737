"""The command end to end: its counts are those of dense forward passes, and what it says of bad calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxdual import LLM, SamplingParams
from jaxdual.engine.engine import Engine
from jaxdual.routers import __main__ as command
from jaxdual.routers import read_profile
from jaxdual.scheduling.expert_figures import transitions_of
from jaxdual.scheduling.experts import PAIR_SHARE
from tests.engine.models import FIXTURES
from tests.parallel.test_expert_balancer import chosen_experts

ROOT = Path(__file__).parents[2]
SHIPPED = ["--model", str(ROOT / "models" / "shipped" / "moe"), "--no-progress"]
SMALL = [
    *("--model", str(FIXTURES / "qwen3_moe"), "--no-progress", "--no-enable-prefix-caching"),
    *("--block-size", "8", "--max-num-seqs", "4", "--max-num-batched-tokens", "32", "--max-model-len", "64"),
]
PROMPTS = np.random.default_rng(8).integers(320, size=(4, 19)).tolist()
RANDOM = ["--random-requests", "5", "--random-input-len", "20", "--random-output-len", "6", "--seed", "3"]


@pytest.fixture
def batch(tmp_path: Path) -> Path:
    path = tmp_path / "batch.jsonl"
    body = {"max_tokens": 7, "temperature": 0, "ignore_eos": True}
    lines = [
        {"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": {"prompt": prompt, **body}}
        for number, prompt in enumerate(PROMPTS)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def choices(requests: list[list[int]], output_len: int) -> np.ndarray:
    """Experts `[layers, tokens, k]` of these prompts and their greedy outputs, whose last token is never routed."""
    params = SamplingParams(max_tokens=output_len, temperature=0, ignore_eos=True)
    outputs = LLM(FIXTURES / "qwen3_moe").generate([{"prompt_token_ids": one} for one in requests], params)
    sequences = [[*one, *out.outputs[0].token_ids[:-1]] for one, out in zip(requests, outputs, strict=True)]
    return np.concatenate([chosen_experts("qwen3_moe", tokens) for tokens in sequences], axis=1)


def assert_counts(path: Path, chosen: np.ndarray) -> None:
    window = read_profile(path).window
    activations = np.stack([np.bincount(layer.ravel(), minlength=8) for layer in chosen])
    assert window.tokens == chosen.shape[1]
    # Ties of the router's logits in the last bits may turn out either way.
    assert np.abs(window.activations - activations).sum() <= 4
    assert window.transitions is not None
    assert np.abs(window.transitions - transitions_of(chosen, 8)).sum() <= 16


@pytest.mark.parametrize("devices", [1, 2])
def test_profiles_hold_what_dense_forward_passes_choose(devices: int, batch: Path, tmp_path: Path) -> None:
    profile, call = tmp_path / "profile.npz", [*SMALL, "--expert-parallel-size", str(devices)]
    tokens = np.random.default_rng(3).integers(320, size=(5, 20)).tolist()
    of_random, of_batch = choices(tokens, 6), choices(PROMPTS, 7)
    assert command.main([*call, *RANDOM, "--profile", str(profile)]) == 0
    assert_counts(profile, of_random)
    assert read_profile(profile).window.sources.shape == (3, devices, 8)
    assert read_profile(profile).fingerprint == LLM(FIXTURES / "qwen3_moe").info.fingerprint
    report = tmp_path / "figures.json"
    assert command.main([*call, *RANDOM, "-i", str(batch), "--profile", str(profile), "--json", str(report)]) == 0
    assert_counts(profile, of_batch)
    found = json.loads(report.read_text())
    assert (found["layers"], found["experts"], found["experts_per_token"], found["devices"]) == ([0, 1, 2], 8, 2, 2)
    for name, chosen, requests in (("batch", of_batch, 4), ("random", of_random, 5)):
        assert found["workloads"][name]["tokens"] == chosen.shape[1]
        assert found["workloads"][name]["requests"] == {"ok": requests, "failed": 0}
        loads = np.stack([np.bincount(layer.ravel(), minlength=8) for layer in chosen])
        np.testing.assert_allclose(
            found["workloads"][name]["relative_loads"], loads / loads.mean(axis=1, keepdims=True), atol=0.1
        )
    assert len(found["comparison"]["correlation"]) == 3


@pytest.mark.slow
def test_the_shipped_model_s_figures_go_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    batch, report = tmp_path / "batch.jsonl", tmp_path / "figures.json"
    batch.write_text("".join((ROOT / "examples" / "batch.jsonl").read_text().splitlines(keepends=True)[:4]))
    call = [
        *SHIPPED,
        "--max-num-seqs",
        "4",
        "--max-num-batched-tokens",
        "64",
        "-i",
        str(batch),
        "--json",
        str(report),
        "--devices",
        "4",
    ]
    assert command.main([*call, "--random-requests", "2", "--random-input-len", "60", "--random-output-len", "4"]) == 0
    out = capsys.readouterr().out
    found = json.loads(report.read_text())
    assert found["workloads"]["random"]["tokens"] == 2 * 63
    for name, one in found["workloads"].items():
        assert f"{one['tokens']} tokens routed" in out
        assert one["most_skewed"][0]["load"] == np.max(one["relative_loads"])
        assert [len(one["most_skewed"]), len(one["pairs"])] == [4, 5]
        assert one["pools"]["top"]["pairs"] >= one["pools"]["edr"]["pairs"]
        assert one["pools"]["edr"]["most_in_a_layer"] <= 2
        strongest = one["pairs"][0]["share"]
        assert (one["pools"]["threshold"]["pairs"] > 0) == (strongest >= PAIR_SHARE)
        placements = one["placements"]
        assert placements["eplb"]["imbalance"]["mean"] < placements["linear"]["imbalance"]["mean"] < 4
        assert f"imbalance {placements['linear']['imbalance']['mean']:.3f} mean" in out, name
    for placements in found["comparison"]["placements"].values():
        assert placements.keys() == {"eplb", "edr"}
    assert all(-1 <= one <= 1 for one in found["comparison"]["correlation"])


@pytest.mark.parametrize("devices", ["1", "2"])
def test_a_picture_is_drawn(devices: str, batch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    picture = tmp_path / "routers.png"
    call = [*SMALL, *RANDOM, "-i", str(batch), "--expert-parallel-size", devices]
    assert command.main([*call, "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000
    assert command.main([*call, "--plot", str(tmp_path / "routers.none")]) == 2
    assert "routers.none: its ending must be one of" in capsys.readouterr().err


def test_settings_of_placements_have_no_effect_and_those_of_the_engine_are_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So a server's settings can be profiled, though they name the profile that is yet to be made."""
    profile, placed = tmp_path / "profile.npz", ["--expert-parallel-size", "2", "--expert-placement", "edr"]
    call = [
        *SMALL,
        *RANDOM,
        *placed,
        "--expert-profile",
        str(profile),
        "--expert-interval",
        "4",
        "--expert-window",
        "2",
    ]
    assert command.main([*call, "--profile", str(profile)]) == 0
    assert read_profile(profile).window.tokens == 5 * 25
    assert command.main([*call, "--expert-anchor", "2"]) == 2
    assert "expert_anchor=2 must be below" in capsys.readouterr().err


def test_requests_that_fail_are_told_and_the_others_counted(
    batch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = tmp_path / "profile.npz"
    lines = batch.read_text().splitlines()
    batch.write_text("\n".join(["no JSON", *lines[:2]]))
    assert command.main([*SMALL, "-i", str(batch), "--profile", str(profile)]) == 1
    captured = capsys.readouterr()
    assert "2 requests, 1 failed" in captured.out
    assert "1 requests of batch failed; the first: line 1: not valid JSON" in captured.err
    assert read_profile(profile).window.tokens == 2 * 25
    batch.write_text("no JSON")
    assert command.main([*SMALL, "-i", str(batch)]) == 1
    assert "no request of batch was served: line 1: not valid JSON" in capsys.readouterr().err


def test_bad_calls_are_refused_before_the_work(batch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    file = str(tmp_path / "file")
    for arguments, message in (
        ([*SMALL, "-i", "missing.jsonl"], "missing.jsonl: cannot be read"),
        ([*SMALL, "-i", str(empty)], "empty.jsonl: has no requests"),
        ([*SMALL, *RANDOM, "--profile", "/none/profile.npz"], "/none/profile.npz: cannot be written"),
        ([*SMALL, *RANDOM, "--json", str(tmp_path)], "cannot be written"),
        ([*SMALL, *RANDOM, "--json", file, "--profile", file], "must be different files"),
        ([*SMALL, "-i", str(batch), "--json", str(batch)], "must be different files"),
        ([*SMALL, *RANDOM, "--devices", "3"], "--devices 3 must divide the 8 experts"),
        ([*SMALL, *RANDOM, "--block-size", "0"], "block_size=0 must be at least 1"),
        ([*SMALL, *RANDOM, "--random-input-len", "59"], "of 59 tokens with outputs of 6 are longer than the 64 of"),
        (["--model", str(FIXTURES / "qwen3"), *RANDOM], "qwen3: the model has no experts"),
        (["--model", "missing", *RANDOM], "missing"),
    ):
        assert command.main(arguments) == 2, arguments
        assert message in capsys.readouterr().err
    for arguments, message in (
        (SMALL, "there are no requests: give -i/--input-file, --random-requests, or both"),
        ([*SMALL, "-i", str(batch), "--random-output-len", "3"], "--random-output-len needs --random-requests"),
        ([*SMALL, "--random-requests", "0"], "'0' must be a whole number of at least 1"),
    ):
        with pytest.raises(SystemExit) as caught:
            command.main(arguments)
        assert caught.value.code == 2
        assert message in capsys.readouterr().err


def test_an_engine_that_breaks_off_and_an_interrupt_have_statuses_of_their_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(error: BaseException) -> Any:
        def step(_: Engine) -> None:
            raise error

        return step

    monkeypatch.setattr(Engine, "_step_overlapped", broken(RuntimeError("no memory")))
    assert command.main([*SMALL, *RANDOM]) == 1
    assert "the engine has failed: RuntimeError: no memory" in capsys.readouterr().err
    monkeypatch.setattr(LLM, "generate", lambda *_, **__: broken(KeyboardInterrupt())(None))
    assert command.main([*SMALL, *RANDOM]) == 130
    assert "interrupted" in capsys.readouterr().err
