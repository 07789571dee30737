"""A tier behind an OpenAI-compatible HTTP API, as the last one of a cascade."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, cast

import httpx

from jaxdual.cascade.config import ExternalTier
from jaxdual.cascade.decision import Failure, Spent
from jaxdual.cascade.gate import Gate
from jaxdual.cascade.options import ConfidenceSpec
from jaxdual.cascade.serving.prompt import CascadePrompt, ChatPrompt
from jaxdual.cascade.serving.tiers import Question
from jaxdual.cascade.work import Work
from jaxdual.config import ConfigError
from jaxdual.outputs import CompletionOutput, RequestMetrics, RequestOutput, TokenCounts
from jaxdual.request_stream import AnswerStream, RequestStream
from jaxdual.sampling_params import SamplingParams

# Of `SamplingParams`, what is sent where it is not the default: OpenAI's fields, then vLLM's.
_FIELDS = ("temperature", "top_p", "presence_penalty", "frequency_penalty", "seed")
_FURTHER_FIELDS = (
    *("top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos", "skip_special_tokens"),
    "include_stop_str_in_output",
)
_FAILURES: dict[int, Failure] = {429: "queue_full", 502: "unavailable", 503: "unavailable", 504: "unavailable"}
_SHOWN_CHARS = 300  # of what a remote says when it refuses

_logger = logging.getLogger(__name__)


class RemoteTier:
    """A remote model. Its answers are streamed; leaving one closes its connection.

    Args:
      config: of the tier.

    Raises:
      ConfigError: the variable with its key is not set.
    """

    def __init__(self, config: ExternalTier) -> None:
        self.config = config
        headers = {}
        if config.api_key_env is not None:
            key = os.environ.get(config.api_key_env)
            if not key:
                raise ConfigError(f"tier {config.name!r}: the environment variable {config.api_key_env} is not set")
            headers["Authorization"] = f"Bearer {key}"
        self._client = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(config.timeout, connect=config.connect_timeout),
            # How much goes there at once is the remote's to limit.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
        )

    @property
    def name(self) -> str:
        return self.config.name

    def check_door(self, outputs: int) -> None:
        """It is open as far as is known here."""

    def gate(self, spec: ConfidenceSpec) -> Gate:
        raise NotImplementedError("a remote model answers whatever reaches it: it has no gate")

    async def begin(self, question: Question, gate: Gate | None) -> AnswerStream:
        path, body = _request(question, self.config.model)
        text = None if isinstance(question.prompt, ChatPrompt) else question.prompt.text
        output = RequestOutput(question.request_id, text, [], [CompletionOutput(0)], RequestMetrics(time.monotonic()))
        output.reported = TokenCounts()
        stream = _RemoteStream(output)
        stream.reading = asyncio.create_task(self._read(stream, f"{self.config.url}/{path}", body))
        return stream

    def failure(self, stream: AnswerStream) -> Failure:
        return cast(_RemoteStream, stream).failure

    def spent(self, output: RequestOutput, seconds: float, judged: int = 0) -> Spent:
        prompt, generated = output.num_prompt_tokens, output.num_output_tokens
        parameters, prices = self.config.parameters, self.config.prices
        return Spent(
            Work(prompt + generated, prompt + generated),
            None if parameters is None else 2 * parameters * (prompt + generated),
            prompt,
            generated,
            seconds,
            None if prices is None else prices.of(prompt, generated),
        )

    async def close(self) -> None:
        """Gives up its connections."""
        await self._client.aclose()

    async def _read(self, stream: _RemoteStream, url: str, body: Mapping[str, Any]) -> None:
        """Fills the stream's output until the remote's answer has ended, in one way or the other: whatever happens, the
        stream ends.
        """
        loop, seconds = asyncio.get_running_loop(), self.config.timeout
        try:
            # Bytes alone don't count: some gateways keep connections alive with comments.
            async with (
                asyncio.timeout(self.config.connect_timeout + seconds) as deadline,
                self._client.stream("POST", url, json=body) as response,
            ):
                if response.status_code != httpx.codes.OK:
                    said = (await response.aread()).decode(errors="replace")[:_SHOWN_CHARS]
                    failure = _FAILURES.get(response.status_code, "failed")
                    stream.fail(failure, f"{url} answers {response.status_code}: {said}")
                    return
                async for event in _events(response):
                    if stream.take(event):
                        deadline.reschedule(loop.time() + seconds)
            if stream.reason is None:
                stream.fail("failed", f"{url} has ended its answer early")
            else:
                stream.finish(stream.reason)
        except (httpx.TimeoutException, TimeoutError) as error:
            stream.fail("timeout", f"{url}: {type(error).__name__}")
        except httpx.ConnectError as error:
            stream.fail("unavailable", f"{url}: {error}")
        except Exception as error:  # what a remote says is not ours to foresee, and nobody else would end the stream
            stream.fail("failed", f"{url}: {type(error).__name__}: {error}")
        finally:
            if stream.output.outputs[0].error is not None:
                _logger.warning("tier %r: %s", self.name, stream.output.outputs[0].error)


class _RemoteStream(RequestStream):
    """A remote's answer as it comes.

    Attributes:
      reading: the task that fills it.
      failure: what has ended it, where its output ends with an error.
      reason: why the remote's text has ended; None before its end.
    """

    def __init__(self, output: RequestOutput) -> None:
        super().__init__(output, lambda _: self._abandon())
        self.reading: asyncio.Task[None] | None = None
        self.failure: Failure = "failed"
        self.reason: str | None = None

    def take(self, event: Mapping[str, Any]) -> bool:
        """Adds what an event of the remote brings; returns whether that is anything of the answer."""
        before = len(self.output.outputs[0].text), self.reason
        if event.get("error") is not None:
            raise ValueError(f"it says {json.dumps(event['error'])[:_SHOWN_CHARS]}")
        if event.get("usage") is not None:
            self.output.reported = _counts(event["usage"])
            self.output.num_cached_tokens = self.output.reported.cached
        for choice in event.get("choices") or ():
            text = choice["delta"].get("content") if "delta" in choice else choice.get("text")
            if text:
                if self.output.metrics.first_token_time is None:
                    self.output.metrics.first_token_time = time.monotonic()
                self.output.outputs[0].text += text
                self.wake()
            self.reason = choice.get("finish_reason") or self.reason
        return before != (len(self.output.outputs[0].text), self.reason)

    def finish(self, reason: str) -> None:
        """Its answer is whole."""
        self._end()
        self.output.outputs[0].finish_reason = "length" if reason == "length" else "stop"
        self.wake()

    def fail(self, failure: Failure, error: str) -> None:
        """There is no answer, or no more of it."""
        self._end()
        self.failure = failure
        self.output.outputs[0].finish_reason, self.output.outputs[0].error = "error", error
        self.wake()

    def _abandon(self) -> None:
        self._end()
        self.output.outputs[0].finish_reason = "abort"
        if self.reading is not None:
            self.reading.cancel()
        self.wake()

    def _end(self) -> None:
        self.output.finished = True
        self.output.metrics.finished_time = time.monotonic()


async def _events(response: httpx.Response) -> AsyncIterator[Mapping[str, Any]]:
    """The values of server-sent events, until "[DONE]"."""
    async for line in response.aiter_lines():
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        value = json.loads(data)
        if not isinstance(value, dict):
            raise ValueError(f"an event holds {data[:80]}")
        yield value


def _request(question: Question, model: str) -> tuple[str, dict[str, Any]]:
    """Path and body of the remote's request."""
    params, defaults = question.params, SamplingParams()
    body: dict[str, Any] = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    for name in (*_FIELDS, *_FURTHER_FIELDS):
        value = getattr(params, name)
        if name not in question.left_open and value != getattr(defaults, name):
            body[name] = value
    if params.stop_strings:
        body["stop"] = list(params.stop_strings)
    path, limit = _prompt(question.prompt, body)
    if params.max_tokens is not None:
        body[limit] = params.max_tokens
    return path, body


def _prompt(prompt: CascadePrompt, body: dict[str, Any]) -> tuple[str, str]:
    """Puts the prompt into the body; returns the path, and the field that limits the output."""
    if not isinstance(prompt, ChatPrompt):
        body["prompt"] = prompt.text
        return "completions", "max_tokens"
    body["messages"] = [dict(message) for message in prompt.messages]
    if not prompt.add_generation_prompt:
        body["add_generation_prompt"] = False
    if prompt.template_vars:
        body["chat_template_kwargs"] = dict(prompt.template_vars)
    return "chat/completions", "max_completion_tokens"


def _counts(usage: Mapping[str, Any]) -> TokenCounts:
    details = usage.get("prompt_tokens_details") or {}
    return TokenCounts(
        int(usage["prompt_tokens"]), int(usage["completion_tokens"]), int(details.get("cached_tokens") or 0)
    )
