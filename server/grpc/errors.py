"""Which gRPC status a failure is."""

from __future__ import annotations

import logging

import grpc

from jaxdual.errors import EngineDeadError, NotServingError, QueueFullError, UnknownModelError
from jaxdual.outputs import RequestOutput

# The status message travels percent-encoded, up to three times as long, in headers that clients limit to 8 KiB.
_MAX_DETAILS_BYTES = 2048

_logger = logging.getLogger(__name__)


class CallError(Exception):
    """A call that ends with this status."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


def status_of(error: Exception) -> tuple[grpc.StatusCode, str]:
    """Status and message that a client is told; what is a bug here is logged and told as INTERNAL, without details."""
    match error:
        case CallError():
            code = error.code
        case UnknownModelError():
            return grpc.StatusCode.NOT_FOUND, _cut(f"model {error.name!r} is not served here; {error.served}")
        case QueueFullError():
            code = grpc.StatusCode.RESOURCE_EXHAUSTED
        case NotServingError() | EngineDeadError():
            code = grpc.StatusCode.UNAVAILABLE
        case ValueError():
            code = grpc.StatusCode.INVALID_ARGUMENT
        case TimeoutError():
            return grpc.StatusCode.DEADLINE_EXCEEDED, "the request's timeout is over"
        case _:
            _logger.error("a gRPC call failed", exc_info=error)
            return grpc.StatusCode.INTERNAL, "internal error; the server's log has the details"
    return code, _cut(str(error))


def refusal_of(error: Exception) -> str | None:
    """The word by which metrics count a request that was not taken; None for one that was taken and failed then."""
    match error:
        case QueueFullError():
            return "queue_full"
        case NotServingError():
            return "not_serving"
        case CallError(code=grpc.StatusCode.UNAVAILABLE) | EngineDeadError() | TimeoutError():
            return None
        case CallError(code=grpc.StatusCode.NOT_FOUND) | UnknownModelError():
            return "model_not_found"
        case CallError() | ValueError():
            return "invalid_request"
    return "internal_error"


def raise_if_failed(output: RequestOutput) -> None:
    """Raises `CallError` if the engine's failure has ended the request."""
    for completion in output.outputs:
        if completion.finish_reason == "error":
            raise CallError(grpc.StatusCode.UNAVAILABLE, completion.error or "the engine failed")


def _cut(message: str) -> str:
    encoded = message.encode(errors="replace")
    if len(encoded) <= _MAX_DETAILS_BYTES:
        return encoded.decode()
    return encoded[:_MAX_DETAILS_BYTES].decode(errors="ignore") + "..."
