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

from jaxdual.async_api import AsyncLLM
from jaxdual.decoding.dysco import DyscoError
from jaxdual.errors import PromptTooLongError
from jaxdual.front import TokenizedPrompt
from jaxdual.openai_protocol import ChatRequest, CompletionRequest, ProtocolError
from jaxdual.openai_responses import chat_response, completion_response
from jaxdual.openai_stream import ChatStream, CompletionStream
from jaxdual.outputs import RequestOutput
from jaxdual.sampling_params import RECOMMENDED_SAMPLING
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
        llm: generates.
        metrics: counts.
        parse: checks a body: `parse_chat` or `parse_completion`.
        max_body_bytes: of a request.
    """

    def __init__(self, llm: AsyncLLM, metrics: Metrics, parse: Parse, max_body_bytes: int) -> None:
        self._llm = llm
        self._metrics = metrics
        self._parse = parse
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = _Reply(send)
        try:
            body = await read_body(scope, receive, self._max_body_bytes)
            await unless_disconnected(self._answer(body, scope, receive, reply), receive)
        except DisconnectedError:
            self._metrics.refused("disconnected")
        except Exception as error:
            problem = problem_of(error)
            if problem.status == 500:
                _logger.exception("a request failed")
            if not isinstance(error, GenerationError):  # one that was taken counts as finished, by reason
                self._metrics.refused(problem.reason)
            if reply.started:
                await reply.event(problem.body)
                await reply.end()
            else:
                await problem.response()(scope, receive, send)

    async def _answer(self, body: bytes, scope: Scope, receive: Receive, reply: _Reply) -> None:
        await self._llm.ready()
        if len(body) < _LONG_BODY:
            request = self._request(body)
        else:
            request = await asyncio.to_thread(self._request, body)
        prefix = "chatcmpl" if isinstance(request, ChatRequest) else "cmpl"
        response_id = f"{prefix}-{uuid.uuid4().hex}"
        created = int(time.time())
        with contextlib.ExitStack() as closing:
            streams: list[ObservedStream] = []
            prompts = _prompts(request)
            self._check_door(request, len(prompts))
            for number, prompt in enumerate(prompts):
                streams.append(await self._submit(request, prompt, f"{response_id}-{number}"))
                closing.callback(streams[-1].close)
            if request.stream:
                await self._stream(request, streams, response_id, created, reply)
                return
            async with contextlib.aclosing(merge(streams)) as changes:
                async for numbers in changes:
                    _check(streams, numbers)
        content = self._whole(request, [stream.output for stream in streams], response_id, created)
        await JSONResponse(content)(scope, receive, reply.send)

    def _request(self, body: bytes) -> ChatRequest | CompletionRequest:
        recommended = self._llm.get_default_sampling_params()
        try:
            request = self._parse(
                decode_json(body), {name: getattr(recommended, name) for name in RECOMMENDED_SAMPLING}
            )
        except RecursionError:
            raise ProtocolError("the request body is nested too deeply", None, "invalid_json") from None
        served = self._llm.served_model_name
        if request.model is not None and request.model != served:
            message = f"the model {_short(request.model)} does not exist; {served!r} is served"
            raise ProtocolError(message, "model", "model_not_found")
        return request

    def _check_door(self, request: ChatRequest | CompletionRequest, prompts: int) -> None:
        """Refuses all prompts of a request, or none, and before any is tokenized."""
        try:
            self._llm.check_door(prompts * request.params.n)
        except ValueError as error:
            raise ProtocolError(str(error), "n" if prompts == 1 else "prompt") from None

    async def _submit(
        self, request: ChatRequest | CompletionRequest, prompt: str | tuple[int, ...] | None, request_id: str
    ) -> ObservedStream:
        """Sends one prompt to the engine; None stands for the prompt that the messages of a chat make."""
        try:
            tokenized = await self._tokenize(request, prompt)
            return self._metrics.observe(
                await self._llm.submit(tokenized, request.params, request_id, user=request.user)
            )
        except PromptTooLongError as error:
            param = "messages" if isinstance(request, ChatRequest) else "prompt"
            raise ProtocolError(str(error), param, "context_length_exceeded") from None
        except DyscoError as error:
            raise ProtocolError(str(error), "dysco") from None
        except ValueError as error:
            param = "messages" if isinstance(request, ChatRequest) else "prompt"
            raise ProtocolError(str(error), param if isinstance(error, TokenizerError) else None) from None

    async def _tokenize(
        self, request: ChatRequest | CompletionRequest, prompt: str | tuple[int, ...] | None
    ) -> TokenizedPrompt:
        if isinstance(request, ChatRequest):
            return await self._llm.tokenize_chat(
                request.messages,
                add_generation_prompt=request.add_generation_prompt,
                add_special_tokens=request.add_special_tokens,
                template_vars=request.template_vars,
            )
        return await self._llm.tokenize(prompt or "", add_special_tokens=request.add_special_tokens)

    async def _stream(
        self,
        request: ChatRequest | CompletionRequest,
        streams: Sequence[ObservedStream],
        response_id: str,
        created: int,
        reply: _Reply,
    ) -> None:
        outputs = [stream.output for stream in streams]
        chunks = self._chunks(request, outputs, response_id, created)
        async with contextlib.aclosing(merge(streams)) as changes:
            async for numbers in changes:
                # Nothing is sent before the first token, so that an engine failure until then has a status of its own.
                _check(streams, numbers)
                await reply.events([chunk for number in numbers for chunk in chunks.take(number)])
        await reply.events(chunks.last())
        await reply.end(b"data: [DONE]\n\n")

    def _chunks(
        self,
        request: ChatRequest | CompletionRequest,
        outputs: Sequence[RequestOutput],
        response_id: str,
        created: int,
    ) -> ChatStream | CompletionStream:
        facts = self._facts(response_id, created) | {"system_fingerprint": self._llm.system_fingerprint}
        if isinstance(request, ChatRequest):
            return ChatStream(request, outputs, **facts)
        return CompletionStream(request, outputs, **facts)

    def _whole(
        self,
        request: ChatRequest | CompletionRequest,
        outputs: Sequence[RequestOutput],
        response_id: str,
        created: int,
    ) -> dict[str, Any]:
        facts = self._facts(response_id, created)
        if isinstance(request, ChatRequest):
            body = chat_response(request, outputs[0], **facts)
        else:
            body = completion_response(request, outputs, **facts)
        return {**body, "system_fingerprint": self._llm.system_fingerprint}

    def _facts(self, response_id: str, created: int) -> dict[str, Any]:
        try:
            tokenizer: Tokenizer | None = self._llm.get_tokenizer()
        except TokenizerError:
            tokenizer = None
        return {
            "response_id": response_id,
            "created": created,
            "model": self._llm.served_model_name,
            "tokenizer": tokenizer,
        }


class _Reply:
    """The response, and whether it has begun; events go out as soon as there are some."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False

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


def _check(streams: Sequence[ObservedStream], numbers: Sequence[int]) -> None:
    """Raises if one of these outputs has ended in a way that is no answer."""
    for number in numbers:
        for completion in streams[number].output.outputs:
            if completion.finish_reason == "error":
                raise GenerationError(completion.error or "the engine failed")
            if completion.finish_reason == "abort":
                raise GenerationError("the request was ended by the server")


def _short(name: str) -> str:
    return repr(name if len(name) <= 80 else f"{name[:77]}...")
