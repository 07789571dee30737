"""What every call of a face goes through: the API key, messages that are none, and failures told as a status."""

from __future__ import annotations

import hmac
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError

from server.grpc.errors import CallError, refusal_of, status_of

if TYPE_CHECKING:
    from server.metrics import Metrics

type _Behaviour = Callable[[Any, grpc.aio.ServicerContext], Any]


class Malformed:
    """Stands in for a message that is no valid protobuf message of its type."""

    def check(self) -> None:
        raise CallError(grpc.StatusCode.INVALID_ARGUMENT, "the request is not a valid message of its type")


class CallGuard(grpc.aio.ServerInterceptor):
    """Guards every call.

    Handlers of faces are coroutines that write to their context, so that a cancelled call unwinds them at once, and
    that expect `Malformed` in a stream of requests. Those of other services may be async generators, and never see it.

    Args:
      faces: full names of the services that want a key.
      api_key: wanted as metadata `authorization: Bearer KEY`; None to let everybody in.
      metrics: counts refusals.
    """

    def __init__(self, faces: Collection[str], api_key: str | None, metrics: Metrics) -> None:
        self._faces = frozenset(faces)
        self._authorization = None if api_key is None else f"Bearer {api_key}".encode()
        self._metrics = metrics
        self._handlers: dict[str, grpc.RpcMethodHandler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """The guarded handler of the called method."""
        method: str = details.method
        guarded = self._handlers.get(method)
        is_face = method.split("/")[1] in self._faces
        if guarded is None:
            handler = await continuation(details)
            if handler is None:
                return None
            guarded = self._handlers[method] = self._guard(handler, is_face=is_face)
        if is_face and self._authorization is not None and not self._admits(details):
            self._metrics.refused("unauthorized")
            return _REFUSALS[guarded.request_streaming]
        return guarded

    def _admits(self, details: grpc.HandlerCallDetails) -> bool:
        given = next((value for key, value in details.invocation_metadata or () if key == "authorization"), "")
        given_bytes = given if isinstance(given, bytes) else given.encode(errors="replace")
        return hmac.compare_digest(given_bytes, self._authorization or b"")

    def _guard(self, handler: grpc.RpcMethodHandler, *, is_face: bool) -> grpc.RpcMethodHandler:
        behaviour: _Behaviour
        if handler.request_streaming:
            make, behaviour = grpc.stream_stream_rpc_method_handler, handler.stream_stream
        elif handler.response_streaming:
            make, behaviour = grpc.unary_stream_rpc_method_handler, handler.unary_stream
        else:
            make, behaviour = grpc.unary_unary_rpc_method_handler, handler.unary_unary

        async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
            try:
                if isinstance(request, Malformed):
                    request.check()
                if is_face or not handler.request_streaming:
                    return await behaviour(request, context)
                async for response in behaviour(_checked(request), context):
                    await context.write(response)
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                count_refusal(error, self._metrics, request)
                await context.abort(*status_of(error))

        return make(call, _lenient(handler.request_deserializer), handler.response_serializer)


def count_refusal(error: Exception, metrics: Metrics, request: Any) -> None:
    """Counts a request that was not taken, for the model that it names."""
    reason = refusal_of(error)
    if reason is not None:
        metrics.refused(reason, getattr(request, "model", None) or getattr(request, "model_name", None))


def _lenient(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Gives `Malformed` where `deserialize` raises, which gRPC would tell the client as an unknown error."""

    def deserialize_or_mark(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return Malformed()

    return deserialize_or_mark


async def _checked(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        if isinstance(request, Malformed):
            request.check()
        yield request


async def _refuse(request: object, context: grpc.aio.ServicerContext) -> None:
    await context.abort(
        grpc.StatusCode.UNAUTHENTICATED, "a valid API key is needed, as metadata `authorization: Bearer KEY`"
    )


# By whether the client streams; a refusal has no answer, so one form serves single and streamed answers alike.
_REFUSALS = {
    False: grpc.unary_stream_rpc_method_handler(_refuse),
    True: grpc.stream_stream_rpc_method_handler(_refuse),
}
