"""Batch jobs through a cascade of scripted tiers: rows with decisions, rows with errors, and the report."""

import json

import pytest
from fake_llm import FakeLLM

from jaxdual.cascade.serving.blocking import BlockingCascade
from jaxdual.offline import __main__ as command
from tests.cascade.serving.tiers import TierLLM, cascade_of

UNSURE = (0.9, 0.5)


class Job:
    """Runs a batch file through tiers that are made anew each time."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.scores = folder, UNSURE
        monkeypatch.setattr(command, "_cascade", self._make)

    def _make(self, path, config):
        self.small, self.large = TierLLM("small", self.scores), TierLLM("large")
        return BlockingCascade(cascade_of(self.small, self.large))

    def __call__(self, *bodies, further=(), url="/v1/completions"):
        lines = [
            {"custom_id": f"line-{number}", "method": "POST", "url": url, "body": {"max_tokens": 2} | body}
            for number, body in enumerate(bodies)
        ]
        source, content = self.folder / "in.jsonl", "".join(json.dumps(line) + "\n" for line in lines)
        if not source.exists() or source.read_text() != content:  # its time is in the rows
            source.write_text(content)
        files = ["-i", str(self.folder / "in.jsonl"), "-o", str(self.folder / "out.jsonl")]
        report = ["--report", str(self.folder / "report.json")]
        status = command.main([*files, *report, "--cascade", "some.toml", "--no-progress", *further])
        if status:
            return status
        rows = [json.loads(line) for line in (self.folder / "out.jsonl").read_text().splitlines()]
        return {row["custom_id"]: row for row in rows}

    def report(self):
        return json.loads((self.folder / "report.json").read_text())


@pytest.fixture
def job(tmp_path, monkeypatch):
    return Job(tmp_path, monkeypatch)


def test_each_row_has_its_decision_without_anything_that_varies(job):
    rows = job(*({"prompt": [5, 6, number + 7], "temperature": 0} for number in range(20)))
    assert len(rows) == 20
    body = rows["line-3"]["response"]["body"]
    assert body["model"] == "auto"
    assert body["cascade"] == {
        "tier": "large",
        "reason": "last",
        "p_ik": None,
        "p_t": None,
        "hops": [
            {"tier": "small", "outcome": "p_t", "p_ik": 0.9, "p_t": 0.5, "prompt_tokens": 3, "output_tokens": 1},
            {"tier": "large", "outcome": "answered", "p_ik": None, "p_t": None, "prompt_tokens": 3}
            | {"output_tokens": 2},
        ],
    }
    before = (job.folder / "out.jsonl").read_text()
    job(*({"prompt": [5, 6, number + 7], "temperature": 0} for number in range(20)), further=["--overwrite"])
    assert sorted((job.folder / "out.jsonl").read_text().splitlines()) == sorted(before.splitlines())


def test_a_job_goes_on_where_it_stopped(job):
    lines = [{"prompt": [5, 6, number + 7]} for number in range(4)]
    job(*lines)
    whole = (job.folder / "out.jsonl").read_text().splitlines(keepends=True)
    (job.folder / "out.jsonl").write_text("".join(whole[:2]))
    assert len(job(*lines)) == 4
    assert len(job.small.submitted) == 2
    assert sorted((job.folder / "out.jsonl").read_text().splitlines(keepends=True)) == sorted(whole)


def test_rows_of_another_cascade_are_not_gone_on_with(job, capsys, monkeypatch):
    job({"prompt": [5]})
    make = job._make

    def other(path, config):
        llm = make(path, config)
        job.large.system_fingerprint = "fp_other"
        return llm

    monkeypatch.setattr(command, "_cascade", other)
    assert job({"prompt": [5]}) == 2
    assert "has rows of model 'auto'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ({"prompt": [5], "n": 2}, "invalid_value", "n=2 must be 1 for 'auto'"),
        ({"prompt": [5], "cascade": {"hops": 1}}, "invalid_value", "unknown field 'hops'"),
        ({"prompt": [5], "cascade": {"letters": ["zebra fish", "b"]}}, "invalid_value", "is no single token"),
        ({"prompt": [5] * 600}, "invalid_value", "at most 511"),
        ({"prompt": [[5], [6] * 600]}, "invalid_value", "at most 511"),
        ({"prompt": [5], "model": "small"}, "model_not_found", "'auto' is served"),
    ],
)
def test_a_line_that_can_not_be_served_becomes_a_row_with_an_error(job, body, code, message):
    rows = job(body, {"prompt": [7]})
    assert rows["line-0"]["error"]["code"] == code
    assert message in rows["line-0"]["error"]["message"]
    assert rows["line-1"]["error"] is None


def test_options_reach_the_gates(job):
    rows = job({"prompt": [5], "cascade": {"max_hops": 0}}, {"prompt": [[5], [6]], "cascade": {"opening": "A"}})
    assert rows["line-0"]["response"]["body"]["cascade"]["reason"] == "max_hops"
    assert [one["tier"] for one in rows["line-1"]["response"]["body"]["cascade"]] == ["large", "large"]
    assert {gate.confidence.kind for gate in job.small.gates if gate} == {"opening"}


def test_what_a_line_leaves_open_is_each_model_s_own(job, monkeypatch):
    make = job._make

    def with_defaults(path, config):
        llm = make(path, config)
        job.small.defaults, job.large.defaults = {"top_k": 9}, {"top_k": 7}
        return llm

    monkeypatch.setattr(command, "_cascade", with_defaults)
    job({"prompt": [5]})
    assert [tier.params[0].top_k for tier in (job.small, job.large)] == [9, 7]


def test_a_tier_that_breaks_everywhere_is_told_as_such(job, monkeypatch):
    make = job._make

    def broken(path, config):
        llm = make(path, config)
        job.small.fails = job.large.fails = True
        return llm

    monkeypatch.setattr(command, "_cascade", broken)
    assert job({"prompt": [5]})["line-0"]["error"]["code"] == "engine_error"


def test_the_report_has_the_account_of_each_tier(job, capsys):
    job({"prompt": [5, 6, 7]}, {"prompt": [5, 6]}, {"prompt": [5], "cascade": {"max_hops": 0}})
    small, large = job.report()["tiers"]
    assert (small["name"], small["outcomes"], small["reasons"]) == ("small", {"p_t": 2, "answered": 1}, {"max_hops": 1})
    assert small["all_passes"]["flops"] == 2 * 100 * 6
    assert small["answering_pass"]["flops"] == 2 * 100 * 1
    assert large["all_passes"] == large["answering_pass"]
    assert (large["all_passes"]["prompt_tokens"], large["all_passes"]["output_tokens"]) == (5, 4)
    assert large["reasons"] == {"last": 2}
    assert (small["parameters"], small["layers"], small["tap"]) == (100, 4, 3)
    shown = capsys.readouterr().out
    assert "1 of 3 turns answered, 2 p_t" in shown


def test_engines_end_with_the_job(job):
    job({"prompt": [5]})
    assert job.small.drained == job.large.drained == ["shutdown"]


def test_engines_end_with_a_job_that_breaks_off(job, monkeypatch):
    def broken(*_):
        raise RuntimeError("the disk is full")

    monkeypatch.setattr("jaxdual.offline.output_file.OutputFile.append", broken)
    assert job(*({"prompt": [5 + number]} for number in range(9))) == 1
    assert job.small.drained == job.large.drained == ["shutdown"]


def test_a_cascade_does_not_go_with_a_replay(capsys):
    with pytest.raises(SystemExit):
        command.main(["--trace", "x", "--cascade", "y"])
    assert "--cascade is for a batch" in capsys.readouterr().err


def test_options_of_a_cascade_are_refused_for_one_model(job, monkeypatch):
    monkeypatch.setattr(command, "LLM", FakeLLM)
    (job.folder / "in.jsonl").write_text(
        json.dumps(
            {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a", "cascade": {}}}
        )
    )
    command.main(["-i", str(job.folder / "in.jsonl"), "-o", str(job.folder / "out.jsonl"), "--no-progress"])
    assert "no cascade" in json.loads((job.folder / "out.jsonl").read_text())["error"]["message"]
