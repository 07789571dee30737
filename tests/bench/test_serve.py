"""`python -m bench.serve` against a small scripted server that refuses what is too much for it."""

import asyncio
import json
import threading

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from bench import serve

_SLOTS = 4
_QUEUE = 4
_TOKEN_SECONDS = 0.01


class TinyServer:
    """Streams one token every 10 ms to each of four requests at once; four may wait, further ones get 429."""

    def __init__(self):
        self.most = self._held = 0
        self.broken = False
        self._slots = asyncio.Semaphore(_SLOTS)
        routes = [
            Route("/v1/models", lambda request: JSONResponse({"data": [{"id": "tiny"}]})),
            Route("/v1/completions", self._complete, methods=["POST"]),
        ]
        config = uvicorn.Config(Starlette(routes=routes), port=0, lifespan="off", log_level="error")
        self._server = uvicorn.Server(config)

    def __enter__(self):
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        started = threading.Event()
        for _ in range(1000):
            if self._server.started:
                break
            started.wait(0.01)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *error):
        self._server.should_exit = True
        self._thread.join()

    async def _complete(self, request):
        body = await request.json()
        if body["model"] != "tiny" or self.broken:
            return JSONResponse({"error": {"message": "broken"}}, 500)
        if self._held == _SLOTS + _QUEUE:
            return JSONResponse({"error": {"code": "queue_full"}}, 429)
        self._held += 1
        self.most = max(self.most, self._held)
        return StreamingResponse(self._stream(body["max_tokens"]), media_type="text/event-stream")

    async def _stream(self, tokens):
        try:
            async with self._slots:
                for _ in range(tokens):
                    await asyncio.sleep(_TOKEN_SECONDS)
                    yield 'data: {"choices": [{"index": 0, "text": "a"}]}\n\n'
            yield f'data: {{"choices": [], "usage": {{"completion_tokens": {tokens}}}}}\n\ndata: [DONE]\n\n'
        finally:
            self._held -= 1


@pytest.fixture
def server():
    with TinyServer() as one:
        yield one


def run(server, tmp_path, *arguments):
    fixed = ["--url", server.url, "--json", str(tmp_path / "serve.json"), "--prompt-tokens", "2:4"]
    status = serve.main([*fixed, *arguments])
    path = tmp_path / "serve.json"
    return status, json.loads(path.read_text()) if path.exists() else None


def test_load_keeps_to_its_concurrency_and_measures_what_the_server_does(server, tmp_path, capsys):
    status, results = run(server, tmp_path, "--requests", "24", "--max-concurrency", "6", "--output-tokens", "5:5")
    load = results["runs"]["load"]
    assert (status, load["ok"], load["errors"], load["output_tokens"]) == (0, 24, 0, 120)
    assert server.most <= 8  # the warm-up sends eight at once
    assert load["tpot_seconds"]["p50"] == pytest.approx(_TOKEN_SECONDS, rel=0.5)
    # Four at once, five tokens of 10 ms each.
    assert load["requests_per_second"] < _SLOTS / (5 * _TOKEN_SECONDS)
    assert "tpot p50 ms" in capsys.readouterr().out


def test_overload_finds_the_capacity_and_tells_refusals_from_errors(server, tmp_path):
    arguments = ["--scenario", "overload", "--max-num-seqs", "4", "--duration", "1.5", "--output-tokens", "4:4"]
    status, results = run(server, tmp_path, *arguments)
    assert status == 0
    limit = _SLOTS / (4 * _TOKEN_SECONDS)
    compared = results["compared"]
    assert 0.4 * limit < compared["capacity_requests_per_second"] <= 1.05 * limit
    assert results["runs"]["above"]["refused"] > results["runs"]["above"]["ok"] > 0
    assert results["runs"]["above"]["errors"] == 0
    assert compared["refusal_p99_seconds"] < 0.5
    ttft = {name: results["runs"][name]["ttft_seconds"]["p95"] for name in ("below", "above")}
    assert compared["ttft_p95_ratio"] == pytest.approx(ttft["above"] / ttft["below"])


def test_failing_requests_give_status_1(server, tmp_path, monkeypatch, capsys):
    async def break_it(options, client):
        server.broken = True

    monkeypatch.setattr(serve, "_warm_up", break_it)
    status, results = run(server, tmp_path, "--requests", "3")
    assert (status, results["runs"]["load"]["errors"]) == (1, 3)
    assert "broken" in capsys.readouterr().err


def test_a_server_that_does_not_answer_gives_status_2(server, tmp_path, capsys):
    server.broken = True
    assert run(server, tmp_path, "--requests", "3") == (2, None)
    assert serve.main(["--url", "http://127.0.0.1:1"]) == 2
    assert "bench.serve:" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--url", "http://a", "--grpc", "a:1"],
        ["--requests", "0"],
        ["--prompt-tokens", "9:3"],
        ["--max-concurrency", "0"],
    ],
)
def test_wrong_arguments_are_refused(arguments):
    with pytest.raises(SystemExit):
        serve.main(arguments)
