"""`python -m bench.tune` and what the kernels make of its files."""

import dataclasses
import json

import pytest

from bench import tune
from pallas_kernels import tuning
from pallas_kernels.target import Target


@dataclasses.dataclass(frozen=True)
class Config:
    stages: int = 2


H200 = Target("NVIDIA H200", 132)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "_ROOT", tmp_path)
    tuning._measured.cache_clear()
    yield tmp_path
    tuning._measured.cache_clear()


def test_what_was_measured_is_taken_on_that_device_for_that_workload():
    tune.keep("NVIDIA H200", {"op": {"head_dim=64": {"stages": 4}}})
    assert tuning.choose("op", Config(), H200, head_dim=64) == Config(4)
    assert tuning.choose("op", Config(), H200, head_dim=128) == Config()
    assert tuning.choose("other", Config(), H200, head_dim=64) == Config()
    assert tuning.choose("op", Config(), Target("NVIDIA H100 PCIe", 114), head_dim=64) == Config()


def test_a_form_on_trial_is_taken_whatever_was_measured():
    tune.keep("NVIDIA H200", {"op": {"head_dim=64": {"stages": 4}}})
    with tuning.trying(Config(7)) as chosen_for:
        assert tuning.choose("op", Config(), H200, head_dim=64) == Config(7)
    with tuning.trying(None):
        assert tuning.choose("op", Config(), H200, head_dim=64) == Config()
    assert chosen_for == {("op", "head_dim=64")}
    assert tuning.choose("op", Config(), H200, head_dim=64) == Config(4)


def test_adopted_files_change_what_is_known(tmp_path, folder):
    tune.keep("NVIDIA H200", {"op": {"a": {"stages": 4}, "b": {"stages": 5}, "c": {"stages": 3}}})
    report = tmp_path / "report.json"
    report.write_text(
        json.dumps({"device": "NVIDIA H200", "forms": {"op": {"b": {"stages": 6}, "c": {}}, "other": {"a": {}}}})
    )
    assert tune.main(["--adopt", str(report)]) == 0
    assert json.loads((folder / "op" / "tuning" / "nvidia_h200.json").read_text()) == {
        "a": {"stages": 4},
        "b": {"stages": 6},
    }
    assert not (folder / "other").exists()


@pytest.mark.parametrize(
    ("times", "form"),
    [
        ([{"{}": 1.0, '{"stages": 3}': 0.9, '{"stages": 4}': 0.95}], {"stages": 3}),
        ([{"{}": 1.0, '{"stages": 3}': 0.99}], {}),  # within the noise
        ([{"{}": 1.0, '{"stages": 3}': 0.7}, {"{}": 10.0, '{"stages": 3}': 12.0}], {"stages": 3}),
        ([{"{}": 1.0, '{"stages": 3}': 0.7}, {"{}": 10.0}], {}),  # doesn't fit the second
    ],
)
def test_the_form_that_is_best_for_all_workloads_together_is_chosen(times, form):
    assert tune.fastest(times) == form


def test_without_a_gpu_nothing_is_tuned(capsys):
    assert tune.main([]) == 2
    assert "no GPU" in capsys.readouterr().err
