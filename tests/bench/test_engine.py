"""`python -m bench.engine` on a tiny model, and the split of a step's time."""

import json
import os
import time
from pathlib import Path

import jax
import pytest

from bench import engine as bench_engine
from bench import hf_environment
from bench.engine_worker import Ours
from bench.startup import measure_startup
from bench.step_clock import StepClock
from jaxdual import LLM, SamplingParams

TINY = str(Path(__file__).parents[1] / "fixtures" / "hf" / "qwen3")


@pytest.fixture(scope="module")
def llm():
    return LLM(TINY, max_num_seqs=4, max_model_len=128, max_num_batched_tokens=64)


def decode(llm, tokens=8):
    llm.submit({"prompt_token_ids": [1, 2, 3]}, SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True))
    while llm.has_unfinished:
        yield


def test_clock_counts_each_program_and_leaves_the_engine_as_it_was(llm):
    programs = dict(vars(llm._engine.runner.device.programs))
    with StepClock(llm, blocking=True) as clock:
        for _ in decode(llm):
            clock.step()
    report = clock.report()
    # One prefill and seven decode steps, each with its own sampling; the step that only fetches is not counted.
    assert report["steps"] == 8
    assert {name: round(one["calls_per_step"] * 8) for name, one in report["programs"].items()} == {
        "prefill": 1,
        "decode": 7,
        "sample": 8,
    }
    assert vars(llm._engine.runner.device.programs) == programs
    assert "fetch" not in vars(llm._engine.runner)


def test_clock_keeps_time_of_programs_and_of_waiting_apart_from_the_loop_s(llm, monkeypatch):
    def busy(seconds):
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass

    for _ in decode(llm):
        llm.step()  # compiles
    runner, scheduler = llm._engine.runner, llm._engine.ranks[0].scheduler
    program, plan, block = runner.device.programs.decode, scheduler.plan, jax.block_until_ready

    class Slow:
        lower = None

        def __call__(self, *args):
            busy(0.02)
            return program(*args)

    monkeypatch.setattr(runner.device.programs, "decode", Slow())
    monkeypatch.setattr(scheduler, "plan", lambda now: (busy(0.005), plan(now))[1])
    monkeypatch.setattr(jax, "block_until_ready", lambda value: (time.sleep(0.01), block(value))[1])
    with StepClock(llm, blocking=False) as clock:
        for _ in decode(llm, tokens=12):
            clock.step()
    report = clock.report()
    assert 5 <= report["loop_cpu_ms"] < 15
    assert report["programs"]["decode"]["call_cpu_ms"] >= 20
    assert report["wait_wall_ms"] >= 9
    assert report["wait_cpu_ms"] < 9
    assert report["step_wall_ms"] >= 35


def test_worker_measures_steady_steps_and_checks_lengths():
    ours = Ours()
    with pytest.raises(RuntimeError, match="no model"):
        ours.generate([[1]], 4)
    ours.load(TINY, {"max_num_seqs": 2, "max_model_len": 128, "max_num_batched_tokens": 64})
    answer = ours.generate([[1, 2], [3, 4]], 6)
    assert 3 <= len(answer["steady_steps"]) <= 5
    assert sum(answer["steady_steps"]) < answer["seconds"]
    items = [{"arrival": 0.0, "prompt": [1], "output": 3}, {"arrival": 0.2, "prompt": [2], "output": 5}]
    answer = ours.mixed(items)
    assert answer["seconds"] >= 0.2
    assert [0 < first <= last for first, last in zip(answer["ttft"], answer["latencies"], strict=True)] == [True, True]
    with pytest.raises(RuntimeError, match="were wanted"):
        ours.generate([[1] * 124], 8)  # the context holds four more tokens


@pytest.mark.slow
def test_command_writes_every_figure(tmp_path, capsys):
    arguments = f"--model {TINY} --no-hf --batches 1,2 --cores 1 --output-tokens 8 --repeats 2 --no-startup"
    assert bench_engine.main([*arguments.split(), "--json", str(tmp_path / "out" / "engine.json")]) == 0
    results = json.loads((tmp_path / "out" / "engine.json").read_text())
    assert results["hf"] == {"skipped": "--no-hf"}
    assert results["machine"]["cores"] == sorted(os.sched_getaffinity(0))
    one = results["cores"]["1"]
    assert set(one["batches"]) == {"1", "2"}
    (side,) = one["batches"]["2"]["sides"]
    assert len(side["seconds"]["all_tokens"]) == 2
    assert side["decode_tokens_per_second"]["best"] > 0
    assert one["batches"]["2"]["ratio"] is None
    assert [row["batch"] for row in one["steps"]] == [1, 2]
    printed = capsys.readouterr().out
    assert "decode batch 2" in printed
    assert "the mixed load, which needs 768, is left out" in printed


@pytest.mark.slow
def test_start_up_compiles_with_an_empty_cache_and_reads_a_full_one():
    settings = {"max_num_seqs": 2, "max_model_len": 128, "max_num_batched_tokens": 64}
    results = measure_startup(TINY, None, sorted(os.sched_getaffinity(0)), settings)
    cold, warm = results["empty_cache"], results["warm_cache"]
    assert 0 < cold["process_to_loaded"] < cold["process_to_first_token"] < cold["process_to_all_shapes"]
    assert warm["process_to_all_shapes"] < cold["process_to_all_shapes"]
    assert set(cold["shapes"]) == set(warm["shapes"])


def test_missing_python_leaves_the_reference_out(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_environment, "_candidates", lambda: iter(["/nowhere/python3.11"]))
    with pytest.raises(hf_environment.EnvironmentUnavailableError, match=r"no Python 3.11"):
        hf_environment.ensure(tmp_path / "hf", print)


@pytest.mark.parametrize("arguments", [["--repeats", "0"], ["--batches", "0"], ["--output-tokens", "1"]])
def test_wrong_arguments_are_refused(arguments):
    with pytest.raises(SystemExit):
        bench_engine.main(arguments)
