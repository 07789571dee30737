"""What goes wrong, as OpenAI's error objects with their HTTP statuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from jaxdual.errors import EngineDeadError, NotServingError, QueueFullError, UnknownModelError
from jaxdual.openai_protocol import ProtocolError
from jaxdual.openai_responses import error_body

_RETRY = {"Retry-After": "1"}
_encode = msgspec.json.Encoder().encode


class GenerationError(RuntimeError):
    """A request that was taken has ended without its full answer; the message says why."""


class BodyTooLargeError(ValueError):
    """The body has more bytes than are accepted."""


class UnsupportedEncodingError(ValueError):
    """The body is compressed."""


@dataclass(frozen=True, slots=True)
class Problem:
    """An error as a client sees it.

    Attributes:
        status: the HTTP status.
        body: OpenAI's error object.
        reason: a short word for the metrics.
        headers: further headers of the response.
    """

    status: int
    body: dict[str, Any]
    reason: str
    headers: Mapping[str, str] = field(default_factory=dict)

    def response(self) -> Response:
        """The whole response."""
        return JSONResponse(self.body, self.status, self.headers)


class JSONResponse(Response):
    """A response whose content is plain data."""

    media_type = "application/json"

    def __init__(self, content: Any, status_code: int = 200, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(_encode(content), status_code, headers)


def problem_of(error: Exception) -> Problem:
    """The problem that an exception stands for; one that no client can have caused is an internal error."""
    match error:
        case UnknownModelError():
            return Problem(404, error_body(str(error), "model", "model_not_found"), "model_not_found")
        case ProtocolError():
            return Problem(400, error_body(error.message, error.param, error.code), "invalid_request")
        case BodyTooLargeError():
            return Problem(413, error_body(str(error), None, "request_too_large"), "too_large")
        case UnsupportedEncodingError():
            return Problem(415, error_body(str(error), None, "unsupported_encoding"), "invalid_request")
        case QueueFullError():
            return Problem(429, error_body(str(error), None, "queue_full", "rate_limit_error"), "queue_full", _RETRY)
        case NotServingError():
            return Problem(503, error_body(str(error), None, "not_serving", "server_error"), "not_serving", _RETRY)
        case GenerationError() | EngineDeadError():
            return Problem(503, error_body(str(error), None, "engine_error", "server_error"), "engine_error", _RETRY)
        case HTTPException():
            return _of_route(error)
    return Problem(500, error_body("internal error", None, "internal_error", "server_error"), "internal_error")


def wrong_key() -> Problem:
    """A missing or wrong API key."""
    body = error_body("the Authorization header must hold a valid API key, as 'Bearer KEY'", None, "invalid_api_key")
    return Problem(401, body, "unauthorized", {"WWW-Authenticate": "Bearer"})


def _of_route(error: HTTPException) -> Problem:
    codes = {404: "not_found", 405: "method_not_allowed"}
    error_type = "invalid_request_error" if error.status_code < 500 else "server_error"
    message = "there is no such path" if error.status_code == 404 else error.detail
    body = error_body(message, None, codes.get(error.status_code), error_type)
    return Problem(error.status_code, body, "invalid_request", error.headers or {})
