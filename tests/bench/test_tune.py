"""`python -m bench.tune` and what the kernels make of its files."""

import dataclasses
import json
import types

import jax
import pytest

from bench import device_clock, tune
from bench.operations import Case, in_turns
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


def add(*, x, implementation):
    """An operation with a kernel whose forms are exact, wrong, or can't be had."""
    config = tuning.choose("op", Config(), H200, width=4)
    if config.stages == 8:
        raise RuntimeError("no room")
    return x + (1 if config.stages < 6 or implementation == "xla" else 1.5)


def case_of(*stages):
    spec = types.SimpleNamespace(options={}, bytes_moved=1, make=lambda key: {"x": jax.random.normal(key, (4,))})
    return Case(add, spec, ("mosaic", "xla"), candidates=tuple(map(Config, stages)))


def test_forms_that_are_wrong_or_cannot_be_had_are_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(tune, "measure", lambda calls: device_clock.Timing(None, 0.5))
    assert tune.try_forms(case_of(4, 7, 8)) == {"width=4": {"{}": 0.5, '{"stages": 4}': 0.5}}
    said = capsys.readouterr().out
    assert 'not {"stages": 7}: ValueError: error of' in said
    assert 'not {"stages": 8}: RuntimeError: no room' in said


def test_without_the_default_form_there_is_nothing_to_compare_with(monkeypatch):
    monkeypatch.setattr(tune, "measure", lambda calls: device_clock.Timing(None, 0.5))
    case = case_of(4)
    broken = case._replace(function=lambda **arguments: add(**arguments) + (arguments["implementation"] == "mosaic"))
    assert tune.try_forms(broken) == {}


def test_operations_take_turns():
    cases = {"a": {"x1": 1, "x2": 2, "y": 3}, "b": {"x3": 4}, "c": {"x4": 5}}
    found = in_turns(cases, ["a", "b"], lambda name: name.startswith("x"))
    assert found == [("a", "x1", 1), ("b", "x3", 4), ("a", "x2", 2)]


def test_a_workload_that_does_not_exist_is_refused(capsys):
    assert tune.main(["--spec", "nowhere", "--spec", "either"]) == 2
    assert "no workload of that name" in capsys.readouterr().err


def test_without_a_gpu_nothing_is_tuned(capsys):
    assert tune.main([]) == 2
    assert "no GPU" in capsys.readouterr().err
