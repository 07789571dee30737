"""Streams completions over gRPC (`jaxdual.v1.Inference`)."""

from __future__ import annotations

import time

import grpc

from bench.load import LoadRequest, Record
from server.proto.jaxdual.v1 import inference_pb2 as messages
from server.proto.jaxdual.v1 import inference_pb2_grpc as services


class GrpcClient:
    """`Generate` calls over one channel.

    Args:
      address: "HOST:PORT".
      api_key: sent as bearer token if given.
    """

    def __init__(self, address: str, api_key: str | None = None) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self._stub = services.InferenceStub(self._channel)
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()

    async def send(self, request: LoadRequest) -> Record:
        """Streams one request to its end; failures are in the record."""
        message = messages.GenerateRequest(
            sampling_params=messages.SamplingParams(max_tokens=request.output, temperature=0, ignore_eos=True)
        )
        if isinstance(request.prompt, str):
            message.text = request.prompt
        else:
            message.token_ids.ids.extend(request.prompt)
        record = Record(time.monotonic())
        try:
            async for response in self._stub.Generate(message, metadata=self._metadata):
                if response.outputs:
                    record.outputs.append(time.monotonic())
                if response.HasField("usage"):
                    record.tokens = response.usage.completion_tokens
        except grpc.aio.AioRpcError as error:
            record.status = "refused" if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED else "error"
            record.detail = f"{error.code().name}: {error.details()}"[:200]
        else:
            if record.outputs and record.tokens:
                record.status = "ok"
            else:
                record.detail = "the stream ended without usage"
        record.ended = time.monotonic()
        return record

    async def close(self) -> None:
        """Closes the channel."""
        await self._channel.close()
