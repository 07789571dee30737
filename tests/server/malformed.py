"""Input that no server should be given, the same for each seed."""

import contextlib
import json
import random
import socket

import httpx

from server.proto.jaxdual.v1 import inference_pb2 as pb
from server.proto.kserve import open_inference_pb2 as kserve

HTTP_PATHS = ("/v1/completions", "/v1/chat/completions")
_GOOD = {
    "/v1/completions": {"prompt": "def f", "max_tokens": 2, "temperature": 0.5, "stop": ["x"], "seed": 3},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "top_p": 0.5},
}
_VALUES = (None, True, -1, 0, 10**30, -1.5, 1e308, "", "x", "\u0000", [], [[]], [None], {}, {"a": 1}, [-1], [10**12])
_LONG = 10_000_000


def http_bodies(seed, count):
    """Paths and bodies: random bytes, JSON cut or with other bytes, and wrong values."""
    rng = random.Random(seed)
    for number in range(count):
        path = rng.choice(HTTP_PATHS)
        good = json.dumps(_GOOD[path]).encode()
        match number % 5:
            case 0:
                yield path, rng.randbytes(rng.randrange(300))
            case 1:
                yield path, good[: rng.randrange(len(good))]
            case 2 | 3:
                yield path, scrambled(rng, good)
            case _:
                field = rng.choice([*_GOOD[path], "n", "logprobs", "stream", "stream_options", "logit_bias", "model"])
                yield path, json.dumps({**_GOOD[path], field: rng.choice(_VALUES)}).encode()


def large_http_bodies():
    """Ten megabytes each, in several forms."""
    yield HTTP_PATHS[0], json.dumps({"prompt": "word " * (_LONG // 5)}).encode()
    yield HTTP_PATHS[0], json.dumps({"prompt": [7] * (_LONG // 3)}).encode()
    yield HTTP_PATHS[1], json.dumps({"messages": [{"role": "user", "content": "x" * _LONG}]}).encode()
    yield HTTP_PATHS[0], b'{"prompt": "' + b"\xff" * _LONG + b'"}'
    yield HTTP_PATHS[0], b"[" * _LONG
    yield HTTP_PATHS[1], bytes(_LONG)


def grpc_messages(seed, count):
    """Full method names and bytes that are, or once were, messages."""
    rng = random.Random(seed)
    params = pb.SamplingParams(max_tokens=2, temperature=0.5, stop=["x"], seed=3)
    infer = kserve.ModelInferRequest(model_name="small", id="1")
    infer.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    infer.raw_input_contents.append(b"\x05\x00\x00\x00def f")
    infer.parameters["max_tokens"].int64_param = 2
    good = {
        "/jaxdual.v1.Inference/Generate": pb.GenerateRequest(text="def f", sampling_params=params),
        "/jaxdual.v1.Inference/GenerateUnary": pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=[5, 6, 7]), sampling_params=params
        ),
        "/jaxdual.v1.Inference/Tokenize": pb.TokenizeRequest(text="def f"),
        "/jaxdual.v1.Inference/Detokenize": pb.DetokenizeRequest(token_ids=[5, 6]),
        "/jaxdual.v1.Inference/Abort": pb.AbortRequest(request_id="none"),
        "/inference.GRPCInferenceService/ModelInfer": infer,
        "/inference.GRPCInferenceService/ModelStreamInfer": infer,
        "/inference.GRPCInferenceService/ModelMetadata": kserve.ModelMetadataRequest(name="small"),
    }
    for number in range(count):
        method, message = rng.choice(list(good.items()))
        data = message.SerializeToString()
        match number % 4:
            case 0:
                yield method, rng.randbytes(rng.randrange(1, 200))
            case 1:
                yield method, data[: rng.randrange(len(data))]
            case _:
                yield method, scrambled(rng, data)


def large_grpc_messages():
    """Ten megabytes each; the last ones are not UTF-8."""
    prompt = pb.GenerateRequest(text="word " * (_LONG // 5)).SerializeToString()
    yield "/jaxdual.v1.Inference/GenerateUnary", prompt
    yield (
        "/jaxdual.v1.Inference/Generate",
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[7] * _LONG)).SerializeToString(),
    )
    yield "/jaxdual.v1.Inference/Tokenize", prompt.replace(b"word ", b"\xff\xfe\xfd\xfc ")
    infer = kserve.ModelInferRequest(model_name="small")
    infer.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    infer.raw_input_contents.append(_LONG.to_bytes(4, "little") + b"\xff" * _LONG)
    yield "/inference.GRPCInferenceService/ModelInfer", infer.SerializeToString()


def connections(seed):
    """What is sent as it is, over a TCP connection to either port: no protocol at all, or a broken one."""
    rng = random.Random(seed)
    post = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
    body = json.dumps(_GOOD[HTTP_PATHS[0]]).encode()
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    return [
        b"",
        b"\x00",
        b"\r\n" * 2000,
        rng.randbytes(3000),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(200),  # the hello of TLS
        preface,
        preface + rng.randbytes(500),
        preface + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00" + b"\xff\xff\xff\x01\x05\x00\x00\x00\x01" + b"x" * 500,
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET " + b"/x" * 100_000 + b" HTTP/1.1\r\n\r\n",
        post + b"X: " + b"y" * 200_000 + b"\r\n\r\n",
        post + b"X" * 5000,
        post + b"Content-Length: 1000\r\n\r\n" + body,
        post + b"Content-Length: 20\r\n\r\n" + body,
        post + b"Content-Length: -5\r\n\r\n" + body,
        post + b"Content-Length: many\r\n\r\n" + body,
        post + b"Content-Length: 99999999999999999999999\r\n\r\n" + body,
        post + b"Content-Length: 5\r\nContent-Length: 7\r\n\r\n" + body,
        post + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + body,
        post + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{",
        post + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n" + body,
        post + b"Expect: 100-continue\r\nContent-Length: 500\r\n\r\n",
        post + b"Host: y\r\n\xff\xfe: \xff\r\nContent-Length: 0\r\n\r\n",
        b"GET /v1/models/%ff%fe%00/../x HTTP/1.1\r\nHost: \xff\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    ]


def send_raw(address, data):
    """A connection on which `data` was sent, as far as the other side took it; it stays open."""
    connection = socket.create_connection(address, 10)
    with contextlib.suppress(OSError):  # refused before its end, which is as good as an answer
        connection.sendall(data)
    return connection


def statuses(connection, seconds):
    """HTTP status codes of what comes back until the other side closes, or is silent for `seconds`."""
    connection.settimeout(seconds)
    received = b""
    with contextlib.suppress(OSError):
        while part := connection.recv(65536):
            received += part
    return [int(line.split()[1]) for line in received.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]


async def post(client: httpx.AsyncClient, path, body):
    """The response to a body."""
    return await client.post(path, content=body, headers={"content-type": "application/json"})


def scrambled(rng, data):
    """`data` with one to four of its bytes changed, lost or doubled."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(changed))
        match rng.randrange(3):
            case 0:
                changed[place] = rng.randrange(256)
            case 1:
                del changed[place]
            case _:
                changed[place:place] = changed[place : place + 1] * rng.randint(1, 3)
    return bytes(changed)
