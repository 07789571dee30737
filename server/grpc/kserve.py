"""The Open Inference Protocol: `inference.GRPCInferenceService`, as KServe and Triton speak it."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
from collections.abc import AsyncIterator, Iterable
from contextlib import closing
from typing import TYPE_CHECKING

import grpc

from jaxdual.engine.supervisor import EngineState
from jaxdual.errors import NotServingError, UnknownModelError
from jaxdual.outputs import RequestOutput
from jaxdual.served_models import Model, ServedModels, submit
from server.grpc.deltas import Delta, Deltas
from server.grpc.errors import CallError, raise_if_failed, status_of
from server.grpc.guard import Malformed, count_refusal
from server.grpc.kserve_request import InferRequest, read_request
from server.grpc.kserve_tensors import pack_bytes, pack_int32
from server.proto.kserve import open_inference_pb2 as pb
from server.proto.kserve import open_inference_pb2_grpc

if TYPE_CHECKING:
    from server.metrics import Metrics, ObservedStream

MODEL_VERSION = "1"
_FINAL = "triton_final_response"
_MAX_UNFINISHED_ON_STREAM = 1024
_INPUTS = (
    ("text_input", "BYTES", 1),
    ("input_ids", "INT32", -1),
    ("sampling_parameters", "BYTES", 1),
    ("stream", "BOOL", 1),
    ("exclude_input_in_output", "BOOL", 1),
    ("max_tokens", "INT32", 1),
    ("min_tokens", "INT32", 1),
    ("n", "INT32", 1),
    ("temperature", "FP32", 1),
    ("top_p", "FP32", 1),
    ("top_k", "INT32", 1),
    ("min_p", "FP32", 1),
    ("presence_penalty", "FP32", 1),
    ("frequency_penalty", "FP32", 1),
    ("repetition_penalty", "FP32", 1),
    ("seed", "INT64", 1),
    ("stop", "BYTES", -1),
    ("stop_token_ids", "INT32", -1),
    ("logit_bias", "BYTES", 1),
    ("ignore_eos", "BOOL", 1),
    ("skip_special_tokens", "BOOL", 1),
    ("include_stop_str_in_output", "BOOL", 1),
)
_OUTPUTS = (
    ("text_output", "BYTES", -1),
    ("finish_reason", "BYTES", -1),
    ("output_ids", "INT32", -1),
    ("num_output_tokens", "INT32", -1),
)
_OUTPUT_DATATYPES = {name: datatype for name, datatype, _ in _OUTPUTS}


class KServeServicer(open_inference_pb2_grpc.GRPCInferenceServiceServicer):
    """Serves models; method names and messages are those of open_inference.proto."""

    def __init__(self, models: ServedModels, metrics: Metrics) -> None:
        self._models = models
        self._metrics = metrics
        self._version = importlib.metadata.version("jaxdual")

    async def ServerLive(  # noqa: N802
        self, request: pb.ServerLiveRequest, context: grpc.aio.ServicerContext
    ) -> pb.ServerLiveResponse:
        """Whether the server can still come to serve."""
        return pb.ServerLiveResponse(live=self._models.state is not EngineState.STOPPED)

    async def ServerReady(  # noqa: N802
        self, request: pb.ServerReadyRequest, context: grpc.aio.ServicerContext
    ) -> pb.ServerReadyResponse:
        """Whether it serves, everything compiled."""
        return pb.ServerReadyResponse(ready=self._models.state is EngineState.SERVING)

    async def ModelReady(  # noqa: N802
        self, request: pb.ModelReadyRequest, context: grpc.aio.ServicerContext
    ) -> pb.ModelReadyResponse:
        """Whether it serves the named model; as in Triton, an unknown one is not ready."""
        try:
            ready = self._models.get(request.name).state is EngineState.SERVING
        except (UnknownModelError, NotServingError):
            ready = False
        return pb.ModelReadyResponse(ready=ready and request.version in ("", MODEL_VERSION))

    async def ServerMetadata(  # noqa: N802
        self, request: pb.ServerMetadataRequest, context: grpc.aio.ServicerContext
    ) -> pb.ServerMetadataResponse:
        """Name and version of the server."""
        return pb.ServerMetadataResponse(name="jaxdual", version=self._version, extensions=["parameters"])

    async def ModelMetadata(  # noqa: N802
        self, request: pb.ModelMetadataRequest, context: grpc.aio.ServicerContext
    ) -> pb.ModelMetadataResponse:
        """The tensors that can be given and asked for; of the inputs, one that holds the prompt is enough."""
        self._model(request.name, request.version)
        metadata = pb.ModelMetadataResponse.TensorMetadata
        return pb.ModelMetadataResponse(
            name=request.name,
            versions=[MODEL_VERSION],
            platform="jax",
            inputs=[metadata(name=name, datatype=datatype, shape=[size]) for name, datatype, size in _INPUTS],
            outputs=[metadata(name=name, datatype=datatype, shape=[size]) for name, datatype, size in _OUTPUTS],
        )

    async def ModelInfer(  # noqa: N802
        self, request: pb.ModelInferRequest, context: grpc.aio.ServicerContext
    ) -> pb.ModelInferResponse:
        """The finished request."""
        await self._models.ready()
        model, wanted = self._read(request)
        if wanted.stream:
            raise CallError(grpc.StatusCode.INVALID_ARGUMENT, "stream=true needs ModelStreamInfer")
        until = _deadline(wanted)
        with closing(await self._submit(model, wanted, until)) as stream:
            while await _next(stream, until):
                pass
        raise_if_failed(stream.output)
        return _Responses(request, wanted).make(stream.output, Deltas(wanted.params.n).take(stream.output))

    async def ModelStreamInfer(  # noqa: N802
        self, requests: AsyncIterator[pb.ModelInferRequest | Malformed], context: grpc.aio.ServicerContext
    ) -> None:
        """Answers many requests at once until the client has sent its last and all are answered."""
        writing = asyncio.Lock()  # a call writes one message at a time
        room = asyncio.Semaphore(_MAX_UNFINISHED_ON_STREAM)

        async def answer(request: pb.ModelInferRequest | Malformed) -> None:
            try:
                await self._answer(request, context, writing)
            finally:
                room.release()

        async with asyncio.TaskGroup() as answers:
            async for request in requests:
                await room.acquire()
                answers.create_task(answer(request))

    async def _answer(
        self, request: pb.ModelInferRequest | Malformed, context: grpc.aio.ServicerContext, writing: asyncio.Lock
    ) -> None:
        """Writes all answers of one request of a stream; what goes wrong with it is one of them."""
        head = pb.ModelInferResponse()
        try:
            if isinstance(request, Malformed):
                request.check()
                return
            head = _head(request)
            await self._models.ready()
            model, wanted = self._read(request)
            responses, deltas, until = _Responses(request, wanted), Deltas(wanted.params.n), _deadline(wanted)
            with closing(await self._submit(model, wanted, until)) as stream:
                while output := await _next(stream, until):
                    if wanted.stream is False and not output.finished:
                        continue
                    async with writing:
                        if output.finished:
                            raise_if_failed(output)
                        # Taken only now: what came while others wrote goes into the same message.
                        grown = deltas.take(output)
                        if grown:
                            response = responses.make(output, grown)
                            response.parameters[_FINAL].bool_param = output.finished
                            await context.write(pb.ModelStreamInferResponse(infer_response=response))
        except Exception as error:
            count_refusal(error, self._metrics, request)
            _, message = status_of(error)
            head.parameters[_FINAL].bool_param = True
            async with writing:
                await context.write(pb.ModelStreamInferResponse(error_message=message, infer_response=head))

    async def _submit(self, model: Model, wanted: InferRequest, until: float | None) -> ObservedStream:
        """Queues a request; the caller closes the stream."""
        async with asyncio.timeout_at(until):
            stream = await submit(
                model,
                wanted.prompt,
                wanted.params,
                priority=wanted.priority,
                user=wanted.user,
                options=wanted.cascade,
                left_open=wanted.left_open,
            )
        return self._metrics.observe(stream, model.served_model_name)

    def _read(self, request: pb.ModelInferRequest) -> tuple[Model, InferRequest]:
        model = self._model(request.model_name, request.model_version)
        return model, read_request(request, model.get_default_sampling_params())

    def _model(self, name: str, version: str) -> Model:
        model = self._models.get(name)
        if version not in ("", MODEL_VERSION):
            raise CallError(grpc.StatusCode.NOT_FOUND, f"version {version!r} is not served here; {MODEL_VERSION!r} is")
        return model


def _deadline(wanted: InferRequest) -> float | None:
    """Time of the loop's clock at which the request is given up."""
    return None if wanted.timeout is None else asyncio.get_running_loop().time() + wanted.timeout


async def _next(stream: ObservedStream, until: float | None) -> RequestOutput | None:
    """The next output, None after the last. Only this may be cut short by a timeout, and never a write under way."""
    async with asyncio.timeout_at(until):
        return await anext(stream, None)


def _head(request: pb.ModelInferRequest) -> pb.ModelInferResponse:
    return pb.ModelInferResponse(model_name=request.model_name, model_version=MODEL_VERSION, id=request.id)


class _Responses:
    """Makes the answers of a request.

    Tensors have an element for each of the request's n outputs, an empty one if it has not grown; `output_ids` has the
    token ids of all outputs, of each as many as `num_output_tokens` says.
    """

    def __init__(self, request: pb.ModelInferRequest, wanted: InferRequest) -> None:
        self._wanted = wanted
        prompt = wanted.prompt if wanted.echo and isinstance(wanted.prompt, str) else ""
        self._texts_before = [prompt] * wanted.params.n
        self._head = _head(request)
        for name in wanted.outputs:
            self._head.outputs.add(name=name, datatype=_OUTPUT_DATATYPES[name], shape=[wanted.params.n])

    def make(self, output: RequestOutput, deltas: Iterable[Delta]) -> pb.ModelInferResponse:
        n = self._wanted.params.n
        texts, reasons, counts, ids = self._texts_before, [b""] * n, [0] * n, []
        self._texts_before = [""] * n
        for delta in deltas:
            index = delta.output.index
            texts[index] += delta.text
            counts[index] = len(delta.token_ids)
            ids += delta.token_ids
            if delta.finished:
                reasons[index] = (delta.output.finish_reason or "").encode()
        response = pb.ModelInferResponse()
        response.CopyFrom(self._head)
        for tensor in response.outputs:
            match tensor.name:
                case "text_output":
                    raw = pack_bytes(text.encode() for text in texts)
                case "finish_reason":
                    raw = pack_bytes(reasons)
                case "num_output_tokens":
                    raw = pack_int32(counts)
                case _:
                    raw = pack_int32(ids)
                    tensor.shape[0] = len(ids)
            response.raw_output_contents.append(raw)
        if output.finished:
            response.parameters["prompt_tokens"].int64_param = output.num_prompt_tokens
            response.parameters["completion_tokens"].int64_param = output.num_output_tokens
            response.parameters["cached_tokens"].int64_param = output.num_cached_tokens
            if output.decision is not None:
                response.parameters["cascade_tier"].string_param = output.decision.tier
                response.parameters["cascade"].string_param = json.dumps(output.decision.as_json())
        return response
