"""The parts of `bench/gpu_check.sh`, as far as they go without a GPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import device_battery, device_clock, device_engine
from bench.aot_steps import QWEN3_8B

ROOT = Path(__file__).parents[2]


def test_without_a_gpu_nothing_is_measured(tmp_path):
    run = subprocess.run(
        [ROOT / "bench" / "gpu_check.sh", tmp_path / "out"],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 2
    assert "no GPU that JAX can use" in run.stderr
    assert not list((tmp_path / "out").iterdir())
    assert device_battery.main([]) == 2


def test_parts_take_less_than_ten_minutes_together():
    parts = re.findall(r"^part \w+ (\d+)", (ROOT / "bench" / "gpu_check.sh").read_text(), re.MULTILINE)
    assert len(parts) == 7
    assert sum(map(int, parts)) < 600


def test_outcomes_of_tests_are_told_apart(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "def test_a(): pass\n"
        "def test_b(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='no tool')\n"
        "def test_c(): pass\n"
        "@pytest.fixture\n"
        "def broken(): raise ValueError('set-up')\n"
        "def test_d(broken): pass\n"
    )
    seen = []
    outcomes = device_battery._Outcomes(lambda now: seen.append((now.passed, len(now.failed))))
    options = ["-q", "-c", os.devnull, "--rootdir", str(tmp_path), "-p", "no:cacheprovider", str(tmp_path)]
    assert pytest.main(options, plugins=[outcomes]) == 1
    assert outcomes.passed == 1
    assert sorted(name.partition("::")[2] for name in outcomes.failed) == ["test_b", "test_d"]
    assert ["no tool" in reason for reason in outcomes.skipped.values()] == [True]
    # After each test, with what is known by then.
    assert seen == [(1, 0), (1, 1), (1, 1), (1, 2)]


def test_the_engine_is_set_beside_what_the_device_can_do(tmp_path, monkeypatch):
    monkeypatch.setattr(device_engine, "ceilings", lambda: device_clock.Ceilings(1e9, 1e12, 0, ""))
    monkeypatch.setattr(device_engine, "_LOADS", {"small": device_engine.Load(2, 64, 4)})
    file = tmp_path / "engine.json"
    assert device_engine.main(["--json", str(file)]) == 0
    report = json.loads(file.read_text())["models"]["small"]
    assert report["decode_tokens_per_second"] == pytest.approx(2 / report["decode_step_ms"] * 1e3)
    layers, kv_heads, head_dim = 4, 2, 32
    assert report["kv_bytes"] == 2 * (64 + 4 / 2) * layers * 2 * kv_heads * head_dim * 4
    seconds = (report["weight_bytes"] + report["kv_bytes"]) / 1e9
    assert report["decode_step_over_roofline"] == pytest.approx(report["decode_step_ms"] / 1e3 / seconds)


def test_weights_that_a_token_is_multiplied_with_are_those_of_the_published_model():
    # 6.95 billion parameters are said to be neither table nor head.
    assert device_engine._multiplied(QWEN3_8B) == pytest.approx(6.95e9, rel=1e-3)
