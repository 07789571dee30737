"""The whole program, `python -m server`, as its users have it: stock clients, signals, and what goes wrong."""

import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub

from jaxdual import LLM, SamplingParams
from jaxdual.model_folder import shipped_model
from server.proto.jaxdual.v1 import inference_pb2 as pb
from server.proto.jaxdual.v1.inference_pb2_grpc import InferenceStub
from tests.server import malformed
from tests.server.program import ROOT, ClientProcess, Program, environment, until

pytestmark = pytest.mark.slow

MODEL = shipped_model("small")
ENGINE = ("--model", MODEL, "--max-num-seqs", 8, "--max-model-len", 512)
TINY = ROOT / "tests" / "fixtures" / "hf" / "qwen3"
TOKENS = 16
LONG = 400  # tokens; seconds of work for an engine with a few such requests
WORDS = (
    *("self", "path", "value", "name", "line", "file", "error", "index", "count", "data", "result", "size", "key"),
    *("item", "text", "node", "code", "time", "type", "list", "match", "group", "parent", "buffer", "start", "end"),
)
SERVICES = {
    "jaxdual.v1.Inference",
    "inference.GRPCInferenceService",
    "grpc.health.v1.Health",
    "grpc.reflection.v1alpha.ServerReflection",
}


def prompts(count):
    """Beginnings of Python source, all different."""
    rng = random.Random(7)
    found = {}
    while len(found) < count:
        a, b, c, d, e = rng.sample(WORDS, 5)
        forms = (
            f"def {a}_{b}({c}, {d}):\n    ",
            f"class {a.title()}{b.title()}:\n    def {c}(self, {d}):\n        ",
            f"    if {a}.{b} is not {c}:\n        raise ",
            f"    for {a} in {b}.{c}({d}):\n        {e}.",
            f"import {a}\n\n{b} = {c}.{d}(",
            f'    """Return the {a} of the {b} {c}',
        )
        found[rng.choice(forms)] = None
    return list(found)


PROMPTS = prompts(200)


def requests(some, max_tokens):
    """One for each prompt, every other one streamed."""
    return [{"prompt": prompt, "max_tokens": max_tokens, "stream": i % 2 == 0} for i, prompt in enumerate(some)]


@contextlib.contextmanager
def both_clients(program):
    """The two stock clients, each in a process of its own."""
    with ClientProcess("openai_client", program.url) as one, ClientProcess("triton_client", program.grpc) as other:
        yield one, other


@contextlib.contextmanager
def grpc_channel(program):
    with grpc.insecure_channel(program.grpc) as channel:
        yield channel


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    with Program(tmp_path_factory.mktemp("program"), *ENGINE) as running:
        running.wait_until_serving()
        yield running
        assert len(running.engines()) == 1
        logged = len(running.log())
        running.process.terminate()
        assert running.process.wait(30) == 0, running.log()
        assert "Traceback" not in running.log()[logged:]


@pytest.fixture(scope="module")
def expected():
    """Outputs of `PROMPTS`, with the two likeliest tokens at each place."""
    llm = LLM(MODEL, max_num_seqs=8, max_model_len=512)
    params = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True, logprobs=2)
    return llm.generate(PROMPTS, params)


@pytest.fixture(scope="module")
def conversation(program):
    """200 requests at once: their outcomes, the most that were under way, and the metrics before and after."""
    before, most = program.metrics(), 0
    with both_clients(program) as (openai_client, triton_client):
        openai_client.send(requests(PROMPTS[:100], TOKENS))
        triton_client.send(requests(PROMPTS[100:], TOKENS))
        finished = before.get("request_success_total{length}", 0) + 200

        def all_finished():
            nonlocal most
            metrics = program.metrics()
            most = max(most, metrics["num_requests_running"] + metrics["num_requests_waiting"])
            return metrics.get("request_success_total{length}", 0) == finished

        until(all_finished, "200 answers")
        outcomes = openai_client.outcomes() + triton_client.outcomes()
    until(program.is_idle, "the engine to be idle", 10)
    assert "Traceback" not in program.log()
    return outcomes, most, before, program.metrics()


def is_tie(output, text):
    """Whether `text` leaves an expected output at a place where two tokens are equally likely but for the last bits."""
    completion = output.outputs[0]
    so_far = ""
    for scores in completion.logprobs:
        best, second = sorted(scores.values(), key=lambda score: -score.logprob)[:2]
        so_far += best.decoded_token
        if not text.startswith(so_far):
            return best.logprob - second.logprob <= 1e-3
    return False


def check_whole(outcomes, count):
    """Every request has its whole answer."""
    assert [outcome.get("error") for outcome in outcomes] == [None] * len(outcomes)
    assert {(outcome["tokens"], outcome["finish_reason"]) for outcome in outcomes} == {(count, "length")}


def test_two_hundred_requests_of_both_stock_clients_get_their_own_answers(conversation, expected):
    outcomes, most, _, _ = conversation
    check_whole(outcomes, TOKENS)
    assert most > 50
    different = [
        (outcome["text"], output)
        for outcome, output in zip(outcomes, expected, strict=True)
        if outcome["text"] != output.outputs[0].text
    ]
    assert all(is_tie(output, text) for text, output in different)
    assert len(different) <= 2
    assert [one["prompt_tokens"] for one in outcomes] == [len(output.prompt_token_ids) for output in expected]
    # The streamed ones came in pieces: how many of each depends on how busy the machine is, as a front that falls
    # behind joins the pieces of a stream.
    assert sum(outcome["parts"] for outcome in outcomes[::2]) > 2 * len(outcomes[::2])
    assert len({output.outputs[0].text for output in expected}) > 150


def test_metrics_count_what_was_sent(conversation, expected):
    _, _, before, after = conversation
    prompt_tokens = sum(len(output.prompt_token_ids) for output in expected)
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    wanted = {
        "request_success_total{length}": 200,
        "prompt_tokens_total": prompt_tokens,
        "generation_tokens_total": 200 * TOKENS,
        "time_to_first_token_seconds_count": 200,
        "e2e_request_latency_seconds_count": 200,
        "request_prompt_tokens_count": 200,
        "request_prompt_tokens_sum": prompt_tokens,
        "request_generation_tokens_sum": 200 * TOKENS,
        "prefix_cache_queries_total": prompt_tokens,
    }
    assert {name: grown[name] for name in wanted} == wanted
    assert not any(grown[name] for name in grown if name.startswith("request_refused_total"))
    assert after["kv_blocks_free"] + after["kv_blocks_cached"] > 0


def test_reflection_lists_every_service_and_health_says_serving_for_each(program):
    with grpc_channel(program) as channel:
        reflect = ServerReflectionStub(channel).ServerReflectionInfo
        (answer,) = reflect(iter([ServerReflectionRequest(list_services="")]), timeout=30)
        assert {service.name for service in answer.list_services_response.service} == SERVICES
        for service in ("", *SERVICES):
            status = HealthStub(channel).Check(HealthCheckRequest(service=service), timeout=30).status
            assert status == HealthCheckResponse.SERVING
    assert program.health() == 200


@pytest.mark.parametrize("module", ["openai_client", "triton_client"])
def test_requests_that_a_stock_client_cancels_free_the_engine(program, module):
    address = program.url if module == "openai_client" else program.grpc
    before = program.metrics()
    with ClientProcess(module, address) as client:
        client.send(requests(PROMPTS[:16], LONG))
        until(lambda: program.under_way() == 16, "16 requests under way", 20)
        client.cancel()
        outcomes = client.outcomes()
        assert {outcome["error"]["status"] for outcome in outcomes} == {"cancelled"}
        until(program.is_idle, "the engine to be idle", 10)
    after = program.metrics()
    assert after["request_success_total{abort}"] - before.get("request_success_total{abort}", 0) == 16
    assert after.get("request_success_total{length}") == before.get("request_success_total{length}")


def test_requests_go_on_when_their_engine_is_killed_twice_in_a_row(program, expected):
    logged = len(program.log())
    restarts = program.metrics()["engine_restarts_total"]
    with both_clients(program) as (openai_client, triton_client):
        openai_client.send(requests(PROMPTS[:10], LONG))
        triton_client.send(requests(PROMPTS[10:20], LONG))
        for number in (1, 2):
            until(lambda: program.under_way() == 20, "20 requests under way", 30)
            (engine,) = program.engines()
            os.kill(engine, signal.SIGKILL)
            until(
                lambda number=number: program.metrics()["engine_restarts_total"] == restarts + number,
                "the next engine",
                30,
            )
            assert program.engines() != [engine]
        outcomes = openai_client.outcomes() + triton_client.outcomes()
    check_whole(outcomes, LONG)
    for outcome, output in zip(outcomes, expected[:20], strict=True):
        assert outcome["text"].startswith(output.outputs[0].text) or is_tie(output, outcome["text"])
    assert program.process.poll() is None
    program.wait_until_serving()
    until(program.is_idle, "the engine to be idle", 10)
    assert "Traceback" not in program.log()[logged:]


# Malformed input.

# What is never an answer to bad input.
FAULTS = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}


def test_malformed_input_over_both_faces_is_refused_while_good_requests_are_served(program, expected):
    logged = len(program.log())
    http_port, grpc_port = (int(address.rpartition(":")[2]) for address in (program.url, program.grpc))
    with both_clients(program) as (openai_client, triton_client), contextlib.ExitStack() as open_connections:
        openai_client.send(requests(PROMPTS[:50], 4 * TOKENS))
        triton_client.send(requests(PROMPTS[50:100], 4 * TOKENS))
        until(lambda: program.under_way() > 20, "good requests under way", 30)
        raw = []
        for port in (http_port, grpc_port):
            for data in malformed.connections(port == http_port):
                connection = malformed.send_raw(("127.0.0.1", port), data)
                raw.append(open_connections.enter_context(connection))
        http_statuses, grpc_statuses = asyncio.run(send_malformed(program))
        raw_statuses = [status for connection in raw for status in malformed.statuses(connection, 0.05)]
        outcomes = openai_client.outcomes() + triton_client.outcomes()
    check_whole(outcomes, 4 * TOKENS)
    assert (
        sum(
            not one["text"].startswith(output.outputs[0].text)
            for one, output in zip(outcomes, expected[:100], strict=True)
        )
        <= 2
    )
    assert set(http_statuses) <= {200, 400, 404}
    assert http_statuses.count(400) > 150
    assert all(status < 500 for status in raw_statuses)
    assert raw_statuses.count(400) >= 8
    assert not set(grpc_statuses) & FAULTS
    assert grpc_statuses.count(grpc.StatusCode.INVALID_ARGUMENT) > 50
    until(program.is_idle, "the engine to be idle", 30)
    log = program.log()[logged:]
    assert "Traceback" not in log
    assert "ERROR" not in log
    assert program.health() == 200


async def send_malformed(program):
    """Statuses of seeded wrong requests, eight at once over each face."""
    limits = httpx.Limits(max_connections=8)
    async with (
        httpx.AsyncClient(base_url=program.url, timeout=120, limits=limits) as http,
        grpc.aio.insecure_channel(program.grpc, [("grpc.max_send_message_length", -1)]) as channel,
    ):
        room = asyncio.Semaphore(8)

        async def over_http(path, body):
            async with room:
                return (await malformed.post(http, path, body)).status_code

        grpc_room = asyncio.Semaphore(8)

        async def over_grpc(method, data):
            # Streamed or not, the bytes on the wire are the same.
            async with grpc_room:
                call = channel.stream_stream(method)(iter([data]), timeout=120)
                try:
                    async for _ in call:
                        pass
                except grpc.aio.AioRpcError as error:
                    return error.code()
                return grpc.StatusCode.OK

        bodies = [*malformed.http_bodies(1, 300), *malformed.large_http_bodies()]
        messages = [*malformed.grpc_messages(2, 300), *malformed.large_grpc_messages()]
        return await asyncio.gather(
            asyncio.gather(*(over_http(*one) for one in bodies)),
            asyncio.gather(*(over_grpc(*one) for one in messages)),
        )


def test_bytes_that_are_no_message_are_refused_by_health_and_reflection_too(program):
    logged = len(program.log())
    with grpc_channel(program) as channel:
        for method in ("grpc.health.v1.Health/Check", "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"):
            with pytest.raises(grpc.RpcError) as error:
                list(channel.stream_stream(f"/{method}")(iter([b"\xff"]), timeout=30))
            assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "Traceback" not in program.log()[logged:]


# Signals.


def test_sigterm_under_load_refuses_what_is_new_and_finishes_what_runs(tmp_path):
    with Program(tmp_path, *ENGINE, "--shutdown-timeout", 60) as program, grpc_channel(program) as channel:
        program.wait_until_serving()
        with both_clients(program) as (openai_client, triton_client):
            openai_client.send(requests(PROMPTS[:8], LONG))
            triton_client.send(requests(PROMPTS[8:16], LONG))
            until(lambda: program.under_way() == 16, "16 requests under way", 20)
            health = HealthStub(channel)
            assert health.Check(HealthCheckRequest(), timeout=30).status == HealthCheckResponse.SERVING
            program.process.send_signal(signal.SIGTERM)
            until(lambda: program.health() == 503, "/health to be 503", 20)
            assert health.Check(HealthCheckRequest(), timeout=30).status == HealthCheckResponse.NOT_SERVING
            refused = httpx.post(f"{program.url}/v1/completions", json={"prompt": "x"}, timeout=30)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_serving")
            with pytest.raises(grpc.RpcError) as error:
                InferenceStub(channel).GenerateUnary(pb.GenerateRequest(text="x"), timeout=30)
            assert error.value.code() is grpc.StatusCode.UNAVAILABLE
            assert "shutting down" in error.value.details()
            assert program.under_way() > 0  # all that was under load
            check_whole(openai_client.outcomes() + triton_client.outcomes(), LONG)
        assert program.process.wait(20) == 0
        assert program.engines() == []
        with pytest.raises(ConnectionRefusedError):
            program.health()
        assert "Traceback" not in program.log()


def test_a_second_sigterm_ends_at_once(tmp_path):
    with Program(tmp_path, *ENGINE, "--shutdown-timeout", 300) as program:
        until(lambda: program.client.get("/v1/models").status_code == 200, "the engine to take requests")
        with both_clients(program) as (openai_client, triton_client):
            openai_client.send(requests(PROMPTS[:50], LONG))
            triton_client.send(requests(PROMPTS[50:100], LONG))
            until(lambda: program.under_way() == 100, "100 requests under way")
            (engine,) = program.engines()
            program.process.send_signal(signal.SIGTERM)
            until(lambda: program.health() == 503, "/health to be 503", 20)
            program.process.send_signal(signal.SIGTERM)
            assert program.process.wait(60) == 0
            outcomes = openai_client.outcomes() + triton_client.outcomes()
        ends = [outcome["finish_reason"] if "error" not in outcome else "error" for outcome in outcomes]
        assert set(ends) <= {"error", "abort", "length"}
        assert ends.count("length") < 50
        assert not Path(f"/proc/{engine}").exists()
        assert "Traceback" not in program.log()


def test_the_shutdown_timeout_ends_what_takes_too_long(tmp_path):
    with Program(tmp_path, *ENGINE, "--shutdown-timeout", 2) as program:
        until(lambda: program.client.get("/v1/models").status_code == 200, "the engine to take requests")
        with ClientProcess("openai_client", program.url) as client:
            client.send(requests(PROMPTS[:50], LONG))
            until(lambda: program.under_way() == 50, "50 requests under way")
            began = time.monotonic()
            program.process.send_signal(signal.SIGTERM)
            assert program.process.wait(60) == 0
            assert time.monotonic() - began >= 2
            outcomes = client.outcomes()
        assert sum("error" in outcome for outcome in outcomes) > 25
        assert "Traceback" not in program.log()


def test_sigterm_before_the_engine_is_up_ends_at_once(tmp_path):
    with Program(tmp_path, *ENGINE) as program:
        assert program.health() == 503
        program.process.send_signal(signal.SIGTERM)
        assert program.process.wait(60) == 0
        assert "Traceback" not in program.log()


# The command line.


def run_server(*arguments, **variables):
    command = [sys.executable, "-m", "server", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment(**variables), text=True, capture_output=True, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "variables", "words"),
    [
        (["--max-num-seqs", 0], {}, "max_num_seqs=0 must be at least 1"),
        (["--port", "high"], {}, "port='high' must be a whole number"),
        (["--ssl-certfile", "/nothing/cert.pem", "--ssl-keyfile", "/nothing/key.pem"], {}, "/nothing/cert.pem"),
        (["--config", "/nothing/file.toml"], {}, "/nothing/file.toml: can't be read"),
        ([], {"JAXDUAL_MAX_NUM_SEQ": "3"}, "unknown environment variable JAXDUAL_MAX_NUM_SEQ;"),
        ([], {"JAXDUAL_SHUTDOWN_TIMEOUT": "-1"}, "shutdown_timeout=-1.0 must be at least 0"),
    ],
)
def test_a_call_that_cannot_work_has_status_2_and_a_line_that_says_why(arguments, variables, words):
    ended = run_server(*arguments, **variables)
    assert (ended.returncode, ended.stdout) == (2, "")
    (line,) = ended.stderr.splitlines()
    assert line.startswith("python -m server: error: ")
    assert words in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "/nothing/model"], "/nothing/model: no such folder"),
        (["--model", TINY, "--max-model-len", 100_000], "max_model_len=100000 must be at most"),
    ],
)
def test_what_only_the_engine_can_refuse_has_status_2_and_says_why_last(arguments, words):
    ended = run_server("--port", 0, "--grpc-port", 0, *arguments)
    assert (ended.returncode, ended.stdout) == (2, "")
    *_, last = ended.stderr.splitlines()
    assert last.startswith("python -m server: error: ")
    assert words in last
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(("taken", "free"), [("--port", "--grpc-port"), ("--grpc-port", "--port")])
def test_a_port_in_use_has_status_2_and_is_named(taken, free):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        ended = run_server("--model", TINY, taken, port, free, 0)
    assert (ended.returncode, ended.stdout) == (2, "")
    *_, last = ended.stderr.splitlines()
    assert last.startswith("python -m server: error: ")
    assert "listen" in last
    assert str(port) in last
    assert "Traceback" not in ended.stderr


def test_flags_win_over_variables_and_those_over_the_file(tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text(
        f'model = "{TINY}"\nserved-model-name = "of-the-file"\nmax_model_len = 96\nblock_size = 8\nmax_num_seqs = 5\n'
        'api_key = "of-the-file"\nshutdown_timeout = 7\n'
    )
    variables = {"JAXDUAL_MAX_MODEL_LEN": "128", "JAXDUAL_BLOCK_SIZE": "16", "JAXDUAL_API_KEY": "of-the-variable"}
    with (
        Program(tmp_path, "--config", file, "--block-size", 32, **variables) as program,
        grpc_channel(program) as channel,
    ):
        headers = {"authorization": "Bearer of-the-variable"}
        until(lambda: program.client.get("/v1/models", headers=headers).status_code == 200, "the engine")
        assert program.client.get("/v1/models", headers={"authorization": "Bearer of-the-file"}).status_code == 401
        info = InferenceStub(channel).GetModelInfo(pb.GetModelInfoRequest(), timeout=30, metadata=list(headers.items()))
        assert (info.model, info.max_model_len, info.block_size, info.max_num_seqs) == ("of-the-file", 128, 32, 5)
        program.process.terminate()
        assert program.process.wait(30) == 0
        assert "for at most 7 s" in program.log()
