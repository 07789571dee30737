"""Prompts and sampling parameters of jaxdual.v1, checked and turned into plain data."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, NoReturn

import grpc

from jaxdual.decoding.dysco import params_from_json
from jaxdual.openai_protocol import MAX_CHOICES, MAX_STOP_STRINGS
from jaxdual.sampling_params import RECOMMENDED_SAMPLING, SamplingParams
from server.grpc.errors import CallError
from server.proto.jaxdual.v1 import inference_pb2 as pb

_LISTS = ("stop", "stop_token_ids")
_OWN_VARIABLES = ("messages", "tools", "add_generation_prompt", "tokenize")


def sampling_params(message: pb.SamplingParams, defaults: SamplingParams, *, open_ended: bool) -> SamplingParams:
    """The parameters that a message asks for.

    Args:
      message: absent fields are left at `defaults`.
      defaults: the model's.
      open_ended: whether an absent max_tokens means as many as fit.

    Raises:
      ValueError: a value out of its range.
    """
    values: dict[str, Any] = {"max_tokens": 0} if open_ended else {}
    for field, value in message.ListFields():
        if field.name in _LISTS:
            value = tuple(value)
        elif field.name == "logit_bias":
            value = dict(value)
        elif field.name == "dysco":
            value = params_from_json(_dysco_fields(value))
        values[field.name] = value
    return checked_params(values, defaults)


def left_open(message: pb.SamplingParams) -> frozenset[str]:
    """Fields that the message leaves to what the model recommends."""
    return frozenset(name for name in RECOMMENDED_SAMPLING if not message.HasField(name))


def _dysco_fields(message: pb.Dysco) -> dict[str, Any]:
    """Fields that are there, by the names and in the values of `DyscoParams`."""
    values: dict[str, Any] = {}
    for field, value in message.ListFields():
        match field.name:
            case "heads":
                values["heads"] = [(head.layer, head.head) for head in value]
            case "template_sequences":
                values["template_sequences"] = [list(sequence.ids) for sequence in value]
            case "raise_template":
                continue
            case "top_p" | "top_k":
                values[field.name] = value or None
            case name:
                values[name] = value
    if message.raise_template:
        if message.template_sequences:
            raise ValueError("dysco: template_sequences and raise_template exclude each other")
        values["template_sequences"] = []
    return values


def checked_params(values: dict[str, Any], defaults: SamplingParams) -> SamplingParams:
    """`defaults` with these values; a max_tokens of 0 is as many as fit.

    Raises:
      ValueError: a value out of its range, for a network face a narrower one than for Python callers.
    """
    if values.get("max_tokens") == 0:
        values = {**values, "max_tokens": None}
    params = dataclasses.replace(defaults, **values)
    if params.n > MAX_CHOICES:
        raise ValueError(f"n={params.n} must be a whole number in [1, {MAX_CHOICES}]")
    if len(params.stop_strings) > MAX_STOP_STRINGS:
        raise ValueError(f"stop has {len(params.stop_strings)} strings; at most {MAX_STOP_STRINGS} are possible")
    return params


def chat_messages(chat: pb.Chat) -> list[dict[str, str]]:
    """The messages as a chat template reads them.

    Raises:
      ValueError: there are none, or one has no role.
    """
    if not chat.messages:
        raise ValueError("chat.messages is empty: a conversation has at least one message")
    for i, message in enumerate(chat.messages):
        if not message.role:
            raise ValueError(f"chat.messages[{i}].role is empty: it must be a role such as 'user'")
    return [{"role": message.role, "content": message.content} for message in chat.messages]


def conversation(chat: pb.Chat) -> dict[str, Any]:
    """The arguments of `tokenize_chat` that a conversation makes.

    Raises:
      ValueError: as for `chat_messages` and `template_variables`.
    """
    return {
        "messages": chat_messages(chat),
        "add_generation_prompt": chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True,
        "template_vars": template_variables(chat),
    }


def template_variables(chat: pb.Chat) -> dict[str, Any]:
    """Tools and further variables of the chat template.

    Raises:
      ValueError: a value that is not JSON, or a name that a field of `Chat` has.
    """
    variables = {}
    for name, text in chat.template_vars_json.items():
        if name in _OWN_VARIABLES:
            raise ValueError(f"chat.template_vars_json[{name!r}]: this variable has its own field, or is not settable")
        variables[name] = parse_json(f"chat.template_vars_json[{name!r}]", text)
    if chat.tools_json:
        tools = parse_json("chat.tools_json", chat.tools_json)
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise ValueError("chat.tools_json must be a JSON array of objects")
        variables["tools"] = tools or None
    return variables


def parse_json(name: str, text: str) -> Any:
    """The value of a JSON text.

    Raises:
      ValueError: it is none; the message begins with `name`.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        # An escaped lone surrogate is a str that can't be sent anywhere.
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{name} is not valid JSON: {reason}") from None
    return value


def no_prompt(fields: Sequence[str]) -> CallError:
    """What a request is told that brings none of the fields."""
    return CallError(grpc.StatusCode.INVALID_ARGUMENT, f"one of {', '.join(fields)} must be set")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")
