"""Sampling parameters: what is accepted, and what an error says."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from jaxdual import SamplingParams

BAD: list[tuple[str, Any]] = [
    *(("max_tokens", value) for value in (0, -1, 1.5, "3", True)),
    *(("temperature", value) for value in (-0.1, math.nan, math.inf, "1", None, True, 10**400)),
    *(("top_p", value) for value in (0, 0.0, 1.01, -1, math.nan, None)),
    *(("top_k", value) for value in (-2, 1.0, None, False)),
    *(("min_p", value) for value in (-0.01, 1.01, math.nan, None)),
    *(("presence_penalty", value) for value in (-2.01, 2.01, math.nan, "0")),
    *(("frequency_penalty", value) for value in (-2.01, 2.01, math.inf, None)),
    *(("repetition_penalty", value) for value in (0, -1.0, math.inf, math.nan)),
    *(("seed", value) for value in (2**63, -(2**63) - 1, 1.0, "x", True)),
    *(("min_tokens", value) for value in (-1, 17, 0.5, None)),  # max_tokens is 16
    *(("logprobs", value) for value in (-1, 21, True, 1.0)),
    *(("prompt_logprobs", value) for value in (-1, 21, "all")),
    *(("n", value) for value in (0, -1, None, 2.0)),
    *(("ignore_eos", value) for value in (1, "", None)),
    *(("skip_special_tokens", value) for value in (1, "", None)),
    *(("include_stop_str_in_output", value) for value in (1, "", None)),
    *(("stop", value) for value in ("", [""], ["a", ""], [1], 5, ["a", None], {"a"})),
    *(("stop_token_ids", value) for value in ("12", 5, [-1], [1.0], [True], ["1"], list(range(17)), {1})),
    *(
        ("logit_bias", value)
        for value in ([1], {-1: 1.0}, {"1": 1.0}, {1.0: 1.0}, {1: 100.5}, {1: math.nan}, {1: None})
    ),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda part: repr(part)[:20])
def test_a_bad_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name) as caught:
        SamplingParams(**{name: value})
    if not isinstance(value, dict):
        assert repr(value[-1] if name == "stop_token_ids" and value in ([-1], [1.0], [True], ["1"]) else value) in str(
            caught.value
        )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 1),
        ("max_tokens", None),
        ("temperature", 0),
        ("temperature", np.float64(0.5)),
        ("top_p", 1),
        ("top_p", 1e-9),
        ("top_k", -1),
        ("top_k", 10**9),
        ("min_p", 1.0),
        ("presence_penalty", -2),
        ("frequency_penalty", 2),
        ("repetition_penalty", 30.0),
        ("seed", -(2**63)),
        ("seed", 2**63 - 1),
        ("min_tokens", 16),
        ("logprobs", 20),
        ("prompt_logprobs", 0),
        ("n", 5),
        ("stop", ("a", "bc")),
        ("stop_token_ids", list(range(16))),
        ("logit_bias", {0: -100, 5: 100.0}),
    ],
)
def test_the_ends_of_the_ranges_are_accepted(name: str, value: Any) -> None:
    assert getattr(SamplingParams(**{name: value}), name) == (tuple(value) if name == "stop_token_ids" else value)


def test_unbounded_output_takes_any_min_tokens() -> None:
    assert SamplingParams(max_tokens=None, min_tokens=10**6).min_tokens == 10**6


@pytest.mark.parametrize(("stop", "want"), [(None, ()), ("end", ("end",)), (["a", "b"], ("a", "b")), ([], ())])
def test_stops_become_a_tuple(stop: Any, want: tuple[str, ...]) -> None:
    assert SamplingParams(stop=stop).stop_strings == want


def test_stop_token_ids_are_copied() -> None:
    ids = [1, 2]
    params = SamplingParams(stop_token_ids=ids)
    ids.append(3)
    assert params.stop_token_ids == (1, 2)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"stop_token_ids": [3, 10]}, "stop_token_ids: token id 10"),
        ({"logit_bias": {99: 1.0}}, "logit_bias: token id 99"),
    ],
)
def test_token_ids_must_be_in_the_vocabulary(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"{message} must be below the vocabulary size 10"):
        SamplingParams(**params).check_vocabulary(10)
    SamplingParams(stop_token_ids=[9], logit_bias={9: 1}).check_vocabulary(10)


@pytest.mark.parametrize(
    ("params", "want"),
    [
        ({}, False),
        ({"presence_penalty": 0.1}, True),
        ({"frequency_penalty": -1}, True),
        ({"repetition_penalty": 0.9}, True),
    ],
)
def test_penalties_are_noticed(params: dict[str, float], want: bool) -> None:
    assert SamplingParams(**params).has_penalties is want  # type: ignore[arg-type]


def test_as_dict_makes_an_equal_one() -> None:
    params = SamplingParams(stop="x", stop_token_ids=[1], logit_bias={1: 2.0}, n=2, seed=5)
    assert SamplingParams(**params.as_dict()) == params


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n": 1025}, "n=1025"),
        ({"stop": ["ok", "\ud800"]}, "lone surrogate"),
    ],
)
def test_what_no_message_can_carry_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**values)


def test_a_top_k_above_all_vocabularies_is_one_that_a_message_can_carry() -> None:
    assert SamplingParams(top_k=10**30).top_k == 2**31 - 1
