"""Health, reflection, API keys, limits, and the end of a server."""

import asyncio
import socket

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub

from jaxdual.engine.supervisor import EngineState
from jaxdual.served_models import ServedModels
from server.grpc import create_server
from server.metrics import Metrics
from server.proto.jaxdual.v1 import inference_pb2 as pb
from server.proto.kserve import open_inference_pb2 as kserve
from server.proto.kserve.open_inference_pb2_grpc import GRPCInferenceServiceStub
from tests.server.grpc.face import Scripted, in_loop, read_all, serving, status, until

SERVICES = {
    "jaxdual.v1.Inference",
    "inference.GRPCInferenceService",
    "grpc.health.v1.Health",
    "grpc.reflection.v1alpha.ServerReflection",
}
SERVING, NOT_SERVING = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING
ONE_TOKEN = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5]), sampling_params=pb.SamplingParams(max_tokens=1))


@pytest.mark.parametrize("state", EngineState)
@in_loop
async def test_health_is_serving_only_while_the_engine_serves(state):
    async with serving() as face:
        face.llm.set_state(state)
        for service in ("", *SERVICES):
            answer = await HealthStub(face.channel).Check(HealthCheckRequest(service=service))
            assert answer.status == (SERVING if state is EngineState.SERVING else NOT_SERVING)
        unknown = HealthStub(face.channel).Check(HealthCheckRequest(service="x"))
        assert (await status(unknown))[0] is grpc.StatusCode.NOT_FOUND


@in_loop
async def test_watchers_are_told_of_changes_also_when_others_leave():
    async with serving() as face:
        watches = [HealthStub(face.channel).Watch(HealthCheckRequest()) for _ in range(3)]
        for watch in watches:
            assert (await watch.read()).status == SERVING
        watches[0].cancel()
        face.llm.set_state(EngineState.RESTARTING)
        for watch in watches[1:]:
            assert (await watch.read()).status == NOT_SERVING
        face.llm.set_state(EngineState.WARMING)
        face.llm.set_state(EngineState.SERVING)
        for watch in watches[1:]:
            assert (await watch.read()).status == SERVING
        unknown = HealthStub(face.channel).Watch(HealthCheckRequest(service="x"))
        assert (await unknown.read()).status == HealthCheckResponse.SERVICE_UNKNOWN


@in_loop
async def test_reflection_lists_every_service_and_gives_its_file():
    async with serving() as face:
        reflect = ServerReflectionStub(face.channel).ServerReflectionInfo
        (answer,) = await read_all(reflect(iter([ServerReflectionRequest(list_services="")])))
        assert {service.name for service in answer.list_services_response.service} == SERVICES
        for name in SERVICES:
            (answer,) = await read_all(reflect(iter([ServerReflectionRequest(file_containing_symbol=name)])))
            files = [
                FileDescriptorProto.FromString(data) for data in answer.file_descriptor_response.file_descriptor_proto
            ]
            assert name in {f"{file.package}.{service.name}" for file in files for service in file.service}


@in_loop
async def test_a_key_is_wanted_of_all_but_health_and_reflection():
    async with serving(api_key="secret") as face:
        infer = GRPCInferenceServiceStub(face.channel)
        for given in (None, [("authorization", "Bearer wrong")], [("authorization", "secret")]):
            for call in (
                face.stub.GenerateUnary(ONE_TOKEN, metadata=given),
                read_all(face.stub.Generate(ONE_TOKEN, metadata=given)),
                infer.ServerLive(kserve.ServerLiveRequest(), metadata=given),
                read_all(infer.ModelStreamInfer(iter([kserve.ModelInferRequest()]), metadata=given)),
            ):
                assert (await status(call))[0] is grpc.StatusCode.UNAUTHENTICATED
        right = [("authorization", "Bearer secret")]
        assert (await face.stub.GenerateUnary(ONE_TOKEN, metadata=right)).usage.completion_tokens == 1
        assert len(await read_all(face.stub.Generate(ONE_TOKEN, metadata=right))) == 1
        assert (await HealthStub(face.channel).Check(HealthCheckRequest())).status == SERVING
        reflect = ServerReflectionStub(face.channel).ServerReflectionInfo
        await read_all(reflect(iter([ServerReflectionRequest(list_services="")])))
        unknown = face.channel.unary_unary("/jaxdual.v1.Inference/Nothing")
        assert (await status(unknown(b"")))[0] is grpc.StatusCode.UNIMPLEMENTED


@in_loop
async def test_a_message_above_the_limit_is_refused_and_one_below_is_read():
    async with serving(max_message_bytes=100_000) as face:
        within = pb.TokenizeRequest(text="a " * 1_000)
        assert len((await face.stub.Tokenize(within)).token_ids) >= 1_000
        above = pb.TokenizeRequest(text="a" * 200_000)
        assert (await status(face.stub.Tokenize(above)))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED


@in_loop
async def test_a_port_in_use_is_an_error():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        models = ServedModels(Scripted())
        with pytest.raises(OSError, match="listen"):
            create_server(models, Metrics(models), f"127.0.0.1:{taken.getsockname()[1]}")
    async with serving() as face:
        with pytest.raises(OSError, match="listen"):
            create_server(ServedModels(face.llm), face.metrics, f"127.0.0.1:{face.server.port}")


@in_loop
async def test_stopping_lets_requests_finish_and_ends_watches():
    async with serving() as face:
        watch = HealthStub(face.channel).Watch(HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        face.llm.hold()
        finishing = asyncio.ensure_future(read_all(face.stub.Generate(ONE_TOKEN)))
        await until(lambda: face.llm.num_unfinished == 1, "the request")
        stopping = asyncio.ensure_future(face.server.stop(20))
        assert (await watch.read()).status == NOT_SERVING
        assert await watch.read() is grpc.aio.EOF
        assert not stopping.done()
        face.llm.go()
        assert (await finishing)[-1].usage.completion_tokens == 1
        await stopping


@in_loop
async def test_stopping_ends_what_does_not_finish():
    async with serving() as face:
        face.llm.hold()
        ending = asyncio.ensure_future(status(read_all(face.stub.Generate(ONE_TOKEN))))
        await until(lambda: face.llm.num_unfinished == 1, "the request")
        await face.server.stop(0.1)
        await ending
        assert face.llm.num_unfinished == 0
