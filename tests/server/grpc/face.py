"""A gRPC server over a scripted engine, on the loop of the test, and a channel to it."""

import asyncio
import contextlib
import functools
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc

from jaxdual.outputs import EngineInfo
from jaxdual.served_models import ServedModels
from server.grpc import GrpcServer, create_server
from server.metrics import Metrics
from server.proto.jaxdual.v1.inference_pb2_grpc import InferenceStub
from tests.server.http.scripted import ScriptedLLM

ROOT = Path(__file__).parents[3]
DEADLINE = 30.0  # seconds; reached only by a failing test


class Scripted(ScriptedLLM):
    """The scripted engine, with what only the gRPC face asks of it."""

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            model_folder="nowhere",
            served_model_name=self.served_model_name,
            family="script",
            num_layers=3,
            vocab_size=2048,
            dtype="float32",
            device="none",
            max_model_len=self.max_model_len,
            max_num_seqs=1000,
            block_size=16,
            fingerprint="00",
            default_sampling={"temperature": 1.0},
        )

    def abort(self, request_id: str) -> bool:
        before = self.num_unfinished
        super().abort(request_id)
        return self.num_unfinished < before


class Face:
    """What a test needs of a running server."""

    def __init__(self, llm: Any, metrics: Metrics, server: GrpcServer, channel: grpc.aio.Channel) -> None:
        self.llm, self.metrics, self.server, self.channel = llm, metrics, server, channel
        self.stub = InferenceStub(channel)

    def sample(self, name: str, **labels: str) -> float | None:
        """A figure of the metrics."""
        labels["model_name"] = self.llm.served_model_name
        return self.metrics.registry.get_sample_value(f"jaxdual:{name}", labels)

    async def tritonclient(self, code: str) -> Any:
        """Runs code with a stock `client`, and returns what the code has given to `show`.

        It runs in a process of its own, since tritonclient's protobuf definitions clash with the server's.
        """
        prelude = (
            "import json, queue, sys, time\n"
            "import numpy as np\n"
            "import tritonclient.grpc as triton\n"
            "from tritonclient.utils import InferenceServerException\n"
            "def show(value): print(json.dumps(value))\n"
            "def text(prompt):\n"
            "    tensor = triton.InferInput('text_input', [1], 'BYTES')\n"
            "    tensor.set_data_from_numpy(np.array([prompt.encode()], dtype=np.object_))\n"
            "    return tensor\n"
            f"client = triton.InferenceServerClient('127.0.0.1:{self.server.port}')\n"
        )
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", prelude + code, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        try:
            out, err = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
        assert process.returncode == 0, err.decode()
        return [json.loads(line) for line in out.decode().splitlines()]


@contextlib.asynccontextmanager
async def serving(llm: Any = None, **options: Any) -> AsyncIterator[Face]:
    llm = llm or Scripted()
    models = ServedModels(llm)
    metrics = Metrics(models)
    server = create_server(models, metrics, "127.0.0.1:0", **options)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield Face(llm, metrics, server, channel)
    finally:
        await server.stop(0)


def in_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Runs an asynchronous test on a loop of its own."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), DEADLINE))

    return run


async def until(condition: Callable[[], bool], what: str) -> None:
    """Waits until the condition holds."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, f"waited 10 s for: {what}"
        await asyncio.sleep(0.002)


async def status(call: Awaitable[object]) -> tuple[grpc.StatusCode, str]:
    """The status that a call fails with."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    raise AssertionError("the call did not fail")


async def read_all(call: Any) -> list[Any]:
    return [message async for message in call]
