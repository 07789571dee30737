"""`python -m bench.kernels` on a CPU."""

import functools
import json
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from bench import device_clock, kernels
from bench.operations import Case, operations


def test_a_report_says_times_errors_and_why_others_were_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(device_clock, "_SECONDS", 0.01)
    ceilings = device_clock.Ceilings(2e9, 1e12, 0, "")
    monkeypatch.setattr(kernels, "ceilings", lambda: ceilings)
    file = tmp_path / "kernels.json"
    assert kernels.main(["--op", "decode_attention", "--spec", "small_", "--json", str(file)]) == 0
    (workload,) = json.loads(file.read_text())["operations"]["decode_attention"].values()
    assert set(workload["by"]) == {"mosaic", "cudnn", "xla", "cudnn_contiguous", "torch_sdpa", "flashinfer"}
    assert "compute capability" in workload["by"]["mosaic"]["refused"]
    xla = workload["by"]["xla"]
    assert xla["clock"] == "wall"
    assert 0 <= xla["error"] < 0.03
    assert xla["bytes_per_second"] == pytest.approx(workload["bytes"] / xla["us"] * 1e6)
    assert workload["roofline_us"] == pytest.approx(workload["bytes"] / 2e9 * 1e6)
    assert xla["of_roofline"] == pytest.approx(workload["roofline_us"] / xla["us"])


def test_a_wrong_result_is_not_timed_and_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "ceilings", lambda: device_clock.Ceilings(1e9, 1e12, 0, ""))
    case = operations()["decode_attention"]["small_batch_8_context_1k"]

    def off(*, implementation, **arrays):
        out = case.function(**arrays, implementation=implementation)
        return out.at[3, 1, 7].add(0.05) if implementation == "xla" else out

    monkeypatch.setattr(kernels, "operations", lambda: {"decode_attention": {"small_off": case._replace(function=off)}})
    file = tmp_path / "kernels.json"
    assert kernels.main(["--compare", "xla", "--json", str(file)]) == 1
    xla = json.loads(file.read_text())["operations"]["decode_attention"]["small_off"]["by"]["xla"]
    assert "us" not in xla
    assert "wrong" in xla
    assert "WRONG: decode_attention small_off xla" in capsys.readouterr().err


def test_one_that_fails_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(device_clock, "_SECONDS", 0.01)
    monkeypatch.setattr(kernels, "ceilings", lambda: device_clock.Ceilings(1e9, 1e12, 0, ""))

    def broken(arrays, options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(kernels, "CONTENDERS", {"kv_blocks": {"broken": broken}})
    file = tmp_path / "kernels.json"
    options = ["--op", "kv_blocks", "--spec", "base_full_blocks_8_gather", "--json", str(file)]
    assert kernels.main([*options, "--compare", "broken,xla"]) == 1
    (workload,) = json.loads(file.read_text())["operations"]["kv_blocks"].values()
    assert workload["by"]["broken"] == {"failed": "RuntimeError: out of memory"}
    assert workload["by"]["xla"]["us"] > 0
    assert workload["rotated_bytes"] == 2 * workload["bytes"]
    assert "FAILED: kv_blocks base_full_blocks_8_gather broken" in capsys.readouterr().err


def test_time_that_is_up_leaves_the_rest_unmeasured(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "ceilings", lambda: device_clock.Ceilings(1e9, 1e12, 0, ""))
    assert kernels.main(["--seconds", "-1", "--spec", "base_batch"]) == 0
    assert "no time for decode_attention base_batch_8_context_1k" in capsys.readouterr().err


def test_names_that_do_not_exist_are_refused(capsys):
    assert kernels.main(["--spec", "nowhere"]) == 2
    with pytest.raises(SystemExit) as left:
        kernels.main(["--compare", "xla,cublas"])
    assert left.value.code == 2
    assert "--compare: ['cublas'] are none of ['cudnn', 'mosaic', 'xla', " in capsys.readouterr().err


def test_moved_blocks_must_be_equal_to_the_bit():
    expected = np.ones(4, np.float32)
    found = kernels._measure_one(lambda _: [lambda: jnp.asarray([1, 1, 1, 1 + 2**-20])], [{}], expected, tolerance=0)
    assert "wrong" in found
    assert "us" not in found


def test_an_argument_written_in_place_is_handed_on():
    def add(*, x, by, implementation):
        return x + by

    spec = types.SimpleNamespace(options={})
    inputs = [{"x": jnp.full(2, start), "by": jnp.ones(2)} for start in (0.0, 10.0)]
    first, second = kernels.our_calls(Case(add, spec, ("xla",), donated="x"), "xla", inputs)
    assert [float(again()[0]) for again in (first, second, first, second)] == [1, 11, 2, 12]


def test_times_of_kernels_are_summed_by_call(monkeypatch):
    """What CUPTI lists, two kernels a call, is split again; a list that can't be is not used."""
    from jax.experimental.mosaic.gpu import profiler

    timings = [("a", 1.0), ("b", 2.0), ("a", 1.0), ("b", 4.0), ("a", 1.0), ("b", 3.0)]
    extension = types.SimpleNamespace(_cupti_init=lambda: None, _cupti_get_timings=lambda finalize: timings)
    monkeypatch.setattr(profiler, "mosaic_gpu_lib", types.SimpleNamespace(_mosaic_gpu_ext=extension))
    monkeypatch.setattr(device_clock.jax, "default_backend", lambda: "gpu")
    calls = [functools.partial(jnp.zeros, 1)] * 3
    assert device_clock._cupti(calls) == pytest.approx(4e-3)
    timings.pop()
    assert device_clock._cupti(calls) is None


def test_results_of_torch_are_waited_for(monkeypatch):
    waited = []
    cuda = types.SimpleNamespace(is_available=lambda: True, synchronize=lambda: waited.append(True))
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
    device_clock._wait(object())
    assert waited
