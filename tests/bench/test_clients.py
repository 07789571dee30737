"""The load generator's clients against scripted servers on loopback sockets."""

import asyncio
import json

import grpc
import pytest

from bench.grpc_client import GrpcClient
from bench.http_client import HttpClient
from bench.load import LoadRequest
from server.proto.jaxdual.v1 import inference_pb2 as messages
from server.proto.jaxdual.v1 import inference_pb2_grpc as services

REQUEST = LoadRequest([5, 6, 7], 3)


def event(value):
    return f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n".encode()


def chunk(text):
    return event({"choices": [{"index": 0, "text": text, "finish_reason": None}], "usage": None})


USAGE = event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}})
DONE = event("[DONE]")


class ScriptedServer:
    """Answers each request on a connection with the next of `answers`: status, and parts of a body sent as chunks.

    After a part of None it goes on only when `proceed` is set; a body of "close" drops the connection.
    """

    def __init__(self, *answers):
        self._answers = list(answers)
        self.proceed = asyncio.Event()
        self.bodies, self.heads, self.connections = [], [], 0

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *error):
        self._server.close()

    async def _serve(self, reader, writer):
        self.connections += 1
        while head := await reader.readuntil(b"\r\n\r\n"):
            self.heads.append(head.decode())
            length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            self.bodies.append(await reader.readexactly(length))
            status, parts = self._answers.pop(0)
            writer.write(f"HTTP/1.1 {status} Some\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
            for part in parts:
                if part is None:
                    await self.proceed.wait()
                elif part == "close":
                    writer.close()
                    return
                else:
                    writer.write(b"%x\r\n%b\r\n" % (len(part), part))
                    await writer.drain()
            writer.write(b"0\r\n\r\n")
            if not self._answers:
                writer.close()
                return


def send_all(*answers, count=None, api_key=None):
    async def run():
        async with ScriptedServer(*answers) as server:
            client = HttpClient(server.url, "m", api_key)
            records = [await client.send(REQUEST) for _ in range(count or len(answers))]
            await client.close()
            return server, records

    return asyncio.run(run())


def test_a_stream_is_recorded_with_the_server_s_count_of_tokens():
    server, (record,) = send_all((200, [chunk("a"), chunk("bc"), USAGE, DONE]), api_key="secret")
    assert (record.status, record.tokens, len(record.outputs)) == ("ok", 3, 2)
    assert record.sent <= record.outputs[0] <= record.outputs[1] <= record.ended
    body = json.loads(server.bodies[0])
    assert (body["prompt"], body["max_tokens"], body["stream"], body["model"]) == ([5, 6, 7], 3, True, "m")
    assert "Authorization: Bearer secret" in server.heads[0]


def test_events_that_arrive_in_pieces_are_put_together():
    whole = chunk("a") + chunk("ü") + USAGE + DONE
    _, (record,) = send_all((200, [whole[i : i + 7] for i in range(0, len(whole), 7)]))
    assert (record.status, len(record.outputs)) == ("ok", 2)


def test_the_first_output_has_the_time_at_which_it_arrived():
    async def run():
        async with ScriptedServer((200, [chunk("a"), None, chunk("b"), USAGE, DONE])) as server:
            client = HttpClient(server.url, "m")
            sending = asyncio.create_task(client.send(REQUEST))
            loop = asyncio.get_running_loop()
            loop.call_later(0.2, server.proceed.set)
            return await sending

    record = asyncio.run(run())
    assert record.ttft < 0.15
    assert record.e2e >= 0.19


def test_a_full_queue_is_a_refusal_and_other_failures_are_errors():
    _, records = send_all(
        (429, [b'{"error": {"code": "queue_full"}}']),
        (500, [b"no"]),
        (200, [chunk("a"), event({"error": {"message": "broke"}})]),
        (200, [chunk("a")]),
        (200, [chunk("a"), USAGE]),
    )
    assert [record.status for record in records] == ["refused", *["error"] * 4]
    assert "queue_full" in records[0].detail
    assert records[1].detail == "500: no"
    assert "broke" in records[2].detail
    assert all("ended early" in record.detail for record in records[3:])


def test_a_connection_is_used_again():
    good = (200, [chunk("a"), USAGE, DONE])
    server, records = send_all(good, good, good)
    assert [record.status for record in records] == ["ok"] * 3
    assert server.connections == 1


def test_a_connection_that_breaks_is_an_error_of_that_request_only():
    async def run():
        async with ScriptedServer((200, [chunk("a"), "close"]), (200, [chunk("a"), USAGE, DONE])) as server:
            client = HttpClient(server.url, "m")
            return [await client.send(REQUEST), await client.send(REQUEST)]

    first, second = asyncio.run(run())
    assert (first.status, second.status) == ("error", "ok")
    assert "ConnectionError" in first.detail


def test_no_server_is_an_error_of_the_request():
    record = asyncio.run(HttpClient("http://127.0.0.1:1", "m").send(REQUEST))
    assert record.status == "error"


def test_an_address_that_is_no_http_url_is_refused():
    with pytest.raises(ValueError, match="must be http"):
        HttpClient("127.0.0.1:8000", "m")


class ScriptedInference(services.InferenceServicer):
    def __init__(self):
        self.requests = []

    async def Generate(self, request, context):  # noqa: N802
        self.requests.append(request)
        if request.sampling_params.max_tokens == 99:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        if request.sampling_params.max_tokens == 98:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
        yield messages.GenerateResponse(outputs=[messages.OutputDelta(text="a", token_ids=[1])])
        yield messages.GenerateResponse(
            outputs=[messages.OutputDelta(text="b", token_ids=[2, 3])], usage=messages.Usage(completion_tokens=3)
        )


def test_grpc_streams_refusals_and_errors_are_told_apart():
    async def run():
        server, servicer = grpc.aio.server(), ScriptedInference()
        services.add_InferenceServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        client = GrpcClient(f"127.0.0.1:{port}")
        records = [await client.send(LoadRequest(p, n)) for p, n in (([1, 2], 3), ("text", 3), ([1], 99), ([1], 98))]
        await client.close()
        await server.stop(None)
        return records, servicer.requests

    records, requests = asyncio.run(run())
    assert [record.status for record in records] == ["ok", "ok", "refused", "error"]
    assert (records[0].tokens, len(records[0].outputs)) == (3, 2)
    assert (list(requests[0].token_ids.ids), requests[1].text) == ([1, 2], "text")
    assert records[3].detail == "UNAVAILABLE: gone"
