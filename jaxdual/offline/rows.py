"""The rows that a batch job writes: a function of the input, the model and its output, and of nothing else.

A row has no clock, no cache state and no random name in it, so that a job which was interrupted and started again
writes what an uninterrupted one writes.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxdual.offline.batch_file import BatchLine, RejectedLine
from jaxdual.openai_protocol import ChatRequest, CompletionRequest, ProtocolError, parse_chat, parse_completion
from jaxdual.openai_responses import chat_response, completion_response
from jaxdual.outputs import RequestOutput
from jaxdual.sampling_params import SamplingParams
from jaxdual.tokenizer import Tokenizer

_SEED_BITS = 63


def row_id(line: BatchLine | RejectedLine) -> str:
    """The `id` of a line's row: another request under the same custom_id has another one."""
    return f"batch_req_{line.digest}"


def parse_body(line: BatchLine, model: str, default_sampling: Mapping[str, Any]) -> ChatRequest | CompletionRequest:
    """The request of a line, checked.

    Raises:
        ProtocolError: the body is not valid, is for another model, or asks for what a batch job cannot do.
    """
    parse = parse_chat if line.url == "/v1/chat/completions" else parse_completion
    request: ChatRequest | CompletionRequest = parse(line.body, default_sampling)
    if request.model is not None and request.model != model:
        raise ProtocolError(
            f"the request is for model {request.model!r}, but {model!r} is served", "model", "model_not_found"
        )
    if request.stream:
        raise ProtocolError("stream is not supported in a batch", "stream", "unsupported_parameter")
    return request


def engine_params(line: BatchLine, request: ChatRequest | CompletionRequest, prompt_index: int) -> SamplingParams:
    """Sampling parameters of one prompt; where chance decides without a seed, the request's digest is the seed."""
    params = request.params
    if params.seed is not None or params.temperature == 0:
        return params
    seed = (int(line.digest, 16) + prompt_index) % 2**_SEED_BITS
    return dataclasses.replace(params, seed=seed)


def response_row(
    line: BatchLine,
    request: ChatRequest | CompletionRequest,
    outputs: Sequence[RequestOutput],
    *,
    model: str,
    system_fingerprint: str,
    created: int,
    tokenizer: Tokenizer | None,
) -> dict[str, Any]:
    """The row of a request that was served; `outputs` has one finished output for each prompt."""
    if isinstance(request, ChatRequest):
        body = chat_response(
            request,
            outputs[0],
            response_id=f"chatcmpl-{line.digest}",
            created=created,
            model=model,
            tokenizer=tokenizer,
            cached_tokens=False,
        )
    else:
        body = completion_response(
            request,
            outputs,
            response_id=f"cmpl-{line.digest}",
            created=created,
            model=model,
            tokenizer=tokenizer,
            cached_tokens=False,
        )
    body["system_fingerprint"] = system_fingerprint
    response = {"status_code": 200, "request_id": f"req_{line.digest}", "body": body}
    facts = {"line": line.number, "seed": engine_params(line, request, 0).seed}
    return {
        "id": row_id(line),
        "custom_id": line.custom_id,
        "response": response,
        "error": None,
        "jaxdual": facts,
    }


def error_row(line: BatchLine | RejectedLine, code: str | None, message: str, param: str | None) -> dict[str, Any]:
    """The row of a line that was not served, with the reason."""
    error = {"code": code, "message": message, "line": line.number, "param": param}
    return {"id": row_id(line), "custom_id": line.custom_id, "response": None, "error": error}
