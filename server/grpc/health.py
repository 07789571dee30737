"""`grpc.health.v1.Health`, which follows the state of the engine.

The servicer of grpcio-health-checking loses watchers of a service when another one of them leaves (1.81), and a watcher
that does not read holds up the rest; its messages are used here, and its servicer is not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from jaxdual.engine.supervisor import EngineState

if TYPE_CHECKING:
    from jaxdual.served_models import ServedModels

type _Status = health_pb2.HealthCheckResponse.ServingStatus

_Response = health_pb2.HealthCheckResponse
SERVICE_NAME: str = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name


class HealthServicer(health_pb2_grpc.HealthServicer):
    """SERVING while the models' state is `EngineState.SERVING`, and NOT_SERVING in all others.

    Args:
      models: whose state it tells.
      services: names that can be asked for, apart from "" for the whole server.
    """

    def __init__(self, models: ServedModels, services: Iterable[str]) -> None:
        self._models = models
        self._services = frozenset(("", *services))
        self._watchers: set[asyncio.Event] = set()
        self._closed = False
        models.on_state(lambda state: self._wake())

    def close(self) -> None:
        """Tells NOT_SERVING from now on and ends all watches, which would hold up the server's end."""
        self._closed = True
        self._wake()

    async def Check(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        """The status now; NOT_FOUND for a service that is not here."""
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service[:256]!r} here")
        return _Response(status=self._status(request.service))

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> None:
        """The status now and whenever it changes; SERVICE_UNKNOWN for a service that is not here."""
        changed = asyncio.Event()
        self._watchers.add(changed)
        told = None
        try:
            while True:
                changed.clear()
                status = self._status(request.service)
                if status != told:
                    await context.write(_Response(status=status))
                    told = status
                    continue  # it may have changed meanwhile
                if self._closed:
                    return
                await changed.wait()
        finally:
            self._watchers.discard(changed)

    def _status(self, service: str) -> _Status:
        if service not in self._services:
            return _Response.SERVICE_UNKNOWN
        serving = self._models.state is EngineState.SERVING and not self._closed
        return _Response.SERVING if serving else _Response.NOT_SERVING

    def _wake(self) -> None:
        for changed in self._watchers:
            changed.set()
