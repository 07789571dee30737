"""What a ModelInferRequest asks for: prompt, sampling parameters and form of the answer.

A value may come as a tensor, as a request parameter or in the JSON object of `sampling_parameters`, the form of
Triton's vLLM backend, where numbers may be strings. Given twice it is an error, and so is a name that is not known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxdual.cascade.options import CascadeOptions, options_from_json
from jaxdual.decoding.dysco import DyscoParams, params_from_json
from jaxdual.front import Prompt
from jaxdual.sampling_params import RECOMMENDED_SAMPLING, SamplingParams
from jaxdual.users import checked_user
from server.grpc.kserve_tensors import read_inputs
from server.grpc.prompts import checked_params, parse_json
from server.proto.kserve import open_inference_pb2 as pb

OUTPUTS = ("text_output", "finish_reason", "output_ids", "num_output_tokens")
_TOKEN_DATATYPES = ("INT32", "INT64", "UINT32", "UINT64")
_MAX_TIMEOUT_MICROSECONDS = 10**12
_PRIORITIES = 2**31


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A request, checked.

    Attributes:
      prompt: text or token ids.
      params: how to sample.
      stream: whether the answer comes in parts; None if the request leaves it open.
      echo: whether a text prompt stands before each output's text.
      priority: smaller goes first.
      user: who asks; None if that is not known.
      timeout: seconds until the request is given up; None for no end.
      outputs: names of the wanted tensors.
      cascade: what it asks of a cascade; None if it asks nothing.
      left_open: fields of `params` that it leaves to what the model recommends.
    """

    prompt: Prompt
    params: SamplingParams
    stream: bool | None
    echo: bool
    priority: int
    user: str | None
    timeout: float | None
    outputs: tuple[str, ...]
    cascade: CascadeOptions | None = None
    left_open: frozenset[str] = frozenset()


def read_request(request: pb.ModelInferRequest, defaults: SamplingParams) -> InferRequest:
    """Checks a request.

    Args:
      request: as it came; whether the model is the served one is not looked at.
      defaults: sampling parameters of the model.

    Raises:
      ValueError: something in it can't be used.
    """
    given = _Given()
    for name, parameter in request.parameters.items():
        choice = parameter.WhichOneof("parameter_choice")
        if choice is None:
            raise ValueError(f"parameter {name[:64]!r} has no value")
        given.add(name, getattr(parameter, choice), _PARAMETERS)
    texts: dict[str, str] = {}
    ids: list[int] | None = None
    for name, datatype, elements in read_inputs(request):
        if name in ("text_input", "sampling_parameters"):
            _check_datatype(name, datatype, ("BYTES",))
            if name in texts:
                raise ValueError(f"input {name!r} is given twice")
            texts[name] = _decode(name, _only(name, elements))
        elif name == "input_ids":
            _check_datatype(name, datatype, _TOKEN_DATATYPES)
            if ids is not None:
                raise ValueError(f"input {name!r} is given twice")
            ids = elements
        else:
            items = [_decode(name, element) if isinstance(element, bytes) else element for element in elements]
            given.add(name, items if name in _LISTS else _only(name, items), _TENSORS)
    for name, value in _json_values(texts.get("sampling_parameters")):
        given.add(name, value, _SAMPLING)
    text = texts.get("text_input")
    if (text is None) == (ids is None):
        raise ValueError("one of the inputs 'text_input' (BYTES, the prompt) and 'input_ids' (its token ids) is needed")
    values, timeout = given.values, given.values.get("timeout", 0)
    return InferRequest(
        prompt={"prompt_token_ids": ids} if text is None else text,
        params=checked_params({name: values[name] for name in _SAMPLING if name in values}, defaults),
        stream=values.get("stream"),
        echo=not values.get("exclude_input_in_output", True),
        priority=values.get("priority", 0),
        user=values.get("user"),
        timeout=timeout / 1e6 if timeout else None,
        outputs=_wanted(request.outputs),
        cascade=values.get("cascade"),
        left_open=frozenset(name for name in RECOMMENDED_SAMPLING if name not in values),
    )


class _Given:
    """Values by name, each given once."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def add(self, name: str, value: Any, readers: Mapping[str, Callable[[str, Any], Any]]) -> None:
        if name not in readers:
            raise ValueError(f"{name[:64]!r} is not known; possible here are {', '.join(readers)}")
        if name in self.values:
            raise ValueError(f"{name!r} is given twice")
        self.values[name] = readers[name](name, value)


def _json_values(text: str | None) -> Iterable[tuple[str, Any]]:
    if not text:
        return ()
    values = parse_json("sampling_parameters", text)
    if not isinstance(values, dict):
        raise ValueError("sampling_parameters must be a JSON object")
    return [(name, value) for name, value in values.items() if value is not None]


def _wanted(outputs: Iterable[pb.ModelInferRequest.InferRequestedOutputTensor]) -> tuple[str, ...]:
    names = []
    for output in outputs:
        if output.name not in OUTPUTS:
            raise ValueError(f"output {output.name[:64]!r} is not known; there are {', '.join(OUTPUTS)}")
        if output.name in names:
            raise ValueError(f"output {output.name!r} is requested twice")
        if output.parameters:
            raise ValueError(f"output {output.name!r}: parameters are not supported")
        names.append(output.name)
    return tuple(names) or OUTPUTS


def _check_datatype(name: str, datatype: str, accepted: tuple[str, ...]) -> None:
    if datatype not in accepted:
        raise ValueError(f"input {name!r}: datatype {datatype} must be {' or '.join(accepted)}")


def _only(name: str, elements: list[Any]) -> Any:
    if len(elements) != 1:
        raise ValueError(f"input {name!r} has {len(elements)} elements; its shape must be [1] or [1, 1]")
    return elements[0]


def _decode(name: str, element: bytes) -> str:
    try:
        return element.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"input {name!r} is not valid UTF-8: {error.reason} at byte {error.start}") from None


# Readers of values: from bool, int, float, str and what JSON holds to what `SamplingParams` takes.


def _int(name: str, value: Any) -> int:
    if isinstance(value, str):
        try:
            value = int(value)
        except ValueError:
            raise _wrong(name, "a whole number", value) from None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong(name, "a whole number", value)
    return value


def _float(name: str, value: Any) -> float:
    try:
        number = None if isinstance(value, bool) or not isinstance(value, (int, float, str)) else float(value)
    except (ValueError, OverflowError):
        number = None
    if number is None or not math.isfinite(number):
        raise _wrong(name, "a number", value)
    return number


def _bool(name: str, value: Any) -> bool:
    spelled = {"true": True, "false": False}
    if isinstance(value, str) and value.lower() in spelled:
        return spelled[value.lower()]
    if not isinstance(value, bool):
        raise _wrong(name, "true or false", value)
    return value


def _strings(name: str, value: Any) -> list[str]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
        raise _wrong(name, "a string or a list of strings", value)
    return values


def _ids(name: str, value: Any) -> list[int]:
    values = parse_json(name, value) if isinstance(value, str) else value
    if not isinstance(values, list):
        raise _wrong(name, "a list of token ids", value)
    return [_int(name, item) for item in values]


def _bias(name: str, value: Any) -> dict[int, float]:
    values = parse_json(name, value) if isinstance(value, str) else value
    if not isinstance(values, dict):
        raise _wrong(name, "a JSON object from token ids to numbers", value)
    return {_int(name, token): _float(name, bias) for token, bias in values.items()}


def _timeout(name: str, value: Any) -> int:
    return _within(name, _int(name, value), 0, _MAX_TIMEOUT_MICROSECONDS)


def _priority(name: str, value: Any) -> int:
    return _within(name, _int(name, value), -_PRIORITIES, _PRIORITIES - 1)


def _dysco(name: str, value: Any) -> DyscoParams:
    return params_from_json(parse_json(name, value) if isinstance(value, str) else value)


def _cascade(name: str, value: Any) -> CascadeOptions:
    return options_from_json(parse_json(name, value) if isinstance(value, str) else value)


def _user(name: str, value: Any) -> str | None:
    return checked_user(value, name)


def _within(name: str, value: int, low: int, high: int) -> int:
    if not low <= value <= high:
        raise ValueError(f"{name}={value} must be a whole number in [{low}, {high}]")
    return value


def _wrong(name: str, expected: str, value: Any) -> ValueError:
    shown = repr(value)
    return ValueError(f"{name}={shown if len(shown) <= 80 else shown[:77] + '...'} must be {expected}")


_SAMPLING: dict[str, Callable[[str, Any], Any]] = {
    **dict.fromkeys(("max_tokens", "top_k", "seed", "min_tokens", "n"), _int),
    **dict.fromkeys(("temperature", "top_p", "min_p"), _float),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "repetition_penalty"), _float),
    **dict.fromkeys(("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"), _bool),
    "stop": _strings,
    "stop_token_ids": _ids,
    "logit_bias": _bias,
    "dysco": _dysco,
}
_LISTS = ("stop", "stop_token_ids")
_TENSORS = {**_SAMPLING, "stream": _bool, "exclude_input_in_output": _bool}
_PARAMETERS = {
    **_TENSORS,
    "priority": _priority,
    "user": _user,
    "cascade": _cascade,
    "timeout": _timeout,
    # What it asks for happens anyway: the last answer of a request is marked.
    "triton_enable_empty_final_response": _bool,
}
