import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_llm import FakeLLM

from jaxdual.config import EngineConfig
from jaxdual.offline import __main__ as command
from jaxdual.offline import report
from jaxdual.offline.batch_file import read_batch
from jaxdual.offline.output_file import OutputFile
from jaxdual.offline.runner import BatchRunner
from jaxdual.tokenizer import Tokenizer

HERE = Path(__file__).parent
USER = {"role": "user", "content": "Hello"}


def completion(custom_id, **body):
    return {"custom_id": custom_id, "url": "/v1/completions", "body": {"prompt": f"def {custom_id}", **body}}


def chat(custom_id, **body):
    return {"custom_id": custom_id, "url": "/v1/chat/completions", "body": {"messages": [USER], **body}}


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def by_id(path):
    rows = rows_of(path)
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["custom_id"]: row for row in rows}


@pytest.fixture
def engines(monkeypatch):
    """The fake engines that the command made."""
    made = []

    class Recorded(FakeLLM):
        def __init__(self, config):
            super().__init__(config)
            made.append(self)

    monkeypatch.setattr(command, "LLM", Recorded)
    return made


@pytest.fixture
def job(tmp_path, engines):
    """Runs the command on lines written to a file; returns the exit status."""

    def run(*lines, options=()):
        source = tmp_path / "in.jsonl"
        content = "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines)
        if not source.exists() or source.read_text() != content:
            source.write_text(content)
        return command.main(["-i", str(source), "-o", str(tmp_path / "out.jsonl"), *BASE, *options])

    return run


BASE = ["--no-progress", "--max-num-seqs", "4", "--served-model-name", "fake"]


def test_every_request_gets_an_openai_response(job, tmp_path):
    lines = [
        chat("c", max_tokens=5, logprobs=True, top_logprobs=1),
        completion("two", prompt=[[5, 6], [7]], n=2, max_tokens=3, logprobs=2, temperature=0),
        completion("echo", echo=True, max_tokens=0),
    ]
    assert job(*lines) == 0
    rows = by_id(tmp_path / "out.jsonl")
    assert set(rows) == {"c", "two", "echo"}
    for row in rows.values():
        assert row["error"] is None
        assert row["response"]["status_code"] == 200
        assert row["response"]["body"]["model"] == "fake"
        assert row["response"]["body"]["created"] == int((tmp_path / "in.jsonl").stat().st_mtime)

    body = rows["c"]["response"]["body"]
    assert (body["object"], body["id"][:9]) == ("chat.completion", "chatcmpl-")
    (choice,) = body["choices"]
    assert choice["message"]["role"] == "assistant"
    tokenizer = Tokenizer.from_dir(HERE.parent / "fixtures" / "tokenizer")
    prompt = tokenizer.apply_chat_template([USER], tokenize=True)
    generated = len(choice["logprobs"]["content"])
    assert body["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": generated,
        "total_tokens": len(prompt) + generated,
    }
    joined = b"".join(bytes(token["bytes"]) for token in choice["logprobs"]["content"])
    assert joined.decode(errors="replace") == choice["message"]["content"]
    assert [len(token["top_logprobs"]) for token in choice["logprobs"]["content"]] == [1] * generated

    body = rows["two"]["response"]["body"]
    assert (body["object"], [c["index"] for c in body["choices"]]) == ("text_completion", [0, 1, 2, 3])
    assert {len(c["logprobs"]["tokens"]) for c in body["choices"]} <= {1, 2, 3}

    body = rows["echo"]["response"]["body"]
    assert body["choices"][0]["text"] == "def echo"
    assert body["usage"]["completion_tokens"] == 0


def test_bad_lines_become_error_rows_and_stop_nothing(job, engines, tmp_path, capsys):
    lines = [
        completion("good"),
        "{not json",
        completion("good"),
        completion("hot", temperature=9),
        completion("long", prompt=[1] * 501),
        completion("half", prompt=[[1], [1] * 501]),
        completion("other", model="gpt-4"),
        completion("named", model="fake"),
        chat("robot", messages=[{"role": "tool", "content": "x"}]),
        chat("streamed", stream=True),
    ]
    assert job(*lines) == 0
    rows = rows_of(tmp_path / "out.jsonl")
    assert len(rows) == len(lines)
    errors = {row["error"]["line"]: row for row in rows if row["error"]}
    assert {row["custom_id"] for row in rows if not row["error"]} == {"good", "named"}
    assert {line: row["custom_id"] for line, row in errors.items()} == {
        2: None,
        3: None,
        4: "hot",
        5: "long",
        6: "half",
        7: "other",
        9: "robot",
        10: "streamed",
    }
    assert all(row["response"] is None for row in errors.values())
    assert all(row["error"]["message"].startswith(f"line {line}: ") for line, row in errors.items())
    assert errors[4]["error"]["param"] == "temperature"
    assert errors[7]["error"]["code"] == "model_not_found"
    assert "'gpt-4'" in errors[7]["error"]["message"]
    assert "'fake'" in errors[7]["error"]["message"]
    assert "unexpected role: tool" in errors[9]["error"]["message"]
    assert "10 rows" in capsys.readouterr().err
    # The good half of the request whose other prompt was too long does not run.
    assert engines[0].aborted == ["6-0"]


def test_unseeded_sampling_gets_a_seed_of_its_own_that_stays(job, engines, tmp_path):
    lines = [completion("a"), completion("b"), completion("c", temperature=0), completion("d", seed=5)]
    assert job(*lines) == 0
    assert job(*lines, options=["--overwrite"]) == 0
    first, second = engines[0].seeds, engines[1].seeds
    assert first == second
    assert first["1-0"] != first["2-0"]
    assert (first["3-0"], first["4-0"]) == (None, 5)
    assert by_id(tmp_path / "out.jsonl")["a"]["jaxdual"] == {"line": 1, "seed": first["1-0"]}


def test_the_user_of_a_line_goes_with_each_of_its_prompts(job, engines, tmp_path):
    lines = [
        completion("a"),
        completion("b", prompt=["x", "y"], user="ann"),
        chat("c", prompt_cache_key="k", max_tokens=3),
    ]
    assert job(*lines, completion("d", user="x" * 513)) == 0
    (engine,) = engines
    assert engine.users == {"1-0": None, "2-0": "ann", "2-1": "ann", "3-0": "k"}
    error = by_id(tmp_path / "out.jsonl")["d"]["error"]
    assert (error["code"], error["param"]) == ("invalid_value", "user")
    assert "line 4: user has 513 characters; at most 512" in error["message"]


def test_started_again_only_the_missing_requests_run(job, engines, tmp_path):
    lines = [completion(name, max_tokens=4) for name in "abcdef"] + ["{bad"]
    assert job(*lines) == 0
    out = tmp_path / "out.jsonl"
    whole = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(whole[:3]) + whole[3][:50])
    assert job(*lines) == 0
    assert sorted(out.read_bytes().splitlines(keepends=True)) == sorted(whole)
    assert len(engines[1].seeds) == 6 - sum(b'"error": null' in row for row in whole[:3])
    assert job(*lines) == 0
    assert engines[2].seeds == {}


def test_killed_at_any_moment_the_output_is_that_of_an_uninterrupted_run(job, tmp_path):
    lines = [completion(f"r{i}", max_tokens=6, n=1 + i % 2) for i in range(30)] + ["{bad", completion("r3")]
    assert job(*lines) == 0
    deaths = [(1, 0.0), (4, 0.5), (9, 0.99), (5, 1.0), (3, 0.01)]
    arguments = ["-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "killed.jsonl"), *BASE]
    command_line = [sys.executable, str(HERE / "job_that_dies.py"), json.dumps(deaths), *arguments]
    ran = subprocess.run(command_line, capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(ran.stdout) == [-9] * 5 + [0]
    whole, killed = (sorted((tmp_path / name).read_bytes().splitlines()) for name in ("out.jsonl", "killed.jsonl"))
    assert killed == whole
    custom_ids = [row["custom_id"] for row in rows_of(tmp_path / "killed.jsonl") if row["custom_id"]]
    assert sorted(custom_ids) == sorted(f"r{i}" for i in range(30))


def test_output_of_another_batch_is_refused(job, tmp_path, capsys):
    assert job(completion("a"), completion("b")) == 0
    before = (tmp_path / "out.jsonl").read_bytes()
    for lines in ([completion("a")], [completion("a"), completion("b", max_tokens=3)]):
        assert job(*lines) == 2
        assert "belongs to another batch" in capsys.readouterr().err
    assert job(completion("a"), completion("b"), options=["--served-model-name", "big"]) == 2
    assert "rows of model 'fake' (fp_fake), not of 'big'" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert job(completion("c"), options=["--overwrite"]) == 0
    assert set(by_id(tmp_path / "out.jsonl")) == {"c"}


def test_window_keeps_the_engine_full_and_bounded(tmp_path):
    llm = FakeLLM(EngineConfig(max_num_seqs=4))
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(completion(f"r{i}", max_tokens=5)) + "\n" for i in range(100)))
    with OutputFile(tmp_path / "out.jsonl") as output:
        BatchRunner(llm, output, created=0).run(read_batch(source))
    assert llm.most_unfinished == 16
    # Only the last requests leave places empty.
    assert llm.idle_slot_steps <= 4 * 5


def test_rows_are_written_as_requests_finish(tmp_path):
    llm = FakeLLM(EngineConfig(max_num_seqs=2))
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(completion(f"r{i}", max_tokens=5)) + "\n" for i in range(20)))
    seen = []

    def record(totals):
        seen.append((totals.ok, len(out.read_bytes().splitlines())))

    with OutputFile(out) as output:
        BatchRunner(llm, output, created=0, on_progress=record).run(read_batch(source))
    assert all(ok == written for ok, written in seen)
    assert len({ok for ok, _ in seen}) > 5


def test_failed_generation_is_an_error_row(job, engines, tmp_path, monkeypatch):
    def broken(self, request_id, ids, *rest):
        result = output(self, request_id, ids, *rest)
        if request_id == "1-0":
            result.outputs[0].finish_reason = "error"
            result.outputs[0].error = "a page was lost"
        return result

    output = FakeLLM.output
    monkeypatch.setattr(FakeLLM, "output", broken)
    assert job(completion("a", prompt=["x", "y"], max_tokens=1), completion("b", max_tokens=1)) == 0
    rows = by_id(tmp_path / "out.jsonl")
    assert rows["a"]["error"]["code"] == "engine_error"
    assert rows["a"]["error"]["message"] == "line 1: generation broke off: a page was lost"
    assert rows["b"]["error"] is None


def test_broken_engine_ends_the_run_with_a_message(job, monkeypatch, capsys):
    def step(self):
        raise RuntimeError("device lost")

    monkeypatch.setattr(FakeLLM, "step", step)
    assert job(completion("a")) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("the run broke off: device lost; the same command")


def test_interrupt_tells_how_to_go_on(job, monkeypatch, capsys):
    def step(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeLLM, "step", step)
    assert job(completion("a")) == 130
    assert "the same command continues" in capsys.readouterr().err


def test_report_has_counts_times_and_settings(job, tmp_path, capsys):
    path = tmp_path / "reports" / "report.json"
    lines = [completion("a", max_tokens=4), completion("b", max_tokens=4), "{bad"]
    assert job(*lines, options=["--report", str(path)]) == 0
    found = json.loads(path.read_text())
    usage = [row["response"]["body"]["usage"] for row in rows_of(tmp_path / "out.jsonl") if row["response"]]
    assert found["requests"] == {"ok": 2, "failed": 1, "skipped": 0}
    assert found["tokens"]["completion"] == sum(u["completion_tokens"] for u in usage)
    assert found["tokens"]["prompt"] == sum(u["prompt_tokens"] for u in usage)
    assert set(found["ttft_s"]) == set(found["latency_s"]) == {"mean", "p50", "p95", "p99"}
    assert found["engine"]["max_num_seqs"] == 4
    assert found["prefix_cache"]["hit_rate"] == 0
    assert {"python", "jax", "jaxdual"} <= set(found["versions"])
    shown = capsys.readouterr().out
    assert "2 ok, 1 failed, 0 done before" in shown

    assert job(*lines, options=["--report", str(path)]) == 0
    again = json.loads(path.read_text())
    assert again["requests"] == {"ok": 0, "failed": 0, "skipped": 3}
    assert again["ttft_s"] is None


def test_report_that_cannot_be_written_is_told_before_the_work(job, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert job(completion("a"), options=["--report", str(tmp_path / "file" / "report.json")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m jaxdual.offline: error: ")
    assert str(tmp_path / "file") in error
    assert not (tmp_path / "out.jsonl").exists()


def test_a_job_that_goes_on_keeps_the_time_of_its_first_part(job, tmp_path):
    assert job(completion("a"), completion("b")) == 0
    whole = rows_of(tmp_path / "out.jsonl")
    (tmp_path / "out.jsonl").write_text(json.dumps(whole[0]) + "\n")
    os.utime(tmp_path / "in.jsonl", (1, 1))
    assert job(completion("a"), completion("b")) == 0
    assert rows_of(tmp_path / "out.jsonl") == whole


def test_rows_of_other_weights_under_the_same_name_are_not_continued(job, tmp_path, capsys, monkeypatch):
    assert job(completion("a"), completion("b")) == 0
    first = (tmp_path / "out.jsonl").read_text().splitlines(keepends=True)[0]
    (tmp_path / "out.jsonl").write_text(first)
    monkeypatch.setattr(FakeLLM, "system_fingerprint", "fp_other")
    assert job(completion("a"), completion("b")) == 2
    assert "(fp_fake), not of 'fake' (fp_other)" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_text() == first


def test_the_last_line_counts_errors_of_earlier_runs_too(job, capsys):
    lines = [completion("a"), completion("b", temperature="warm")]
    for _ in range(2):
        assert job(*lines) == 0
        assert "2 rows in" in (error := capsys.readouterr().err)
        assert "1 with an error" in error


def test_summary_percentiles():
    values = [float(v) for v in range(1, 101)]
    assert report.summary(values) == {
        "mean": 50.5,
        "p50": 50.5,
        "p95": pytest.approx(95.05),
        "p99": pytest.approx(99.01),
    }


def test_show_prints_prompts_and_completions_in_the_order_of_the_input(job, tmp_path, capsys):
    lines = [completion("long", max_tokens=9), completion("short", max_tokens=1), chat("talk", max_tokens=2), "{bad"]
    assert job(*lines, options=["--show"]) == 0
    shown = capsys.readouterr().out
    assert (tmp_path / "out.jsonl").read_text().index("short") < (tmp_path / "out.jsonl").read_text().index("long")
    order = [
        "--- long",
        "def long",
        "--- short",
        "def short",
        "--- talk",
        "user: Hello",
        "--- line 4: error",
        "throughput",
    ]
    assert [shown.index(text) for text in order] == sorted(shown.index(text) for text in order)


def test_warmup_comes_on_request(job, engines):
    assert job(completion("a")) == 0
    assert job(completion("a"), options=["--warmup"]) == 0
    assert [engine.warm for engine in engines] == [False, True]


def test_empty_batch_is_no_error(job, tmp_path):
    assert job() == 0
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_progress_bar_shows_rate_and_time_left(job, capsys, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(completion("a")) + "\n")
    assert command.main(["-i", str(source), "-o", str(tmp_path / "out.jsonl")]) == 0
    assert "1/1 requests" in (error := capsys.readouterr().err)
    assert "tokens/s" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-i", "-", "-o", "out"], "standard input and output are not supported"),
        (["-i", "missing.jsonl", "-o", "out"], "missing.jsonl: no such file"),
        (["-i", ".", "-o", "out"], "not a regular file"),
        (["-i", "in.jsonl", "-o", "in.jsonl"], "must be different files"),
        (["-i", "in.jsonl", "-o", "out", "--report", "out"], "must be different files"),
        (["-i", "in.jsonl", "-o", "out", "--report", "."], "is a directory"),
        (["-i", "in.jsonl", "-o", "."], "not a regular file"),
        (["-i", "in.jsonl", "-o", "out", "--max-num-seqs", "many"], "max_num_seqs='many'"),
        (["-i", "in.jsonl", "-o", "out", "--config", "none.toml"], "none.toml"),
        (["-o", "out"], "-i/--input-file"),
        (["-i", "in.jsonl", "-o", "out", "--nonsense"], "--nonsense"),
    ],
)
def test_calls_that_cannot_work_exit_with_2_and_one_message(arguments, message, engines, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_text(json.dumps(completion("a")) + "\n")
    try:
        status = command.main(arguments)
    except SystemExit as error:  # argparse's own way out
        status = error.code
    assert status == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert engines == []


def test_unusable_model_exits_with_2(tmp_path, monkeypatch, capsys):
    class Broken:
        @classmethod
        def from_config(cls, config):
            raise ValueError("/models/x: config.json: no such file")

    monkeypatch.setattr(command, "LLM", Broken)
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(completion("a")) + "\n")
    assert command.main(["-i", str(source), "-o", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "python -m jaxdual.offline: error: /models/x: config.json: no such file\n"
