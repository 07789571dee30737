"""The gRPC faces: jaxdual.v1, the Open Inference Protocol, health and reflection."""

from server.grpc.server import GrpcServer, create_server

__all__ = ["GrpcServer", "create_server"]
