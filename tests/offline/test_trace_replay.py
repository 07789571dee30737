"""Replays on an engine without a model, in virtual time: every time that is reported is computed here by hand."""

import asyncio
import dataclasses
import itertools
import json
import selectors
import signal
import types

import pytest

from jaxdual import CompletionOutput, EngineConfig, EngineDeadError, EngineStats, RequestMetrics, RequestOutput
from jaxdual.config import ClusterConfig
from jaxdual.offline import __main__ as command
from jaxdual.offline import replay_command
from jaxdual.offline.replay import Replay, check_lengths
from jaxdual.offline.replay_report import measures
from jaxdual.offline.trace import Session, TraceError, Turn, read_trace
from jaxdual.offline.trace_prompts import PromptTokens
from jaxdual.offline.trace_starts import poisson_starts, timestamp_starts
from jaxdual.request_stream import RequestStream

VOCAB = 1000


class Jumps(selectors.DefaultSelector):
    """Waits for nothing but the clock of its loop."""

    def __init__(self, loop):
        super().__init__()
        self.loop = loop

    def select(self, timeout=None):
        assert timeout is not None, "everything waits for something that nothing brings"
        self.loop.now += timeout
        return []


class VirtualTime(asyncio.SelectorEventLoop):
    """A loop whose clock jumps to the next timer instead of waiting for it."""

    def __init__(self):
        self.now = 64.0
        super().__init__(Jumps(self))

    def time(self):
        return self.now


class FakeAsyncLLM:
    """Serves all requests at once.

    A request waits `queue` seconds, takes `per_token` seconds for each prompt token that no earlier sequence began
    with, `handoff` to its second token and `step` to each further one. Output tokens are a function of the prompt.
    """

    queue, per_token, handoff, step = 0.25, 1 / 64, 0.5, 0.125
    served_model_name, max_model_len, restarts = "fake", 200, 0
    info = types.SimpleNamespace(device="cpu", vocab_size=VOCAB)

    def __init__(self, config=None, cluster=None, max_queued_requests=0):
        self.config, self.cluster, self.max_queued_requests = config or EngineConfig(), cluster, max_queued_requests
        self.sequences, self.prompts, self.params, self.users, self.aborted = [], {}, {}, {}, []
        self.broken, self.refused = {}, set()  # by request: output tokens before it breaks; refused at the door
        self.warm, self.tasks = False, set()

    @classmethod
    def from_config(cls, config, *, cluster, max_queued_requests):
        return cls(config, cluster, max_queued_requests)

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass

    async def warmed_up(self):
        self.warm = True

    async def stats(self):
        prompt_tokens = 1000 + sum(map(len, self.prompts.values()))  # it has served others before
        return EngineStats(prompt_tokens=prompt_tokens)

    async def submit(self, prompt, sampling_params, request_id, *, user):
        if request_id in self.refused:
            raise EngineDeadError("nobody is there")
        self.prompts[request_id], self.params[request_id] = prompt.tokens, sampling_params
        self.users[request_id] = user
        metrics = RequestMetrics(asyncio.get_running_loop().time())
        output = RequestOutput(request_id, None, prompt.tokens, [CompletionOutput(0)], metrics)
        stream = RequestStream(output, lambda stream: self.aborted.append(stream.output.request_id))
        task = asyncio.create_task(self.serve(stream, sampling_params.max_tokens))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return stream

    async def serve(self, stream, count):
        output, (completion,) = stream.output, stream.output.outputs
        tokens, metrics, time = output.prompt_token_ids, output.metrics, asyncio.get_running_loop().time
        output.num_cached_tokens = max((common(tokens, other) for other in self.sequences), default=0)
        await asyncio.sleep(self.queue)
        metrics.queue_seconds = self.queue
        await asyncio.sleep((len(tokens) - output.num_cached_tokens) * self.per_token)
        for number in range(count):
            if number:
                await asyncio.sleep(self.handoff if number == 1 else self.step)
            metrics.first_token_time = metrics.first_token_time or time()
            if number == self.broken.get(output.request_id):
                completion.finish_reason, completion.error = "error", "the engine fell over"
                break
            completion.token_ids.append(next_token(tokens, number))
            stream.wake()
        metrics.finished_time, output.finished = time(), True
        self.sequences.append([*tokens, *completion.token_ids])
        stream.wake()


def common(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def next_token(prompt, number):
    return (sum(prompt) + 7 * number) % VOCAB


def play(llm, sessions, starts=None, deadline=None, ended=None):
    """Replays in virtual time; returns the replay."""
    with asyncio.Runner(loop_factory=VirtualTime) as runner:
        starts = [0.0] * len(sessions) if starts is None else starts
        replay = Replay(llm, sessions, starts, PromptTokens(VOCAB, 0), [].append if ended is None else ended.append)
        runner.run(replay.run(deadline))
    return replay


TWO_TURNS = Session("a", (Turn(64, 5), Turn(32, 3, delay=1.0)))


def test_times_of_one_agent_are_those_of_its_tokens():
    llm, ended = FakeAsyncLLM(), []
    replay = play(llm, [TWO_TURNS], ended=ended)
    # First turn: 0.25 queue + 64 tokens = 1.25 s to the first token, then 0.5 + 3 * 0.125 for four more.
    # Second turn: 1 s later; 69 tokens are cached, 32 are not: 0.25 + 0.5 s, then 0.5 + 0.125 for two more.
    first, second = replay.agents[0].requests
    assert (first.ttft, first.ttst, first.tpot) == (1.25, 0.5, 0.875 / 4)
    assert (second.ttft, second.ttst, second.tpot) == (0.75, 0.5, 0.625 / 2)
    assert (second.prompt_tokens, second.cached_tokens, second.generated_tokens) == (101, 69, 3)
    assert replay.agents[0].jct == replay.seconds == 1.25 + 0.875 + 1.0 + 0.75 + 0.625
    assert ended == [first, second]

    report = measures(replay)
    assert report["jct_s"] == 4.5
    assert report["jct_agents_s"] == {"mean": 4.5, "p50": 4.5, "p90": 4.5, "p99": 4.5}
    assert report["ttft_s"] == pytest.approx({"mean": 1.0, "p50": 1.0, "p90": 1.2, "p99": 1.245})
    assert report["ttft_parts_s"]["queue"] == {"mean": 0.25, "p50": 0.25, "p90": 0.25, "p99": 0.25}
    assert report["ttft_parts_s"]["prefill"]["mean"] == (1.0 + 0.5) / 2
    assert [report["ttft_parts_s"][part] for part in ("allocation", "read")] == [None, None]
    assert report["ttst_s"]["mean"] == 0.5
    assert report["tpot_s"]["mean"] == (0.21875 + 0.3125) / 2
    assert report["tokens"] == {"prompt": 165, "cached": 69, "generation": 8}
    assert report["hit_rate"] == 69 / 165
    assert report["throughput"] == {
        "requests_per_s": 2 / 4.5,
        "prompt_tokens_per_s": 165 / 4.5,
        "generation_tokens_per_s": 8 / 4.5,
    }
    assert report["requests"] == {"planned": 2, "ok": 2, "failed": 0, "unfinished": 0, "not_sent": 0}
    assert report["errors"] == []


def test_next_prompt_has_the_tokens_that_the_model_gave():
    llm = FakeAsyncLLM()
    play(llm, [Session("a", (Turn(8, 4), Turn(6, 3), Turn(5, 2, drop=4)))])
    first, second, third = llm.prompts.values()
    output = [next_token(first, number) for number in range(4)]
    assert second[:12] == first + output
    assert (len(first), len(second), len(third)) == (8, 18, 22)
    # The context was the second prompt and its three tokens; the last four are not sent again.
    assert third[:17] == second[:17]
    assert third[17] != second[17]


def test_each_agent_is_a_user():
    llm = FakeAsyncLLM()
    play(llm, [TWO_TURNS, TWO_TURNS])
    assert llm.users == {f"agent-{agent}-turn-{turn}": f"agent-{agent}" for agent in (0, 1) for turn in (0, 1)}


def test_output_lengths_are_forced():
    llm = FakeAsyncLLM()
    play(llm, [TWO_TURNS])
    assert [(p.max_tokens, p.min_tokens) for p in llm.params.values()] == [(5, 5), (3, 3)]
    assert all(p.ignore_eos and p.temperature == 0 for p in llm.params.values())


def test_agents_run_beside_each_other_from_their_starts():
    sessions = [Session("a", (Turn(64, 1), Turn(64, 1))), Session("b", (Turn(64, 2),))]
    replay = play(FakeAsyncLLM(), sessions, starts=[0.0, 2.0])
    a, b = replay.agents
    assert (a.started, a.finished, a.jct) == (0.0, 2.5, 2.5)
    assert (b.started, b.finished, b.jct) == (2.0, 3.75, 1.75)
    assert (a.requests[0].ttst, a.requests[0].tpot, b.requests[0].tpot) == (None, None, 0.5)
    report = measures(replay)
    assert report["jct_s"] == replay.seconds == 3.75
    assert report["jct_agents_s"]["mean"] == (2.5 + 1.75) / 2
    assert [(one["session"], one["started_s"], one["jct_s"]) for one in report["agents"]] == [
        ("a", 0.0, 2.5),
        ("b", 2.0, 1.75),
    ]


def test_deadline_ends_what_is_under_way_and_tells_of_it():
    llm = FakeAsyncLLM()
    sessions = [TWO_TURNS, Session("b", (Turn(16, 1),)), Session("late", (Turn(16, 1),))]
    replay = play(llm, sessions, starts=[0.0, 0.0, 9.0], deadline=3.5)
    assert replay.seconds == 3.5
    assert llm.aborted == ["agent-0-turn-1"]
    report = measures(replay)
    assert report["requests"] == {"planned": 4, "ok": 2, "failed": 0, "unfinished": 1, "not_sent": 1}
    assert report["jct_s"] is None
    assert [one["jct_s"] for one in report["agents"]] == [None, 0.5, None]
    assert report["jct_agents_s"]["mean"] == 0.5
    assert report["tokens"] == {"prompt": 80, "cached": 0, "generation": 6}


def test_failed_request_ends_its_agent_only():
    llm = FakeAsyncLLM()
    llm.broken["agent-0-turn-0"] = 2
    llm.refused.add("agent-1-turn-1")
    replay = play(llm, [TWO_TURNS, dataclasses.replace(TWO_TURNS, session_id="b"), Session("c", (Turn(8, 1),))])
    report = measures(replay)
    assert report["errors"] == [
        {"session": "a", "turn": 0, "message": "the engine fell over"},
        {"session": "b", "turn": 1, "message": "nobody is there"},
    ]
    assert report["requests"] == {"planned": 5, "ok": 2, "failed": 2, "unfinished": 0, "not_sent": 1}
    assert [one["jct_s"] is None for one in report["agents"]] == [True, True, False]


def test_output_of_another_length_is_a_failure():
    llm = FakeAsyncLLM()
    submit = llm.submit
    llm.submit = lambda prompt, params, request_id, **options: submit(
        prompt, dataclasses.replace(params, max_tokens=4, min_tokens=0), request_id, **options
    )
    assert measures(play(llm, [TWO_TURNS]))["errors"] == [
        {"session": "a", "turn": 0, "message": "it gave 4 of 5 output tokens"}
    ]


def test_poisson_starts_have_the_rate_and_the_seed():
    starts = poisson_starts(4000, 2.0, seed=0)
    assert starts[0] == 0
    assert starts == sorted(starts)
    assert starts[-1] == pytest.approx(3999 / 2, rel=0.05)
    gaps = [b - a for a, b in itertools.pairwise(starts)]
    assert sum(gap > 0.5 for gap in gaps) / 3999 == pytest.approx(0.368, abs=0.03)
    assert poisson_starts(4000, 2.0, seed=0) == starts != poisson_starts(4000, 2.0, seed=1)
    assert poisson_starts(1, 2.0, seed=0) == [0.0]


def test_timestamps_give_starts_at_a_speed():
    sessions = [dataclasses.replace(TWO_TURNS, timestamp=time) for time in (30.0, 10.0, 50.0)]
    assert timestamp_starts(sessions, 4) == [5.0, 0.0, 10.0]
    with pytest.raises(TraceError, match="session 'a' has no timestamp"):
        timestamp_starts([*sessions, TWO_TURNS], 4)


def test_requests_longer_than_the_model_takes_are_refused_before_the_replay():
    check_lengths([TWO_TURNS], 104)
    message = (
        "turn 1 of session 'a' has 104 tokens of prompt and output, but max_model_len is 103; lengths 0.9903 times"
    )
    with pytest.raises(TraceError, match=message):
        check_lengths([TWO_TURNS, Session("b", (Turn(1, 1),))], 103)


# The command.


@pytest.fixture
def engines(monkeypatch):
    made = []

    class Quick(FakeAsyncLLM):
        queue, per_token, handoff, step = 0.0, 0.0, 0.0, 0.0

        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(replay_command, "AsyncLLM", Quick)
    return made


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.jsonl"
    turns = [{"append": 64, "generate": 5}, {"append": 32, "generate": 3}]
    path.write_text("".join(json.dumps({"session_id": i, "turns": turns}) + "\n" for i in range(3)))
    return path


def test_command_writes_its_report_and_a_table(trace, engines, tmp_path, capsys):
    report = tmp_path / "report.json"
    arguments = ["--trace", str(trace), "--report", str(report), "--no-progress", "--kv-secret", "0123456789abcdef"]
    assert command.main([*arguments, "--prefill", "2", "--decode", "1"]) == 0
    (llm,) = engines
    assert llm.cluster == ClusterConfig(prefill=2, decode=1)
    assert llm.max_queued_requests == 3
    found = json.loads(report.read_text())
    assert found["requests"]["ok"] == 6
    assert found["trace"]["source"] == str(trace)
    assert found["engine"]["difference"]["prompt_tokens"] == 3 * (64 + 101)
    assert found["engine"]["restarts"] == 0
    assert "0123456789abcdef" not in report.read_text()
    printed = capsys.readouterr().out
    assert "6 of 6 ok, 0 failed, 0 unfinished, 0 not sent" in printed
    assert "fake on cpu, 2 prefill and 1 decode engines" in printed
    assert not llm.warm


def test_command_makes_the_trace_smaller_in_the_order_that_it_says(engines):
    arguments = ["--trace", "32k", "--agents", "502", "--turns-limit", "2", "--length-scale", "0.01"]
    assert command.main([*arguments, "--generation-scale", "2", "--limit", "510", "--warmup", "--no-progress"]) == 0
    (llm,) = engines
    assert llm.warm
    assert len(llm.prompts) == 510
    assert sum(name.endswith("turn-1") for name in llm.prompts) == 8
    # First prompts of about 59 tokens, those of synthetic rounds have one; forced outputs of about 3.
    assert [len(llm.prompts[f"agent-{i}-turn-0"]) for i in (0, 501)] == [59, 1]
    assert llm.params["agent-501-turn-0"].max_tokens == 1
    generated = [params.max_tokens for name, params in llm.params.items() if name.endswith("turn-0")][:500]
    assert sum(generated) / 500 == pytest.approx(2 * 1.48, rel=0.1)


def test_command_writes_a_generated_trace_and_runs_nothing(trace, engines, tmp_path, capsys):
    written = tmp_path / "written.jsonl"
    arguments = ["--trace", "32k", "--agents", "2", "--turns-limit", "3", "--length-scale", "0.01"]
    assert command.main([*arguments, "--write-trace", str(written)]) == 0
    assert not engines
    assert command.main([*arguments, "--no-progress"]) == 0
    assert command.main(["--trace", str(written), "--no-progress"]) == 0
    assert [len(session.turns) for session in read_trace(written)] == [3, 3]
    assert engines[0].prompts == engines[1].prompts
    assert command.main(["--trace", str(trace), "--write-trace", str(written)]) == 2
    assert "--write-trace takes one of the traces 32k, 48k, 64k, not a file" in capsys.readouterr().err


def test_command_ends_with_1_if_something_was_not_served(trace, engines, monkeypatch, tmp_path, capsys):
    class Refuses(FakeAsyncLLM):
        async def submit(self, *_, **options):
            raise EngineDeadError("nobody is there")

    monkeypatch.setattr(replay_command, "AsyncLLM", Refuses)
    report = tmp_path / "report.json"
    assert command.main(["--trace", str(trace), "--no-progress", "--report", str(report)]) == 1
    assert len(json.loads(report.read_text())["errors"]) == 3
    assert "0, turn 0: nobody is there" in capsys.readouterr().out

    class Dead(FakeAsyncLLM):
        async def __aenter__(self):
            raise EngineDeadError("it never started")

    monkeypatch.setattr(replay_command, "AsyncLLM", Dead)
    assert command.main(["--trace", str(trace), "--no-progress"]) == 1
    assert "the replay broke off: it never started" in capsys.readouterr().err


def test_deadline_and_interrupt_end_the_command(trace, engines, monkeypatch, capsys):
    monkeypatch.setattr(replay_command.AsyncLLM, "queue", 3600.0)
    assert command.main(["--trace", str(trace), "--no-progress", "--deadline", "0.05"]) == 1
    assert "0 of 6 ok, 0 failed, 3 unfinished, 3 not sent" in capsys.readouterr().out

    async def interrupted(self, *arguments, **options):
        signal.raise_signal(signal.SIGINT)
        await asyncio.sleep(3600)

    monkeypatch.setattr(replay_command.AsyncLLM, "submit", interrupted)
    # Tests that run in the background of a shell would ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert command.main(["--trace", str(trace), "--no-progress"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "stopped" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trace", "{trace}", "-i", "x"], "-i/--input-file is for a batch, and does not go with --trace"),
        (["--trace", "{trace}", "-o", "x"], "-o/--output-file is for a batch"),
        (["--trace", "{trace}", "--overwrite"], "--overwrite is for a batch"),
        (["-i", "a", "-o", "b", "--agents", "3"], "--agents is for a replay: it needs --trace"),
        (["-i", "a", "-o", "b", "--prefill", "1"], "--prefill is for a replay: it needs --trace"),
        (["--speed", "3"], "--speed is for a replay: it needs --trace"),
        (["-i", "a"], "the following arguments are required: -o/--output-file (or --trace)"),
        (["--trace", "{trace}", "--start", "together", "--speed", "2"], "not allowed with argument --start"),
        (["--trace", "{trace}", "--agents", "0"], "argument --agents: '0' must be a whole number of at least 1"),
        (["--trace", "{trace}", "--length-scale", "nan"], "argument --length-scale: 'nan' must be a number above 0"),
        (["--trace", "{trace}", "--speed", "2"], "session '0' has no timestamp to start it by"),
        (["--trace", "nowhere.jsonl"], "nowhere.jsonl: cannot be read: No such file or directory"),
        (
            ["--trace", "{trace}", "--length-scale", "9"],
            "has 936 tokens of prompt and output, but max_model_len is 200",
        ),
        (["--trace", "{trace}", "--report", "{trace}"], "trace and report must be different files"),
        (["--trace", "{trace}", "--report", "/"], "/: is a directory"),
        (["--trace", "{trace}", "--prefill", "1"], "prefill=1 and decode=0 must both be at least 1, or both 0"),
    ],
)
def test_calls_that_cannot_work_exit_with_2_and_one_message(arguments, message, trace, engines, capsys):
    try:
        status = command.main([argument.format(trace=trace) for argument in arguments])
    except SystemExit as error:  # argparse's own way out
        status = error.code
    assert status == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
