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

from jaxdual.cascade.options import CascadeRequestError
from jaxdual.cascade.serving.prompt import CascadePrompt
from jaxdual.cascade.serving.service import CascadeLLM
from jaxdual.decoding.dysco import DyscoError
from jaxdual.errors import PromptTooLongError, UnknownModelError
from jaxdual.front import TokenizedPrompt
from jaxdual.openai_protocol import ChatRequest, CompletionRequest, ProtocolError
from jaxdual.openai_responses import chat_response, completion_response
from jaxdual.openai_stream import ChatStream, CompletionStream
from jaxdual.outputs import RequestOutput
from jaxdual.sampling_params import RECOMMENDED_SAMPLING
from jaxdual.served_models import Model, ServedModels, submit
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
            _check_door(model, request, len(_prompts(request)))
            streams = await self._submit_all(model, request, response_id, closing)
            reply.headers = _tier_header(streams)
            if request.stream:
                await _stream(model, request, streams, response_id, created, reply)
                return
            async with contextlib.aclosing(merge(streams)) as changes:
                async for numbers in changes:
                    _check(streams, numbers)
        content = _whole(model, request, [stream.output for stream in streams], response_id, created)
        await JSONResponse(content, headers=reply.headers)(scope, receive, reply.send)

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

    async def _submit_all(
        self,
        model: Model,
        request: ChatRequest | CompletionRequest,
        response_id: str,
        closing: contextlib.ExitStack,
    ) -> list[ObservedStream]:
        """Streams of all prompts, which `closing` closes."""
        prompts = [(prompt, f"{response_id}-{number}") for number, prompt in enumerate(_prompts(request))]
        if not isinstance(model, CascadeLLM):
            streams = []
            for prompt, request_id in prompts:
                streams.append(await self._submit(model, request, prompt, request_id))
                closing.callback(streams[-1].close)
            return streams
        # Each waits until its tier is found, so they are asked for at once.
        tasks = [asyncio.ensure_future(self._submit(model, request, *prompt)) for prompt in prompts]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            for stream in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(stream, ObservedStream):
                    closing.callback(stream.close)

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
            stream = await submit(
                model,
                tokenized,
                request.params,
                request_id,
                user=request.user,
                options=request.cascade,
                left_open=request.left_open,
            )
            return self._metrics.observe(stream, model.served_model_name)
        except PromptTooLongError as error:
            param = "messages" if isinstance(request, ChatRequest) else "prompt"
            raise ProtocolError(str(error), param, "context_length_exceeded") from None
        except DyscoError as error:
            raise ProtocolError(str(error), "dysco") from None
        except CascadeRequestError as error:
            raise ProtocolError(str(error), "cascade") from None
        except ValueError as error:
            param = "messages" if isinstance(request, ChatRequest) else "prompt"
            raise ProtocolError(str(error), param if isinstance(error, TokenizerError) else None) from None


class _Reply:
    """The response, and whether it has begun; events go out as soon as there are some.

    Attributes:
        model: name of the model that answers; None while it is not known.
        headers: that a whole or streamed answer has beside the usual ones.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False
        self.model: str | None = None
        self.headers: Mapping[str, str] = {}

    async def send(self, message: Message) -> None:
        self.started = True
        await self._send(message)

    async def events(self, values: Sequence[dict[str, Any]]) -> None:
        """Sends values as server-sent events, all at once."""
        if not values:
            return
        if not self.started:
            further = [(name.lower().encode(), value.encode()) for name, value in self.headers.items()]
            await self.send({"type": "http.response.start", "status": 200, "headers": [*_EVENT_STREAM, *further]})
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
        if isinstance(model, CascadeLLM) and prompts > 1 and request.params.logprobs is not None:
            raise ProtocolError("logprobs of a cascade are given for one prompt at a time", "logprobs")
    except ProtocolError:
        raise
    except ValueError as error:
        raise ProtocolError(str(error), "n" if prompts == 1 else "prompt") from None


async def _tokenize(
    model: Model, request: ChatRequest | CompletionRequest, prompt: str | tuple[int, ...] | None
) -> TokenizedPrompt | CascadePrompt:
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
    facts = _facts(model, outputs, response_id, created) | {"system_fingerprint": model.system_fingerprint}
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
    facts = _facts(model, outputs, response_id, created)
    if isinstance(request, ChatRequest):
        body = chat_response(request, outputs[0], **facts)
    else:
        body = completion_response(request, outputs, **facts)
    return {**body, "system_fingerprint": model.system_fingerprint}


def _facts(model: Model, outputs: Sequence[RequestOutput], response_id: str, created: int) -> dict[str, Any]:
    return {
        "response_id": response_id,
        "created": created,
        "model": model.served_model_name,
        "tokenizer": _tokenizer(model, outputs[0]),
    }


def _tokenizer(model: Model, output: RequestOutput) -> Tokenizer | None:
    """That of the model, or the tier, that gives an output."""
    if isinstance(model, CascadeLLM):
        return None if output.decision is None else model.tokenizer_of(output.decision.tier)
    try:
        return model.get_tokenizer()
    except TokenizerError:
        return None


def _tier_header(streams: Sequence[ObservedStream]) -> dict[str, str]:
    """Names of the tiers that answer the prompts of a cascade's request."""
    decisions = [stream.output.decision for stream in streams]
    tiers = [decision.tier for decision in decisions if decision is not None]
    return {"X-Jaxdual-Tier": ", ".join(tiers)} if tiers else {}


def _check(streams: Sequence[ObservedStream], numbers: Sequence[int]) -> None:
    """Raises if one of these outputs has ended in a way that is no answer."""
    for number in numbers:
        for completion in streams[number].output.outputs:
            if completion.finish_reason == "error":
                raise GenerationError(completion.error or "the engine failed")
            if completion.finish_reason == "abort":
                raise GenerationError("the request was ended by the server")
