"""What a request asks of sampling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from jaxdual.decoding.dysco import DyscoParams

MAX_LOGPROBS = 20
MAX_STOP_TOKENS = 16
_MAX_TOP_K = 2**31 - 1  # above all vocabularies, and no more than a message between processes holds
MAX_OUTPUTS = 1024
# What a model may recommend for requests that leave it open.
RECOMMENDED_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_MAX_SEED = 2**63
_MAX_REAL = 1e38  # of float32, which parameters are on the device


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of a request are chosen, and when it ends. Names and meanings are vLLM's.

    Attributes:
      max_tokens: output tokens at most; None for as many as the model's context holds.
      temperature: 0 takes the likeliest token; else logits are divided by it.
      top_p: nucleus: the smallest set of likeliest tokens whose probabilities reach this sum, in (0, 1].
      top_k: only this many likeliest tokens; 0 or -1 for all.
      min_p: only tokens at least this fraction as likely as the likeliest, in [0, 1].
      presence_penalty, frequency_penalty: subtracted from the logits of tokens in the output, once or for each
        occurrence, in [-2, 2].
      repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or output, above 0.
      logit_bias: added to the logits of these token ids, in [-100, 100].
      seed: makes the output reproducible whatever else runs, in [-2**63, 2**63); None draws one.
      stop: strings that end the output; they are not part of it unless `include_stop_str_in_output`.
      stop_token_ids: tokens that end the output.
      ignore_eos: goes on after the model's end-of-sequence tokens.
      min_tokens: output tokens before which no stop token may come.
      logprobs: log-probabilities of so many likeliest tokens with each output token, 0 to 20; None for none.
      prompt_logprobs: the same for the tokens of the prompt.
      n: independent outputs, at most 1024.
      skip_special_tokens: leaves special tokens out of the text.
      include_stop_str_in_output: keeps the stop string in the text.
      dysco: raises the attention to what the model looks for in the context, at each token; None doesn't.
      return_selection: the same as that of `dysco`.

    Raises:
      ValueError: a value of the wrong type or out of its range.
    """

    max_tokens: int | None = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    dysco: DyscoParams | None = None
    return_selection: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            _whole("max_tokens", self.max_tokens, 1, None)
        _real("temperature", self.temperature, 0.0, None)
        _real("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _whole("top_k", self.top_k, -1, None)
        self._set("top_k", min(self.top_k, _MAX_TOP_K))
        _real("min_p", self.min_p, 0.0, 1.0)
        _real("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _real("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _real("repetition_penalty", self.repetition_penalty, 0.0, None, open_low=True)
        if self.seed is not None:
            _whole("seed", self.seed, -_MAX_SEED, _MAX_SEED - 1)
        _whole("min_tokens", self.min_tokens, 0, self.max_tokens)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 0, MAX_LOGPROBS)
        _whole("n", self.n, 1, MAX_OUTPUTS)
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output", "return_selection"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be true or false")
        self._set("stop", self._stops())
        ids = () if self.stop_token_ids is None else self.stop_token_ids
        if isinstance(ids, str) or not isinstance(ids, Sequence) or len(ids) > MAX_STOP_TOKENS:
            raise ValueError(f"stop_token_ids={ids!r} must be a list of at most {MAX_STOP_TOKENS} token ids")
        for token in ids:
            _whole("stop_token_ids", token, 0, None)
        self._set("stop_token_ids", tuple(ids))
        if self.dysco is not None:
            if not isinstance(self.dysco, DyscoParams):
                raise ValueError(f"dysco={self.dysco!r} must be DyscoParams")
            if self.return_selection:
                self._set("dysco", replace(self.dysco, return_selection=True))
            if self.prompt_logprobs is not None:
                raise ValueError("prompt_logprobs and dysco exclude each other: a prompt's end is decoded, not scored")
        elif self.return_selection:
            raise ValueError("return_selection=True: without dysco nothing is selected")
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise ValueError(f"logit_bias={self.logit_bias!r} must map token ids to numbers")
            for token, bias in self.logit_bias.items():
                _whole("logit_bias", token, 0, None)
                _real(f"logit_bias[{token}]", bias, -100.0, 100.0)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return tuple(self.stop or ())

    @property
    def has_penalties(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises `ValueError` if a token id is not one of the model's."""
        for name, ids in (("stop_token_ids", self.stop_token_ids), ("logit_bias", self.logit_bias)):
            for token in ids or ():
                if token >= vocab_size:
                    raise ValueError(f"{name}: token id {token} must be below the vocabulary size {vocab_size}")

    def as_dict(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def _stops(self) -> tuple[str, ...]:
        stop = self.stop
        stops = () if stop is None else (stop,) if isinstance(stop, str) else stop
        if not isinstance(stops, Sequence) or not all(isinstance(item, str) and item for item in stops):
            raise ValueError(f"stop={self.stop!r} must be a non-empty string or a list of them")
        for item in stops:
            try:
                item.encode()
            except UnicodeEncodeError:
                raise ValueError(f"stop={item!r} is not valid Unicode: it holds a lone surrogate") from None
        return tuple(stops)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


def _whole(name: str, value: object, low: int, high: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise ValueError(f"{name}={value!r} must be a whole number {_range(low, high)}")


def _real(name: str, value: object, low: float, high: float | None, *, open_low: bool = False) -> None:
    valid = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _MAX_REAL
    if valid and isinstance(value, (int, float)):
        valid = (value > low if open_low else value >= low) and (high is None or value <= high)
    if not valid:
        raise ValueError(f"{name}={value!r} must be a number {_range(low, high, open_low=open_low)}")


def _range(low: float, high: float | None, *, open_low: bool = False) -> str:
    if high is None:
        return f"above {low}" if open_low else f"of at least {low}"
    return f"in {'(' if open_low else '['}{low}, {high}]"
