"""What a client is told when a request can't be served."""

import json
import socket

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxdual.engine.supervisor import EngineState
from jaxdual.errors import EngineDeadError, NotServingError, QueueFullError
from tests.server.http.scripted import RunningServer, ScriptedLLM

POSTS = ("/v1/completions", "/v1/chat/completions")
USER = {"role": "user", "content": "hi"}
GOOD = {"/v1/completions": {"prompt": "x", "max_tokens": 2}, "/v1/chat/completions": {"messages": [USER], "n": 1}}


@pytest.fixture(scope="module")
def server():
    """One server for tests that leave it as they found it."""
    with RunningServer() as running:
        yield running


def error_of(response, status, code=None):
    """The error object of a response, checked to be one."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert list(body) == ["error"]
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    if code is not None:
        assert error["code"] == code
    return error


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b"NaN",
        b'{"prompt": NaN}',
        b'{"prompt": "x", "messages": [], "temperature": -Infinity}',
        b'{"prompt": "\\ud800", "messages": [{"role": "user", "content": "\\udc00"}]}',
        b'{"prompt": "\xff\xfe"}',
        b'{"\xed\xa0\x80": 1}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"logit_bias": ' + b'{"1":' * 900 + b"1" + b"}" * 901,
        b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"prompt": "x", "temperature": 1e999}',
        b'{"prompt": "x", "seed": 123456789012345678901234567890}',
        b"\xef\xbb\xbf{}",
        b'{"prompt": "x"} trailing',
        b"prompt=x",
    ],
    ids=range(21),
)
def test_a_body_that_is_no_request_is_refused(http, path, body):
    error = error_of(http.post(path, content=body, headers={"content-type": "application/json"}), 400)
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("path", "fields", "param", "code"),
    [
        (POSTS[0], {"temperature": 3}, "temperature", "invalid_value"),
        (POSTS[0], {"prompt": ""}, None, "invalid_value"),
        (POSTS[0], {"prompt": "word " * 600}, "prompt", "context_length_exceeded"),
        (POSTS[0], {"prompt": [1] * 600}, "prompt", "context_length_exceeded"),
        (POSTS[0], {"prompt": [2048]}, None, "invalid_value"),
        (POSTS[0], {"prompt": [10**30]}, None, "invalid_value"),
        (POSTS[0], {"stop_token_ids": [10**30]}, None, "invalid_value"),
        (POSTS[0], {"logit_bias": {"99999": 1}}, None, "invalid_value"),
        (POSTS[0], {"bogus": 1}, "bogus", "unknown_parameter"),
        (POSTS[0], {"model": "other"}, "model", "model_not_found"),
        (POSTS[0], {"dysco": {}}, "dysco", "invalid_value"),
        (POSTS[0], {"dysco": {"heads": [[99, 0]]}}, "dysco", "invalid_value"),
        (POSTS[0], {"dysco": {"heads": [[0, 0]], "tail": 10**12}}, "dysco", "invalid_value"),
        (POSTS[0], {"dysco": {"heads": [[0, 0]], "template_sequences": [[10**26]]}}, "dysco", "invalid_value"),
        (POSTS[0], {"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        (POSTS[1], {"messages": [{"role": "user", "content": "word " * 600}]}, "messages", "context_length_exceeded"),
        (POSTS[1], {"messages": []}, "messages", "invalid_value"),
        (POSTS[1], {"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        (POSTS[1], {"messages": [{"role": "tool", "content": None, "tool_calls": 3}]}, None, None),
    ],
)
def test_a_wrong_field_is_named(http, path, fields, param, code):
    response = http.post(path, json={**GOOD[path], **fields})
    if code is None:
        assert response.status_code in (200, 400)
        return
    error = error_of(response, 404 if code == "model_not_found" else 400, code)
    assert error["param"] == param
    assert len(error["message"]) < 400


def test_numbers_beyond_all_machine_types_are_served_where_they_have_a_meaning(http):
    fields = {"top_k": 10**30, "max_tokens": 10**30, "temperature": 1e-320, "repetition_penalty": 1e-320}
    body = {"prompt": [5, 2047], **fields}
    assert http.post(POSTS[0], json=body).json()["usage"]["completion_tokens"] == 2


def test_a_prompt_of_ten_megabytes_is_refused_at_once(http):
    for path, body in (
        (POSTS[0], {"prompt": "word " * 2_000_000}),
        (POSTS[0], {"prompt": [7] * 3_000_000}),
        (POSTS[1], {"messages": [{"role": "user", "content": "word " * 2_000_000}]}),
    ):
        response = http.post(path, json=body)
        error_of(response, 400)
        assert response.elapsed.total_seconds() < 10


def test_a_wrong_content_type_is_tolerated(http):
    for content_type in ("text/plain", "application/x-www-form-urlencoded", ""):
        body = json.dumps(GOOD[POSTS[0]])
        assert http.post(POSTS[0], content=body, headers={"content-type": content_type}).status_code == 200


def test_a_compressed_body_is_refused(http):
    response = http.post(POSTS[0], content=b"x", headers={"content-encoding": "gzip"})
    error_of(response, 415, "unsupported_encoding")


def test_unknown_paths_and_methods_have_openai_errors(http):
    for path in ("/", "/v1", "/v1/embeddings", "/v1/models/", "/v1/completions/"):
        error_of(http.get(path), 404)
    response = http.get(POSTS[0])
    error_of(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"
    error_of(http.post("/health"), 405)


def test_a_body_above_the_limit_is_refused_however_it_is_sent():
    with RunningServer(max_body_bytes=1000) as server, httpx.Client(base_url=server.url) as http:
        body = json.dumps({"prompt": "x" * 1000}).encode()
        error_of(http.post(POSTS[0], content=body), 413, "request_too_large")
        error_of(http.post(POSTS[0], content=iter([body[:600], body[600:]])), 413, "request_too_large")
        # The declared length is enough: the body itself is not waited for.
        with socket.create_connection(("127.0.0.1", server.port), 10) as raw:
            raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n")
            assert raw.recv(100).startswith(b"HTTP/1.1 413")
        assert http.post(POSTS[0], json=GOOD[POSTS[0]]).status_code == 200


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "error_type", "code", "expected"),
    [
        (QueueFullError("300 wait"), 429, "rate_limit_error", "queue_full", openai.RateLimitError),
        (NotServingError("draining"), 503, "server_error", "not_serving", openai.InternalServerError),
        (EngineDeadError("gone"), 503, "server_error", "engine_error", openai.InternalServerError),
    ],
)
def test_a_refusal_says_when_to_come_again(server, http, path, stream, error, status, error_type, code, expected):
    server.call(setattr, server.llm, "refuse_with", error)
    try:
        response = http.post(path, json={**GOOD[path], "stream": stream})
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(expected):
            client.completions.create(model="scripted", prompt="x", stream=stream)
        client.close()
    finally:
        server.call(setattr, server.llm, "refuse_with", None)
    refused = error_of(response, status, code)
    assert (refused["type"], refused["message"]) == (error_type, str(error))
    assert response.headers["retry-after"] == "1"


def test_an_unforeseen_failure_tells_nothing_of_itself(server, http):
    server.call(setattr, server.llm, "refuse_with", KeyError("secret"))
    try:
        error = error_of(http.post(POSTS[0], json=GOOD[POSTS[0]]), 500, "internal_error")
    finally:
        server.call(setattr, server.llm, "refuse_with", None)
    assert "secret" not in json.dumps(error)


def test_one_refused_prompt_ends_the_others(server, http):
    before = server.call(lambda: len(server.llm.closed))
    error_of(http.post(POSTS[0], json={"prompt": [[1], [2], [9999]], "max_tokens": 400}), 400)
    assert server.call(lambda: len(server.llm.closed)) == before + 2
    assert server.call(lambda: server.llm.num_unfinished) == 0


def test_a_key_guards_v1_and_nothing_else():
    with RunningServer(api_key="sécret") as server, httpx.Client(base_url=server.url) as http:
        for headers in (
            {},
            {"authorization": "Bearer no"},
            {"authorization": b"Bearer"},
            {"authorization": b"\xff\xfe"},
            [("authorization", "Bearer sécret".encode()), ("authorization", b"Bearer no")],
        ):
            for path in ("/v1/models", "/v1/nothing"):
                response = http.get(path, headers=headers)
                error_of(response, 401, "invalid_api_key")
                assert response.headers["www-authenticate"] == "Bearer"
            error_of(http.post(POSTS[0], json=GOOD[POSTS[0]], headers=headers), 401)
        good = {"authorization": "Bearer sécret".encode()}
        assert http.get("/v1/models", headers=good).status_code == 200
        assert http.post(POSTS[0], json=GOOD[POSTS[0]], headers=good).status_code == 200
        for path in ("/health", "/metrics", "/version"):
            assert http.get(path).status_code == 200


def test_a_model_without_a_tokenizer_takes_token_ids_only():
    with (
        RunningServer(lambda: ScriptedLLM(with_tokenizer=False)) as server,
        httpx.Client(base_url=server.url) as http,
    ):
        error_of(http.post(POSTS[0], json=GOOD[POSTS[0]]), 400)
        error_of(http.post(POSTS[1], json=GOOD[POSTS[1]]), 400)
        error_of(http.post(POSTS[0], json={"prompt": [1, 2], "stop": "x"}), 400)
        answer = http.post(POSTS[0], json={"prompt": [1, 2], "max_tokens": 3, "logprobs": 1, "echo": True}).json()
        assert answer["usage"]["completion_tokens"] == 3
        assert answer["choices"][0]["logprobs"]["tokens"] == [f"token_id:{i}" for i in (1, 2, 1, 2, 1)]


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELD = st.sampled_from(
    [
        *("messages", "prompt", "n", "temperature", "top_p", "top_k", "stop", "seed", "logprobs", "top_logprobs"),
        *("logit_bias", "stream", "tools", "stream_options", "stop_token_ids", "chat_template_kwargs", "min_p"),
        *("response_format", "min_tokens", "echo", "model", "prompt_logprobs", "repetition_penalty", "max_tokens"),
    ]
)
BODIES = st.dictionaries(FIELD, ANY_JSON, max_size=3).map(lambda fields: {"max_tokens": 2, **fields})


@given(
    path=st.sampled_from(POSTS),
    body=BODIES | st.binary(max_size=30),
    cut=st.none() | st.integers(0, 400),
    over_good=st.booleans(),
)
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_body_is_served_or_refused_with_an_error_object(http, path, body, cut, over_good):
    if isinstance(body, dict):
        body = json.dumps({**GOOD[path], **body} if over_good else body).encode()
    response = http.post(path, content=body[:cut])
    if response.status_code != 200:
        assert response.status_code in (400, 404), response.text
        error_of(response, response.status_code)


@pytest.mark.parametrize("state", list(EngineState))
def test_health_follows_the_state(server, http, state):
    server.call(server.llm.set_state, state)
    try:
        response = http.get("/health")
    finally:
        server.call(server.llm.set_state, EngineState.SERVING)
    assert response.status_code == (200 if state is EngineState.SERVING else 503)
    assert response.json() == {"status": state.value}


def test_models_and_version(http):
    listed = http.get("/v1/models").json()
    (card,) = listed["data"]
    assert (listed["object"], card["id"], card["object"], card["max_model_len"]) == ("list", "scripted", "model", 512)
    assert http.get("/v1/models/scripted").json() == card
    error = error_of(http.get("/v1/models/Qwen/Qwen3-0.6B"), 404, "model_not_found")
    assert "Qwen/Qwen3-0.6B" in error["message"]
    assert http.get("/version").json()["version"]


def test_request_ids_come_back(http):
    assert http.get("/version", headers={"x-request-id": "mine-7"}).headers["x-request-id"] == "mine-7"
    assert http.post(POSTS[0], content=b"", headers={"x-request-id": "mine"}).headers["x-request-id"] == "mine"
    made = [
        http.get("/version", headers={"x-request-id": bad}).headers["x-request-id"] for bad in (b"", b"a b", b"\xe9")
    ]
    assert len(set(made)) == 3
    assert all(len(one) == 32 for one in made)


@pytest.mark.parametrize("options", [{"api_key": ""}, {"max_body_bytes": 0}])
def test_options_that_make_no_sense_are_refused(options):
    from server.http import create_app

    with pytest.raises(ValueError, match="must"):
        create_app(None, None, **options)
