"""OpenAI's bodies of streamed responses: what has been added to a request's outputs since the last look, as chunks.

Several tokens may come as one chunk. The finish reason has a chunk of its own, as has the role in a chat; with it comes
the decision of a cascade, in the field `cascade`. Choices carry
vLLM's extension `stop_reason`, and those with log probabilities show tokens whose text is still held back.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxdual.openai_protocol import ChatRequest, CompletionRequest
from jaxdual.openai_responses import chat_logprobs, completion_logprobs, prompt_logprobs, prompt_text, usage
from jaxdual.outputs import CompletionOutput, RequestOutput
from jaxdual.tokenizer import Tokenizer


@dataclass(slots=True)
class _Cursor:
    """How much of a choice has been sent."""

    begun: bool = False
    ended: bool = False
    characters: int = 0
    tokens: int = 0
    text_offset: int = 0  # of the next token in log probabilities, in characters


class _Chunks[RequestT: (ChatRequest, CompletionRequest)]:
    """What both kinds of streams share: the fields around choices, and where each choice stands.

    Args:
        request: the checked request.
        outputs: one for each prompt; they grow between calls.
        response_id: the `id` of all chunks.
        created: seconds since the epoch.
        model: the served model's name.
        system_fingerprint: as in other responses.
        tokenizer: the model's tokenizer, for the bytes of tokens in log probabilities.
    """

    _object: ClassVar[str]

    def __init__(
        self,
        request: RequestT,
        outputs: Sequence[RequestOutput],
        *,
        response_id: str,
        created: int,
        model: str,
        system_fingerprint: str,
        tokenizer: Tokenizer | None,
    ) -> None:
        self._request: RequestT = request
        self._outputs = outputs
        self._head = {
            "id": response_id,
            "object": self._object,
            "created": created,
            "model": model,
            "system_fingerprint": system_fingerprint,
        }
        self._tokenizer = tokenizer
        self._include_usage = request.include_usage
        self._continuous_usage = request.continuous_usage
        self._with_logprobs = request.params.logprobs is not None
        self._cursors = [[_Cursor() for _ in output.outputs] for output in outputs]

    def last(self) -> list[dict[str, Any]]:
        """What comes after all choices: the token counts, if they are asked for."""
        return [{**self._head, "choices": [], "usage": self._usage()}] if self._include_usage else []

    def _chunk(self, choice: dict[str, Any], **fields: Any) -> dict[str, Any]:
        chunk = {**self._head, "choices": [choice], **fields}
        if self._include_usage:
            chunk["usage"] = self._usage() if self._continuous_usage else None
        return chunk

    def _usage(self) -> dict[str, Any]:
        return usage(self._outputs)

    def _has_grown(self, completion: CompletionOutput, cursor: _Cursor) -> bool:
        return len(completion.text) > cursor.characters or (
            self._with_logprobs and len(completion.token_ids) > cursor.tokens
        )


class ChatStream(_Chunks[ChatRequest]):
    """Chunks of a chat completion, which has one prompt."""

    _object = "chat.completion.chunk"

    def take(self, prompt: int = 0) -> list[dict[str, Any]]:
        """Chunks of what has been added since the last call; `prompt` is always 0."""
        chunks = []
        params, output = self._request.params, self._outputs[prompt]
        for completion, cursor in zip(output.outputs, self._cursors[prompt], strict=True):
            if not cursor.begun:
                cursor.begun = True
                role = self._delta(completion, {"role": "assistant", "content": ""})
                if completion.index == 0 and params.prompt_logprobs is not None:
                    role["prompt_logprobs"] = prompt_logprobs(output, self._tokenizer)
                chunks.append(role)
            if self._has_grown(completion, cursor):
                logprobs = None
                if self._with_logprobs:
                    count = params.logprobs or 0
                    logprobs = chat_logprobs(completion, count, self._tokenizer, cursor.tokens)
                content = completion.text[cursor.characters :]
                cursor.characters, cursor.tokens = len(completion.text), len(completion.token_ids)
                chunks.append(self._delta(completion, {"content": content}, logprobs))
            if completion.finish_reason is not None and not cursor.ended:
                cursor.ended = True
                last = self._delta(completion, {}, None, completion.finish_reason, completion.stop_reason)
                chunks.append(last | _decision(output))
        return chunks

    def _delta(
        self,
        completion: CompletionOutput,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
        stop_reason: int | str | None = None,
    ) -> dict[str, Any]:
        choice = {
            "index": completion.index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
            "stop_reason": stop_reason,
        }
        return self._chunk(choice)


class CompletionStream(_Chunks[CompletionRequest]):
    """Chunks of a text completion."""

    _object = "text_completion"

    def _usage(self) -> dict[str, Any]:
        return usage(self._outputs, generated=not self._request.echo_only)

    def take(self, prompt: int) -> list[dict[str, Any]]:
        """Chunks of what has been added to the outputs of prompt number `prompt` since the last call."""
        chunks = []
        request, output = self._request, self._outputs[prompt]
        for completion, cursor in zip(output.outputs, self._cursors[prompt], strict=True):
            index = prompt * request.params.n + completion.index
            if not cursor.begun:
                cursor.begun = True
                chunks += self._opening(index, prompt, cursor)
            if not request.echo_only and self._has_grown(completion, cursor):
                logprobs = None
                if self._with_logprobs:
                    logprobs, cursor.text_offset = completion_logprobs(
                        completion.token_ids[cursor.tokens :],
                        (completion.logprobs or [])[cursor.tokens :],
                        request.params,
                        self._tokenizer,
                        cursor.text_offset,
                    )
                text = completion.text[cursor.characters :]
                cursor.characters, cursor.tokens = len(completion.text), len(completion.token_ids)
                chunks.append(self._text(index, text, logprobs))
            if completion.finish_reason is not None and not cursor.ended:
                cursor.ended = True
                reason, stop = completion.finish_reason, completion.stop_reason
                last = self._text(index, "", None, *(("length", None) if request.echo_only else (reason, stop)))
                chunks.append(last | _decision(output))
        return chunks

    def _opening(self, index: int, prompt: int, cursor: _Cursor) -> list[dict[str, Any]]:
        """What comes before the first token: the prompt with `echo`, and the prompt's log probabilities."""
        request, output = self._request, self._outputs[prompt]
        fields: dict[str, Any] = {}
        if request.params.prompt_logprobs is not None:
            fields["prompt_logprobs"] = prompt_logprobs(output, self._tokenizer)
        if not request.echo:
            return [self._text(index, "", **fields)] if fields else []
        logprobs = None
        if self._with_logprobs:
            rows = output.prompt_logprobs or [None] * len(output.prompt_token_ids)
            logprobs, cursor.text_offset = completion_logprobs(
                output.prompt_token_ids, rows, request.params, self._tokenizer
            )
        return [self._text(index, prompt_text(request.prompts[prompt], self._tokenizer), logprobs, **fields)]

    def _text(
        self,
        index: int,
        text: str,
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
        stop_reason: int | str | None = None,
        **fields: Any,
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
            "stop_reason": stop_reason,
            **fields,
        }
        return self._chunk(choice)


def _decision(output: RequestOutput) -> dict[str, Any]:
    return {} if output.decision is None else {"cascade": output.decision.as_json()}
