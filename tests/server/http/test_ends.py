"""Requests that end early: clients that leave, engines that die, servers that stop."""

import asyncio
import json
import socket
import threading

import httpx
import openai
import pytest

COMPLETION = {"prompt": ["def a", "def b"], "n": 2, "max_tokens": 400, "ignore_eos": True}
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 400, "ignore_eos": True}
REQUESTS = [("/v1/completions", COMPLETION, 2), ("/v1/chat/completions", CHAT, 1)]


def send(server, path, body):
    """A socket on which a request was sent."""
    content = json.dumps(body).encode()
    raw = socket.create_connection(("127.0.0.1", server.port), 10)
    raw.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content)
    return raw


@pytest.mark.parametrize(("path", "body", "count"), REQUESTS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_it_waits_ends_its_requests(server, path, body, count, stream):
    server.call(server.llm.hold)
    with send(server, path, {**body, "stream": stream}):
        server.wait_for(lambda: server.llm.num_unfinished == count, "the requests to begin")
    server.wait_for(lambda: server.llm.num_unfinished == 0, "the requests to end")
    assert server.call(lambda: sorted(server.llm.closed)) == server.call(lambda: sorted(server.llm.submitted))


@pytest.mark.parametrize(("path", "body", "count"), REQUESTS)
def test_a_client_that_leaves_in_the_middle_of_a_stream_ends_its_requests(server, path, body, count):
    slow_down(server)
    with send(server, path, {**body, "stream": True}) as raw:
        assert raw.recv(15) == b"HTTP/1.1 200 OK"
        assert server.call(lambda: server.llm.num_unfinished) == count
    server.wait_for(lambda: server.llm.num_unfinished == 0, "the requests to end")
    assert server.call(lambda: len(server.llm.closed)) == count


def slow_down(server):
    """Makes the engine give one token and then wait."""
    take_turn = server.llm._turn

    def one_turn(sequence):
        server.llm.hold()
        return take_turn(sequence)

    server.call(setattr, server.llm, "_turn", one_turn)


def test_half_a_request_is_forgotten_when_its_client_leaves(server, http):
    with socket.create_connection(("127.0.0.1", server.port), 10) as raw:
        raw.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"prompt"')
    assert http.post("/v1/completions", json={"prompt": "x"}).status_code == 200
    assert server.call(lambda: len(server.llm.submitted)) == 1


def test_closing_the_stock_client_s_stream_ends_the_request(server):
    slow_down(server)

    async def leave():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            stream = await client.completions.create(model="scripted", stream=True, **sized(400))
            async for _ in stream:
                break
            await stream.close()

    asyncio.run(leave())
    server.wait_for(lambda: server.llm.num_unfinished == 0, "the request to end")


def test_cancelling_the_stock_client_s_task_ends_the_request(server):
    server.call(server.llm.hold)

    async def leave():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            task = asyncio.create_task(client.completions.create(model="scripted", **sized(400)))
            while not await asyncio.to_thread(server.call, lambda: server.llm.num_unfinished):
                await asyncio.sleep(0.005)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(leave())
    server.wait_for(lambda: server.llm.num_unfinished == 0, "the request to end")


def sized(count):
    return {"prompt": "def a", "max_tokens": count, "extra_body": {"ignore_eos": True}}


def test_an_engine_that_dies_before_the_first_token_is_a_503(server, http):
    server.call(server.llm.hold)
    for stream in (False, True):
        answers = []
        asking = threading.Thread(
            target=lambda answers=answers, stream=stream: answers.append(
                http.post("/v1/completions", json={**COMPLETION, "stream": stream})
            )
        )
        asking.start()
        server.wait_for(lambda: server.llm.num_unfinished == 2, "the requests to begin")
        server.call(server.llm.die)
        asking.join(10)
        assert answers[0].status_code == 503
        assert answers[0].json()["error"]["code"] == "engine_error"
        assert "killed" in answers[0].json()["error"]["message"]


@pytest.mark.parametrize(("path", "body", "count"), REQUESTS)
@pytest.mark.parametrize("how", ["die", "abort"])
def test_a_stream_that_breaks_off_ends_with_an_error_and_no_done(server, http, path, body, count, how):
    slow_down(server)
    with http.stream("POST", path, json={**body, "stream": True}) as response:
        if how == "die":
            server.call(server.llm.die)
        else:
            server.call(lambda: server.llm.abort(server.llm.submitted[-1]))
        text = response.read().decode()
    events = [event.removeprefix("data: ") for event in text.split("\n\n")]
    assert events.pop() == ""
    error = json.loads(events.pop())["error"]
    assert (error["type"], error["code"]) == ("server_error", "engine_error")
    assert all(choice["finish_reason"] is None for event in events for choice in json.loads(event)["choices"])
    server.wait_for(lambda: server.llm.num_unfinished == 0, "the other requests to end")


def test_the_stock_client_raises_for_a_stream_that_breaks_off(server, client):
    slow_down(server)
    with pytest.raises(openai.APIError, match="killed"):  # noqa: PT012
        for _ in client.completions.create(model="scripted", stream=True, **sized(400)):
            server.call(server.llm.die)


def test_a_server_that_stops_ends_what_is_under_way(server):
    server.call(server.llm.hold)
    with send(server, "/v1/completions", {**COMPLETION, "stream": True}):
        server.wait_for(lambda: server.llm.num_unfinished == 2, "the requests to begin")
        server._server.should_exit = True
        server._thread.join(20)
    assert sorted(server.llm.closed) == sorted(server.llm.submitted)


def test_a_slow_reader_costs_no_memory_and_gets_everything(server):
    """Chunks are merged for a client that does not read, and nothing is lost."""
    body = {"prompt": [list(range(1, 200))], "n": 100, "max_tokens": 300, "stream": True, "logprobs": 5}
    with send(server, "/v1/completions", body) as raw:
        server.wait_for(lambda: server.llm.num_unfinished == 0, "the engine to finish", 60)
        raw.settimeout(20)
        received = bytearray()
        while not received.endswith(b"0\r\n\r\n"):
            received += raw.recv(1 << 20)
    assert received.count(b'"finish_reason":"length"') == 100
    assert b"data: [DONE]" in received


def test_many_streams_at_once_keep_apart(server):
    async def one(http, number):
        body = {"prompt": [number + 1, number + 2], "max_tokens": 20, "stream": True, "logprobs": 0}
        async with http.stream("POST", "/v1/completions", json=body) as response:
            text = (await response.aread()).decode()
        tokens = []
        for event in text.split("\n\n")[:-2]:
            for choice in json.loads(event.removeprefix("data: "))["choices"]:
                tokens += (choice["logprobs"] or {"tokens": []})["tokens"]
        return tokens

    async def ask():
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as http:
            return await asyncio.gather(*(one(http, number) for number in range(100, 300)))

    answers = asyncio.run(ask())
    reader = server.llm.get_tokenizer()
    for number, tokens in zip(range(100, 300), answers, strict=True):
        expected = [number + 1, number + 2] * 10
        pieces = [reader.token_bytes(token) for token in expected]
        assert [piece_of(token) for token in tokens] == pieces


def piece_of(text):
    if text.startswith("bytes:"):
        return bytes.fromhex(text.removeprefix("bytes:").replace("\\x", ""))
    return text.encode()
