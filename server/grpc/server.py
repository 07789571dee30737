"""Puts the gRPC services together."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from jaxdual.served_models import ServedModels
from server.grpc.guard import CallGuard
from server.grpc.health import SERVICE_NAME as HEALTH_SERVICE
from server.grpc.health import HealthServicer
from server.grpc.inference import InferenceServicer
from server.grpc.kserve import KServeServicer
from server.metrics import Metrics
from server.proto.jaxdual.v1 import inference_pb2, inference_pb2_grpc
from server.proto.kserve import open_inference_pb2, open_inference_pb2_grpc

MAX_MESSAGE_BYTES = 64 * 2**20
KEEPALIVE_SECONDS = 60.0
KEEPALIVE_TIMEOUT_SECONDS = 20.0
_SHORTEST_CLIENT_PING_SECONDS = 10.0


class GrpcServer:
    """A gRPC server of models; made by `create_server`.

    Attributes:
      server: the server itself.
      port: that it listens on.
    """

    def __init__(self, server: grpc.aio.Server, port: int, health: HealthServicer) -> None:
        self.server = server
        self.port = port
        self._health = health

    async def start(self) -> None:
        """Begins to answer calls. Health is NOT_SERVING until the engine serves."""
        await self.server.start()

    async def stop(self, grace: float) -> None:
        """Ends the server: health turns NOT_SERVING, new calls are refused, those left after `grace` seconds cancelled.

        `AsyncLLM.drain` before it lets requests finish.
        """
        self._health.close()
        await self.server.stop(grace)


def create_server(
    models: ServedModels,
    metrics: Metrics,
    address: str,
    *,
    api_key: str | None = None,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    keepalive_seconds: float = KEEPALIVE_SECONDS,
    keepalive_timeout_seconds: float = KEEPALIVE_TIMEOUT_SECONDS,
    credentials: grpc.ServerCredentials | None = None,
) -> GrpcServer:
    """A server with jaxdual.v1, the Open Inference Protocol, health and reflection, on the running loop; not started.

    Args:
      models: started or not; calls that need one are UNAVAILABLE before its start.
      metrics: counts requests.
      address: "host:port"; port 0 takes a free one.
      api_key: wanted of all calls but health and reflection; None for none.
      max_message_bytes: longest message in each direction.
      keepalive_seconds: silence of a connection after which it is tried.
      keepalive_timeout_seconds: how long the answer may take before the connection, with its calls, is given up.
      credentials: for TLS; None for a plain connection.

    Raises:
      OSError: the address can't be listened on.
    """
    options = [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", round(keepalive_seconds * 1000)),
        ("grpc.keepalive_timeout_ms", round(keepalive_timeout_seconds * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", round(_SHORTEST_CLIENT_PING_SECONDS * 1000)),
        # Else a second server on the same port would take half of the first one's calls.
        ("grpc.so_reuseport", 0),
    ]
    faces = [
        inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name,
        open_inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name,
    ]
    server = grpc.aio.server(interceptors=[CallGuard(faces, api_key, metrics)], options=options)
    services = [*faces, HEALTH_SERVICE, reflection.SERVICE_NAME]
    health = HealthServicer(models, services)
    inference_pb2_grpc.add_InferenceServicer_to_server(InferenceServicer(models, metrics), server)
    open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(KServeServicer(models, metrics), server)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(reflection.aio.ReflectionServicer(services), server)
    try:
        port = (
            server.add_insecure_port(address) if credentials is None else server.add_secure_port(address, credentials)
        )
    except RuntimeError as error:
        raise OSError(f"gRPC can't listen on {address!r}: {error}") from None
    return GrpcServer(server, port, health)
