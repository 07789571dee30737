"""The endpoints that generate text: `/v1/completions` and `/v1/chat/completions`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
from starlette.types import Message, Receive, Scope, Send

from jaxdual.decoding.dysco import DyscoError
from jaxdual.errors import PromptTooLongError, UnknownModelError
from jaxdual.front import TokenizedPrompt
from jaxdual.openai_protocol import ChatRequest, CompletionRequest, ProtocolError
from jaxdual.openai_responses import chat_response, completion_response
from jaxdual.openai_stream import ChatStream, CompletionStream
from jaxdual.outputs import RequestOutput
from jaxdual.sampling_params import RECOMMENDED_SAMPLING
from jaxdual.served_models import Model, ServedModels
from jaxdual.tokenizer import Tokenizer, TokenizerError
from server.http.connection import DisconnectedError, decode_json, read_body, unless_disconnected
from server.http.errors import GenerationError, JSONResponse, problem_of
from server.http.streams import merge
from server.metrics import Metrics, ObservedStream

_LONG_BODY = 65536  # bytes from which a body is checked off the loop, where it holds up nobody's tokens
_EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_logger = logging.getLogger(__name__)
_encode = msgspec.json.Encoder().encode

type Parse = Callable[[Any, Mapping[str, Any]], ChatRequest | CompletionRequest]


class GenerationEndpoint:
    """An ASGI application that answers one kind of generation request.

    Args:
        models: generate.
        metrics: counts.
        parse: checks a body: `parse_chat` or `parse_completion`.
        max_body_bytes: of a request.
    """

    def __init__(self, models: ServedModels, metrics: Metrics, parse: Parse, max_body_bytes: int) -> None:
        self._models = models
        self._metrics = metrics
        self._parse = parse
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = _Reply(send)
        try:
            body = await read_body(scope, receive, self._max_body_bytes)
            await unless_disconnected(self._answer(body, scope, receive, reply), receive)
        except DisconnectedError:
            self._metrics.refused("disconnected", reply.model)
        except Exception as error:
            problem = problem_of(error)
            if problem.status == 500:
                _logger.exception("a request failed")
            if not isinstance(error, GenerationError):  # one that was taken counts as finished, by reason
                self._metrics.refused(problem.reason, reply.model)
            if reply.started:
                await reply.event(problem.body)
                await reply.end()
            else:
                await problem.response()(scope, receive, send)

    async def _answer(self, body: bytes, scope: Scope, receive: Receive, reply: _Reply) -> None:
        await self._models.ready()
        if len(body) < _LONG_BODY:
            model, request = self._request(body)
        else:
            model, request = await asyncio.to_thread(self._request, body)
        reply.model = model.served_model_name
        prefix = "chatcmpl" if isinstance(request, ChatRequest) else "cmpl"
        response_id = f"{prefix}-{uuid.uuid4().hex}"
        created = int(time.time())
        with contextlib.ExitStack() as closing:
            streams: list[ObservedStream] = []
            prompts = _prompts(request)
            _check_door(model, request, len(prompts))
            for number, prompt in enumerate(prompts):
                streams.append(await self._submit(model, request, prompt, f"{response_id}-{number}"))
                closing.callback(streams[-1].close)
            if request.stream:
                await _stream(model, request, streams, response_id, created, reply)
                return
            async with contextlib.aclosing(merge(streams)) as changes:
                async for numbers in changes:
                    _check(streams, numbers)
        content = _whole(model, request, [stream.output for stream in streams], response_id, created)
        await JSONResponse(content)(scope, receive, reply.send)

    def _request(self, body: bytes) -> tuple[Model, ChatRequest | CompletionRequest]:
        """What a body asks for, and of which model."""
        try:
            fields = decode_json(body)
            named = fields.get("model") if isinstance(fields, dict) else None
            try:
                model = self._models.get(named if isinstance(named, str) else None)
            except UnknownModelError:
                self._parse(fields, {})  # what else is wrong with the body is told first
                raise
            recommended = model.get_default_sampling_params()
            return model, self._parse(fields, {name: getattr(recommended, name) for name in RECOMMENDED_SAMPLING})
        except RecursionError:
            raise ProtocolError("the request body is nested too deeply", None, "invalid_json") from None

    async def _submit(
        self,
        model: Model,
        request: ChatRequest | CompletionRequest,
        prompt: str | tuple[int, ...] | None,
        request_id: str,
    ) -> ObservedStream:
        """Sends one prompt to a model; None stands for the prompt that the messages of a chat make."""
        try:
            tokenized = await _tokenize(model, request, prompt)
            stream = await model.submit(tokenized, request.params, request_id, user=request.user)
            return self._metrics.observe(stream, model.served_model_name)
        except PromptTooLongError as error:
            param = "messages" if isinstance(request, ChatRequest) else "prompt"
            raise ProtocolError(str(error), param, "context_length_exceeded") from None
        except DyscoError as error:
            raise ProtocolError(str(error), "dysco") from None
        except ValueError as error:
            param = "messages" if isinstance(request, ChatRequest) else "prompt"
            raise ProtocolError(str(error), param if isinstance(error, TokenizerError) else None) from None


class _Reply:
    """The response, and whether it has begun; events go out as soon as there are some.

    Attributes:
        model: name of the model that answers; None while it is not known.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False
        self.model: str | None = None

    async def send(self, message: Message) -> None:
        self.started = True
        await self._send(message)

    async def events(self, values: Sequence[dict[str, Any]]) -> None:
        """Sends values as server-sent events, all at once."""
        if not values:
            return
        if not self.started:
            await self.send({"type": "http.response.start", "status": 200, "headers": list(_EVENT_STREAM)})
        body = b"".join([b"data: %b\n\n" % _encode(value) for value in values])
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def event(self, value: dict[str, Any]) -> None:
        await self.events([value])

    async def end(self, last: bytes = b"") -> None:
        await self._send({"type": "http.response.body", "body": last, "more_body": False})


def _prompts(request: ChatRequest | CompletionRequest) -> Sequence[str | tuple[int, ...] | None]:
    return (None,) if isinstance(request, ChatRequest) else request.prompts


def _check_door(model: Model, request: ChatRequest | CompletionRequest, prompts: int) -> None:
    """Refuses all prompts of a request, or none, and before any is tokenized."""
    try:
        model.check_door(prompts * request.params.n)
    except ValueError as error:
        raise ProtocolError(str(error), "n" if prompts == 1 else "prompt") from None


async def _tokenize(
    model: Model, request: ChatRequest | CompletionRequest, prompt: str | tuple[int, ...] | None
) -> TokenizedPrompt:
    if isinstance(request, ChatRequest):
        return await model.tokenize_chat(
            request.messages,
            add_generation_prompt=request.add_generation_prompt,
            add_special_tokens=request.add_special_tokens,
            template_vars=request.template_vars,
        )
    return await model.tokenize(prompt or "", add_special_tokens=request.add_special_tokens)


async def _stream(
    model: Model,
    request: ChatRequest | CompletionRequest,
    streams: Sequence[ObservedStream],
    response_id: str,
    created: int,
    reply: _Reply,
) -> None:
    outputs = [stream.output for stream in streams]
    chunks = _chunks(model, request, outputs, response_id, created)
    async with contextlib.aclosing(merge(streams)) as changes:
        async for numbers in changes:
            # Nothing is sent before the first token, so that an engine failure until then has a status of its own.
            _check(streams, numbers)
            await reply.events([chunk for number in numbers for chunk in chunks.take(number)])
    await reply.events(chunks.last())
    await reply.end(b"data: [DONE]\n\n")


def _chunks(
    model: Model,
    request: ChatRequest | CompletionRequest,
    outputs: Sequence[RequestOutput],
    response_id: str,
    created: int,
) -> ChatStream | CompletionStream:
    facts = _facts(model, response_id, created) | {"system_fingerprint": model.system_fingerprint}
    if isinstance(request, ChatRequest):
        return ChatStream(request, outputs, **facts)
    return CompletionStream(request, outputs, **facts)


def _whole(
    model: Model,
    request: ChatRequest | CompletionRequest,
    outputs: Sequence[RequestOutput],
    response_id: str,
    created: int,
) -> dict[str, Any]:
    facts = _facts(model, response_id, created)
    if isinstance(request, ChatRequest):
        body = chat_response(request, outputs[0], **facts)
    else:
        body = completion_response(request, outputs, **facts)
    return {**body, "system_fingerprint": model.system_fingerprint}


def _facts(model: Model, response_id: str, created: int) -> dict[str, Any]:
    try:
        tokenizer: Tokenizer | None = model.get_tokenizer()
    except TokenizerError:
        tokenizer = None
    return {
        "response_id": response_id,
        "created": created,
        "model": model.served_model_name,
        "tokenizer": tokenizer,
    }


def _check(streams: Sequence[ObservedStream], numbers: Sequence[int]) -> None:
    """Raises if one of these outputs has ended in a way that is no answer."""
    for number in numbers:
        for completion in streams[number].output.outputs:
            if completion.finish_reason == "error":
                raise GenerationError(completion.error or "the engine failed")
            if completion.finish_reason == "abort":
                raise GenerationError("the request was ended by the server")
