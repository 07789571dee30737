"""OpenAI's request bodies for `/v1/chat/completions` and `/v1/completions`, checked and turned into plain data.

Accepted are OpenAI's fields, the sampling extensions of vLLM, and the objects `dysco` (`DyscoParams`) and `cascade`
(`CascadeOptions`). A field that is not known is an error, and so is a known one whose meaning is not implemented,
unless its value asks for nothing (`null`, or one of `_UNSUPPORTED`). Fields in `_IGNORED` describe the caller, or only
speed, and are accepted without effect. `null` means the default everywhere.

`prompt_cache_key` names requests with a common beginning, which are best computed where it is cached; where it is left
out, `user` stands for it, as before OpenAI had it. `safety_identifier` is for those who look for abuse, and is ignored.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxdual.cascade.options import CascadeOptions, options_from_json
from jaxdual.decoding.dysco import DyscoParams, params_from_json
from jaxdual.sampling_params import MAX_LOGPROBS, RECOMMENDED_SAMPLING, SamplingParams
from jaxdual.users import checked_user

MAX_STOP_STRINGS = 16
MAX_CHOICES = 128

_IGNORED = (
    *("metadata", "store", "service_tier", "safety_identifier"),
    *("prompt_cache_retention", "prediction"),
)
# Field -> the values that ask for nothing beyond what happens anyway.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "response_format": ({"type": "text"},),
    "audio": (),
    "modalities": (["text"],),
    "functions": ([],),
    "function_call": ("none",),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "suffix": ("",),
    "best_of": (1,),
    "echo": (False,),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "truncate_prompt_tokens": (),
    "continue_final_message": (False,),
    "spaces_between_special_tokens": (True,),
    "chat_template": (),
    "documents": ([],),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "cache_salt": ("",),
    "priority": (0,),
}
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_STREAM_OPTIONS = ("include_usage", "continuous_usage_stats", "include_obfuscation")
# Variables of a chat template that have their own field in the request.
_RESERVED_VARIABLES = ("messages", "tools", "add_generation_prompt", "tokenize")


class ProtocolError(ValueError):
    """A request that cannot be served as it is.

    Attributes:
        message: what is wrong, with the value and what is accepted.
        param: the field at fault, None where no single one is.
        code: one of OpenAI's short codes, for example `invalid_value`.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = "invalid_value") -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """What bodies of both endpoints have in common."""

    params: SamplingParams
    model: str | None = None
    stream: bool = False
    include_usage: bool = False  # a chunk with token counts ends the stream
    continuous_usage: bool = False  # every chunk has token counts
    user: str | None = None  # who asks, or what the request has in common with others
    cascade: CascadeOptions | None = None
    left_open: frozenset[str] = frozenset()  # fields of `params` that the body leaves to what the model recommends


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest(GenerationRequest):
    """A checked body of `/v1/completions`; `prompts` are texts or token ids, each with `params.n` choices."""

    prompts: tuple[str | tuple[int, ...], ...]
    echo: bool = False
    echo_only: bool = False  # max_tokens is 0: the prompt comes back, with its log probabilities, and nothing after it
    add_special_tokens: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest(GenerationRequest):
    """A checked body of `/v1/chat/completions`; `template_vars` are further variables of the chat template."""

    messages: tuple[Mapping[str, Any], ...]
    add_generation_prompt: bool = True
    add_special_tokens: bool = False
    template_vars: Mapping[str, Any] = field(default_factory=dict)


def parse_chat(body: Any, default_sampling: Mapping[str, Any] | None = None) -> ChatRequest:
    """Checks a body of `/v1/chat/completions`.

    Args:
        body: the decoded JSON.
        default_sampling: values of `SamplingParams` fields that the body leaves out (a model's own defaults).

    Raises:
        ProtocolError: the body is not a valid request, or asks for something that is not implemented.
    """
    fields = _Fields(body)
    messages = _messages(fields.take("messages"))
    sampling = _sampling(fields)
    limit = fields.integer("max_completion_tokens", 1)
    legacy_limit = fields.integer("max_tokens", 1)
    sampling["max_tokens"] = limit if limit is not None else legacy_limit
    wanted = fields.boolean("logprobs", False)
    top = fields.integer("top_logprobs", 0, MAX_LOGPROBS)
    if top is not None and not wanted:
        raise ProtocolError("top_logprobs needs logprobs to be true", "top_logprobs")
    sampling["logprobs"] = (top or 0) if wanted else None
    template_vars = _template_variables(fields.take("chat_template_kwargs"))
    tools = _tools(fields.take("tools"))
    if tools:
        template_vars["tools"] = tools
    add_generation_prompt = fields.boolean("add_generation_prompt", True)
    add_special_tokens = fields.boolean("add_special_tokens", False)
    common = _common(fields)
    fields.finish()
    return ChatRequest(
        messages=messages,
        params=_params(sampling, default_sampling),
        add_generation_prompt=add_generation_prompt,
        add_special_tokens=add_special_tokens,
        template_vars=template_vars,
        left_open=_left_open(sampling),
        **common,
    )


def parse_completion(body: Any, default_sampling: Mapping[str, Any] | None = None) -> CompletionRequest:
    """Checks a body of `/v1/completions`; arguments and errors are those of `parse_chat`."""
    fields = _Fields(body)
    prompts = _prompts(fields.take("prompt"))
    sampling = _sampling(fields)
    echo = fields.boolean("echo", False)
    max_tokens = fields.integer("max_tokens", 0 if echo else 1)
    sampling["max_tokens"] = 16 if max_tokens is None else max(1, max_tokens)
    sampling["logprobs"] = fields.integer("logprobs", 0, MAX_LOGPROBS)
    if echo and sampling["prompt_logprobs"] is None:
        sampling["prompt_logprobs"] = sampling["logprobs"]
    add_special_tokens = fields.boolean("add_special_tokens", True)
    if sampling["n"] is not None and fields.peek("best_of") == sampling["n"]:
        fields.take("best_of")
    common = _common(fields)
    fields.finish()
    return CompletionRequest(
        prompts=prompts,
        params=_params(sampling, default_sampling),
        echo=echo,
        echo_only=max_tokens == 0,
        add_special_tokens=add_special_tokens,
        left_open=_left_open(sampling),
        **common,
    )


class _Fields:
    """The fields of a body that were not read yet; `null` counts as absent."""

    def __init__(self, body: Any) -> None:
        if not isinstance(body, dict):
            raise ProtocolError(f"the request body must be a JSON object, got {_type_name(body)}", None, "invalid_type")
        self._left = {name: value for name, value in body.items() if value is not None}

    def peek(self, name: str) -> Any:
        return self._left.get(name)

    def take(self, name: str) -> Any:
        return self._left.pop(name, None)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise _wrong_type(name, "a boolean", value)
        return value

    def string(self, name: str) -> str | None:
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            raise _wrong_type(name, "a string", value)
        return value

    def integer(self, name: str, low: int, high: int | None = None) -> int | None:
        value = self.take(name)
        if value is None:
            return None
        if not _is_integer(value):
            raise _wrong_type(name, "an integer", value)
        _check_range(name, value, low, high)
        return int(value)

    def number(self, name: str, low: float, high: float, above: bool = False) -> float | None:
        """A number from `low` (exclusive with `above`) to `high`."""
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _wrong_type(name, "a number", value)
        _check_range(name, value, low, high, above)
        return float(value)

    def finish(self) -> None:
        """Raises for whatever is left: not known, or known and not implemented."""
        for name, value in self._left.items():
            if name in _IGNORED or (name in _UNSUPPORTED and value in _UNSUPPORTED[name]):
                continue
            if name in _UNSUPPORTED:
                raise ProtocolError(
                    f"{name}={_short(value)} is not supported{_accepted_values(name)}", name, "unsupported_parameter"
                )
            raise ProtocolError(f"unknown field {name!r}", name, "unknown_parameter")


def _common(fields: _Fields) -> dict[str, Any]:
    """What both kinds of requests have beside prompt and sampling, by the names of their attributes."""
    stream = fields.boolean("stream", False)
    include_usage, continuous_usage = _stream_options(fields.take("stream_options"), stream)
    return {
        "model": fields.string("model"),
        "stream": stream,
        "include_usage": include_usage,
        "continuous_usage": continuous_usage,
        "user": _user(fields),
        "cascade": _cascade(fields.take("cascade")),
    }


def _stream_options(options: Any, stream: bool) -> tuple[bool, bool]:
    """include_usage, continuous_usage_stats."""
    if options is None:
        return False, False
    if not stream:
        raise ProtocolError("stream_options needs stream to be true", "stream_options")
    if not isinstance(options, dict):
        raise _wrong_type("stream_options", "an object", options)
    for name, value in options.items():
        if name not in _STREAM_OPTIONS:
            raise ProtocolError(f"unknown field {name!r} in stream_options", "stream_options", "unknown_parameter")
        if value is not None and not isinstance(value, bool):
            raise _wrong_type(f"stream_options.{name}", "a boolean", value)
    if options.get("include_obfuscation"):
        message = "stream_options.include_obfuscation=True is not supported (only False)"
        raise ProtocolError(message, "stream_options", "unsupported_parameter")
    include_usage = bool(options.get("include_usage"))
    return include_usage, include_usage and bool(options.get("continuous_usage_stats"))


def _user(fields: _Fields) -> str | None:
    """Who asks: the first of these fields that says it."""
    given = {name: fields.string(name) for name in ("prompt_cache_key", "user")}
    for name, user in given.items():
        try:
            checked_user(user, name)
        except ValueError as error:
            raise ProtocolError(str(error), name) from None
    return given["prompt_cache_key"] or given["user"] or None


def _sampling(fields: _Fields) -> dict[str, Any]:
    """The sampling fields that both endpoints share, None where the body does not set one."""
    return {
        "n": fields.integer("n", 1, MAX_CHOICES),
        "temperature": fields.number("temperature", 0, 2),
        "top_p": fields.number("top_p", 0, 1, above=True),
        "top_k": fields.integer("top_k", -1),
        "min_p": fields.number("min_p", 0, 1),
        "presence_penalty": fields.number("presence_penalty", -2, 2),
        "frequency_penalty": fields.number("frequency_penalty", -2, 2),
        "repetition_penalty": fields.number("repetition_penalty", 0, 2, above=True),
        "logit_bias": _logit_bias(fields.take("logit_bias")),
        "seed": fields.integer("seed", -(2**63), 2**63 - 1),
        "stop": _stop(fields.take("stop")),
        "stop_token_ids": _token_id_list("stop_token_ids", fields.take("stop_token_ids")),
        "ignore_eos": fields.boolean("ignore_eos", False),
        "min_tokens": fields.integer("min_tokens", 0),
        "skip_special_tokens": fields.boolean("skip_special_tokens", True),
        "include_stop_str_in_output": fields.boolean("include_stop_str_in_output", False),
        "prompt_logprobs": fields.integer("prompt_logprobs", 0, MAX_LOGPROBS),
        "dysco": _dysco(fields.take("dysco")),
    }


def _dysco(value: Any) -> DyscoParams | None:
    try:
        return None if value is None else params_from_json(value)
    except ValueError as error:
        raise ProtocolError(str(error), "dysco") from None


def _cascade(value: Any) -> CascadeOptions | None:
    try:
        return None if value is None else options_from_json(value)
    except ValueError as error:
        raise ProtocolError(str(error), "cascade") from None


def _left_open(sampling: Mapping[str, Any]) -> frozenset[str]:
    return frozenset(name for name in RECOMMENDED_SAMPLING if sampling[name] is None)


def _params(sampling: Mapping[str, Any], defaults: Mapping[str, Any] | None) -> SamplingParams:
    given = {name: value for name, value in sampling.items() if value is not None}
    given["max_tokens"] = sampling["max_tokens"]  # None has a meaning of its own: up to the model's context
    try:
        return SamplingParams(**{**(defaults or {}), **given})
    except ValueError as error:
        raise ProtocolError(str(error)) from None


def _messages(value: Any) -> tuple[Mapping[str, Any], ...]:
    if value is None:
        raise ProtocolError("messages is required", "messages", "missing_required_parameter")
    if not isinstance(value, list):
        raise _wrong_type("messages", "a list of messages", value)
    if not value:
        raise ProtocolError("messages must hold at least one message, got []", "messages")
    return tuple(_message(f"messages[{i}]", message) for i, message in enumerate(value))


def _message(where: str, message: Any) -> Mapping[str, Any]:
    """A message with its content as one text: what chat templates expect."""
    if not isinstance(message, dict):
        raise _wrong_type(where, "an object", message)
    role = message.get("role")
    if role not in _ROLES:
        raise ProtocolError(f"{where}.role must be one of {', '.join(_ROLES)}, got {_short(role)}", f"{where}.role")
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(_text_part(f"{where}.content[{i}]", part) for i, part in enumerate(content))
    elif content is None and not message.get("tool_calls") and not message.get("function_call"):
        raise ProtocolError(f"{where}.content is required", f"{where}.content", "missing_required_parameter")
    elif content is not None and not isinstance(content, str):
        raise _wrong_type(f"{where}.content", "a string or a list of content parts", content)
    return {**message, "content": content}


def _text_part(where: str, part: Any) -> str:
    if not isinstance(part, dict):
        raise _wrong_type(where, "an object", part)
    if part.get("type") != "text":
        message = f"{where}: only parts of type 'text' are supported, got {_short(part.get('type'))}"
        raise ProtocolError(message, where, "unsupported_parameter")
    text = part.get("text")
    if not isinstance(text, str):
        raise _wrong_type(f"{where}.text", "a string", text)
    return text


def _tools(value: Any) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise _wrong_type("tools", "a list of tools", value)
    for i, tool in enumerate(value):
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            expected = "{'type': 'function', 'function': {'name': ...}}"
            raise ProtocolError(f"tools[{i}] must be {expected}, got {_short(tool)}", f"tools[{i}]")
    return value


def _template_variables(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _wrong_type("chat_template_kwargs", "an object", value)
    for name in _RESERVED_VARIABLES:
        if name in value:
            raise ProtocolError(f"chat_template_kwargs must not set {name!r}", "chat_template_kwargs")
    return dict(value)


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    if value is None:
        raise ProtocolError("prompt is required", "prompt", "missing_required_parameter")
    if isinstance(value, str):
        return (value,)
    expected = "a string, a list of strings, a list of token ids or a list of lists of token ids"
    if not isinstance(value, list):
        raise _wrong_type("prompt", expected, value)
    if not value:
        raise ProtocolError("prompt must not be an empty list", "prompt")
    if all(isinstance(entry, str) for entry in value):
        return tuple(value)
    if all(isinstance(entry, list) for entry in value):
        return tuple(_token_ids(f"prompt[{i}]", entry) for i, entry in enumerate(value))
    if all(_is_integer(entry) for entry in value):
        return (_token_ids("prompt", value),)
    raise ProtocolError(f"prompt must be {expected}, got a list that mixes them", "prompt", "invalid_type")


def _token_ids(where: str, value: list[Any]) -> tuple[int, ...]:
    if not value:
        raise ProtocolError(f"{where} must hold at least one token id, got []", "prompt")
    for i, token_id in enumerate(value):
        if not _is_integer(token_id) or token_id < 0:
            raise ProtocolError(f"{where}[{i}] must be a token id (an integer >= 0), got {_short(token_id)}", "prompt")
    return tuple(value)


def _stop(value: Any) -> list[str] | None:
    if value is None:
        return None
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(s, str) for s in strings):
        raise _wrong_type("stop", "a string or a list of strings", value)
    if len(strings) > MAX_STOP_STRINGS:
        raise ProtocolError(f"stop must hold at most {MAX_STOP_STRINGS} strings, got {len(strings)}", "stop")
    if not all(strings):
        raise ProtocolError("a stop string must not be empty", "stop")
    return strings or None


def _token_id_list(name: str, value: Any) -> list[int] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(_is_integer(i) and i >= 0 for i in value):
        raise _wrong_type(name, "a list of token ids (integers >= 0)", value)
    return value or None


def _logit_bias(value: Any) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise _wrong_type("logit_bias", "an object from token id to bias", value)
    biases = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) < 20):
            raise ProtocolError(f"logit_bias: {_short(key)} is not a token id (an integer >= 0)", "logit_bias")
        if isinstance(bias, bool) or not isinstance(bias, int | float):
            raise _wrong_type(f"logit_bias[{key}]", "a number", bias)
        _check_range(f"logit_bias[{key}]", bias, -100, 100)
        biases[int(key)] = float(bias)
    return biases or None


def _check_range(name: str, value: float, low: float, high: float | None, above: bool = False) -> None:
    enough = value > low if above else value >= low  # a NaN fails every comparison
    if enough and (high is None or value <= high):
        return
    accepted = f"{'above' if above else 'at least'} {low}"
    if high is not None:
        accepted = f"above {low} and at most {high}" if above else f"from {low} to {high}"
    raise ProtocolError(f"{name} must be {accepted}, got {_short(value)}", name.partition("[")[0])


def _wrong_type(name: str, expected: str, value: Any) -> ProtocolError:
    return ProtocolError(f"{name} must be {expected}, got {_short(value)}", name, "invalid_type")


def _accepted_values(name: str) -> str:
    values = " or ".join(_short(value) for value in _UNSUPPORTED[name])
    return f" (only {values})" if values else ""


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _type_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _short(value: Any) -> str:
    """The value as it stands in JSON terms, cut to a readable length."""
    text = repr(value) if not isinstance(value, dict | list) or len(str(value)) <= 80 else _type_name(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
