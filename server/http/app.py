"""The HTTP application: routes, API key, request ids, and errors in OpenAI's form."""

from __future__ import annotations

import hmac
import importlib.metadata
import re
import time
import uuid
from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxdual.cascade.serving.service import CascadeLLM
from jaxdual.engine.supervisor import EngineState
from jaxdual.errors import NotServingError, UnknownModelError
from jaxdual.openai_protocol import ProtocolError, parse_chat, parse_completion
from jaxdual.served_models import Model, ServedModels
from server.http.errors import JSONResponse, problem_of, wrong_key
from server.http.generation import GenerationEndpoint
from server.metrics import Metrics

DEFAULT_MAX_BODY_BYTES = 32 * 2**20
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,256}")


def create_app(
    models: ServedModels,
    metrics: Metrics,
    *,
    api_key: str | None = None,
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES,
) -> Starlette:
    """The OpenAI-compatible application over models.

    Args:
        models: what is served; of the loop that the application runs on.
        metrics: of the server.
        api_key: what clients of `/v1` must bring as `Authorization: Bearer KEY`; None lets everybody in.
        max_body_bytes: of a request.

    Raises:
        ValueError: an empty key, or a limit below 1.
    """
    if api_key == "":
        raise ValueError("api_key='' must have at least one character; None lets everybody in")
    if max_body_bytes < 1:
        raise ValueError(f"max_body_bytes={max_body_bytes} must be at least 1")
    about = _About(models, metrics)
    chat = GenerationEndpoint(models, metrics, parse_chat, max_body_bytes)
    completions = GenerationEndpoint(models, metrics, parse_completion, max_body_bytes)
    application = Starlette(
        routes=[
            Route("/v1/models", about.models, methods=["GET"]),
            Route("/v1/models/{model:path}", about.model, methods=["GET"]),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/health", about.health, methods=["GET"]),
            Route("/metrics", about.metrics, methods=["GET"]),
            Route("/version", about.version, methods=["GET"]),
        ],
        middleware=[Middleware(_Door, metrics=metrics, api_key=api_key)],
        exception_handlers={
            HTTPException: _show_problem,
            ProtocolError: _show_problem,
            NotServingError: _show_problem,
            UnknownModelError: _show_problem,
            Exception: _show_problem,
        },
    )
    application.router.redirect_slashes = False
    return application


class _About:
    """The endpoints that tell what is served, and how it does."""

    def __init__(self, models: ServedModels, metrics: Metrics) -> None:
        self._models = models
        self._metrics = metrics
        self._created = int(time.time())
        self._version = importlib.metadata.version("jaxdual")

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card(model) for model in self._models.all]})

    async def model(self, request: Request) -> Response:
        return JSONResponse(self._card(self._models.get(request.path_params["model"])))

    async def health(self, request: Request) -> Response:
        state = self._models.state
        content: dict[str, object] = {"status": state.value}
        if isinstance(self._models.default, CascadeLLM):
            # A tier that has stopped for good does not make it unhealthy: here is where it shows.
            content["tiers"] = {name: engine.state.value for name, engine in self._models.default.engines.items()}
        return JSONResponse(content, 200 if state is EngineState.SERVING else 503)

    async def metrics(self, request: Request) -> Response:
        content, content_type = self._metrics.expose(request.headers.get("accept", ""))
        return Response(content, headers={"Content-Type": content_type})

    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": self._version})

    def _card(self, model: Model) -> dict[str, object]:
        return {
            "id": model.served_model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "jaxdual",
            "max_model_len": model.max_model_len,
            **({"tiers": model.tier_names} if isinstance(model, CascadeLLM) else {}),
        }


class _Door:
    """Checks the API key of requests to `/v1`, and gives each response the id of its request."""

    def __init__(self, app: ASGIApp, metrics: Metrics, api_key: str | None) -> None:
        self._app = app
        self._metrics = metrics
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        if scope["path"].startswith("/v1/") and not self._may_enter(headers.getlist("authorization")):
            self._metrics.refused("unauthorized")
            await wrong_key().response()(scope, receive, send_with_id)
            return
        await self._app(scope, receive, send_with_id)

    def _may_enter(self, authorization: Sequence[str]) -> bool:
        if self._expected is None:
            return True
        return len(authorization) == 1 and hmac.compare_digest(authorization[0].encode("latin-1"), self._expected)


async def _show_problem(request: Request, error: Exception) -> Response:
    return problem_of(error).response()
