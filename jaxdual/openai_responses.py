"""OpenAI's response bodies for `/v1/chat/completions` and `/v1/completions`, from finished requests.

They carry vLLM's extensions `stop_reason` and `prompt_logprobs` too, and those of a cascade its decision.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxdual.openai_protocol import ChatRequest, CompletionRequest
from jaxdual.outputs import CompletionOutput, Logprob, RequestOutput
from jaxdual.sampling_params import SamplingParams
from jaxdual.tokenizer import Tokenizer

# JSON has no infinity: the log probability of what cannot be sampled.
_LOWEST = -9999.0


def chat_response(
    request: ChatRequest,
    output: RequestOutput,
    *,
    response_id: str,
    created: int,
    model: str,
    tokenizer: Tokenizer | None,
    cached_tokens: bool = True,
) -> dict[str, Any]:
    """The body of a chat completion.

    Args:
        request: the checked request.
        output: its finished output.
        response_id: the `id` of the body.
        created: seconds since the epoch.
        model: the served model's name.
        tokenizer: the model's tokenizer, for the bytes of tokens in log probabilities.
        cached_tokens: report what depends on what else was asked: the prompt tokens that came from the prefix cache,
            and what a cascade's tiers have spent.
    """
    choices: list[dict[str, Any]] = []
    for completion in output.outputs:
        logprobs = None
        if completion.logprobs is not None:
            count = request.params.logprobs or 0
            logprobs = chat_logprobs(completion, count, tokenizer)
        choices.append(
            {
                "index": completion.index,
                "message": {"role": "assistant", "content": completion.text, "refusal": None},
                "logprobs": logprobs,
                "finish_reason": completion.finish_reason,
                "stop_reason": completion.stop_reason,
            }
        )
    body = {
        "id": response_id,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": choices,
        "usage": usage([output], cached_tokens),
    }
    if request.params.prompt_logprobs is not None:
        body["prompt_logprobs"] = prompt_logprobs(output, tokenizer)
    return body | _decisions([output], cached_tokens)


def completion_response(
    request: CompletionRequest,
    outputs: Sequence[RequestOutput],
    *,
    response_id: str,
    created: int,
    model: str,
    tokenizer: Tokenizer | None,
    cached_tokens: bool = True,
) -> dict[str, Any]:
    """The body of a text completion; `outputs` has one finished output for each prompt, the rest as `chat_response`."""
    choices: list[dict[str, Any]] = []
    for i, output in enumerate(outputs):
        for completion in output.outputs:
            choice = {
                "index": i * request.params.n + completion.index,
                "text": _completion_text(request, request.prompts[i], completion, tokenizer),
                "logprobs": _completion_logprobs(request, output, completion, tokenizer),
                "finish_reason": "length" if request.echo_only else completion.finish_reason,
                "stop_reason": None if request.echo_only else completion.stop_reason,
            }
            if request.params.prompt_logprobs is not None:
                choice["prompt_logprobs"] = prompt_logprobs(output, tokenizer)
            choices.append(choice)
    body = {
        "id": response_id,
        "object": "text_completion",
        "created": created,
        "model": model,
        "choices": choices,
        "usage": usage(outputs, cached_tokens, generated=not request.echo_only),
    }
    return body | _decisions(outputs, cached_tokens)


def error_body(
    message: str, param: str | None = None, code: str | None = None, error_type: str = "invalid_request_error"
) -> dict[str, Any]:
    """OpenAI's error object as the body of a response."""
    return {"error": {"message": message, "type": error_type, "param": param, "code": code}}


def usage(outputs: Iterable[RequestOutput], cached_tokens: bool = True, generated: bool = True) -> dict[str, Any]:
    """Token counts; a prompt counts once, whatever its number of choices."""
    outputs = list(outputs)
    prompt = sum(output.num_prompt_tokens for output in outputs)
    completion = sum(output.num_output_tokens for output in outputs) if generated else 0
    counts: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
    if cached_tokens:
        counts["prompt_tokens_details"] = {"cached_tokens": sum(output.num_cached_tokens for output in outputs)}
    return counts


def chat_logprobs(
    completion: CompletionOutput, count: int, tokenizer: Tokenizer | None, start: int = 0
) -> dict[str, Any]:
    """`logprobs` of a chat choice, for its tokens from number `start` on, with `count` of the likeliest at each."""
    content = []
    for token_id, candidates in zip(completion.token_ids[start:], (completion.logprobs or [])[start:], strict=True):
        top = [_chat_token(i, logprob, tokenizer) for i, logprob in _ranked(candidates)[:count]]
        content.append({**_chat_token(token_id, candidates[token_id], tokenizer), "top_logprobs": top})
    return {"content": content, "refusal": None}


def completion_logprobs(
    token_ids: Sequence[int],
    candidates: Sequence[Mapping[int, Logprob] | None],
    params: SamplingParams,
    tokenizer: Tokenizer | None,
    offset: int = 0,
) -> tuple[dict[str, Any], int]:
    """`logprobs` of a choice of a text completion.

    Args:
        token_ids: tokens of the text, or of a part of it.
        candidates: log probabilities at each, None where there are none.
        params: of the request.
        tokenizer: the model's tokenizer.
        offset: characters of the text before the first token.

    Returns:
        The lists, and the characters before the token that comes next.
    """
    form: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token_id, row in zip(token_ids, candidates, strict=True):
        form["tokens"].append(_token_text(token_id, tokenizer))
        form["token_logprobs"].append(None if row is None else max(row[token_id].logprob, _LOWEST))
        top = None
        if row is not None and params.logprobs:
            top = {_token_text(i, tokenizer): max(logprob.logprob, _LOWEST) for i, logprob in _ranked(row)}
        form["top_logprobs"].append(top)
        form["text_offset"].append(offset)
        if tokenizer is not None and not (params.skip_special_tokens and token_id in tokenizer.special_ids):
            # A character counts where its first byte stands.
            offset += sum(byte & 0xC0 != 0x80 for byte in tokenizer.token_bytes(token_id))
    return form, offset


def prompt_logprobs(output: RequestOutput, tokenizer: Tokenizer | None) -> list[dict[str, Any] | None]:
    """vLLM's form: for each prompt token null (the first one) or candidates by token id."""
    return [
        None
        if row is None
        else {
            str(i): {
                "logprob": max(logprob.logprob, _LOWEST),
                "rank": logprob.rank,
                "decoded_token": _token_text(i, tokenizer),
            }
            for i, logprob in _ranked(row)
        }
        for row in output.prompt_logprobs or ()
    ]


def prompt_text(prompt: str | Sequence[int], tokenizer: Tokenizer | None) -> str:
    """The prompt as `echo` gives it back; empty for token ids of a model without a tokenizer."""
    if isinstance(prompt, str):
        return prompt
    return "" if tokenizer is None else tokenizer.decode(prompt)


def _decisions(outputs: Sequence[RequestOutput], measured: bool) -> dict[str, Any]:
    """The field `cascade`: the decision, or a list of them where there are several prompts."""
    decisions = [output.decision.as_json(measured=measured) for output in outputs if output.decision is not None]
    if not decisions:
        return {}
    return {"cascade": decisions[0] if len(outputs) == 1 else decisions}


def _completion_text(
    request: CompletionRequest, prompt: str | Sequence[int], completion: CompletionOutput, tokenizer: Tokenizer | None
) -> str:
    if not request.echo:
        return completion.text
    text = prompt_text(prompt, tokenizer)
    return text if request.echo_only else text + completion.text


def _completion_logprobs(
    request: CompletionRequest, output: RequestOutput, completion: CompletionOutput, tokenizer: Tokenizer | None
) -> dict[str, Any] | None:
    if request.params.logprobs is None:
        return None
    token_ids: list[int] = []
    candidates: list[Mapping[int, Logprob] | None] = []
    if request.echo:
        token_ids += output.prompt_token_ids
        candidates += output.prompt_logprobs or [None] * len(output.prompt_token_ids)
    if not request.echo_only:
        token_ids += completion.token_ids
        candidates += completion.logprobs or [None] * len(completion.token_ids)
    return completion_logprobs(token_ids, candidates, request.params, tokenizer)[0]


def _chat_token(token_id: int, logprob: Logprob, tokenizer: Tokenizer | None) -> dict[str, Any]:
    raw = None if tokenizer is None else list(tokenizer.token_bytes(token_id))
    return {
        "token": _token_text(token_id, tokenizer),
        "logprob": max(logprob.logprob, _LOWEST),
        "bytes": raw,
    }


def _ranked(candidates: Mapping[int, Logprob]) -> list[tuple[int, Logprob]]:
    return sorted(candidates.items(), key=lambda item: (-item[1].logprob, item[0]))


def _token_text(token_id: int, tokenizer: Tokenizer | None) -> str:
    """The token as text; its bytes in OpenAI's `bytes:` form where they are a part of a character."""
    if tokenizer is None:
        return f"token_id:{token_id}"
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
