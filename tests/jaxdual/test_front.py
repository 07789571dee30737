"""The text side of an engine, with an engine that does what the test says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from jaxdual import SamplingParams
from jaxdual.engine.request import Request, TokenEvent, TokenLogprobs
from jaxdual.errors import PromptTooLongError
from jaxdual.front import Front

VOCAB = 27
FIRST = "0"  # what the engine calls the first request, whatever its caller does


class Letters:
    """A tokenizer of one letter a token; token 26 is special."""

    longest_token = 1

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join("" if i == 26 and skip_special_tokens else "<s>" if i == 26 else chr(97 + i) for i in ids)


class Engine:
    """Takes requests, and ends them as the real one does: with an event at the next step."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.aborted: list[tuple[str, int | None]] = []

    def add(self, request: Request) -> None:
        self.requests.append(request)

    def abort(self, request_id: str, index: int | None = None) -> None:
        self.aborted.append((request_id, index))


def front_of(tokenizer: Any = "letters", max_model_len: int = 20) -> tuple[Front, Engine]:
    engine = Engine()
    chosen = Letters() if tokenizer == "letters" else tokenizer
    return Front(engine, chosen, vocab_size=VOCAB, max_model_len=max_model_len), engine


def token(letter: str, index: int = 0, **more: Any) -> TokenEvent:
    return TokenEvent(FIRST, index, ord(letter) - ord("a"), **more)


def test_a_request_carries_tokens_limits_priority_and_user() -> None:
    front, engine = front_of()
    output = front.submit("abc", SamplingParams(max_tokens=5), priority=-2, user="ann")
    (request,) = engine.requests
    assert request.prompt_token_ids == [0, 1, 2]
    assert (request.params.max_tokens, request.priority, request.user) == (5, -2, "ann")
    assert request.salt == b"", "users share what is cached"
    assert request.request_id == FIRST
    assert (output.prompt, output.prompt_token_ids, output.finished) == ("abc", [0, 1, 2], False)
    assert front.num_unfinished == 1


@pytest.mark.parametrize(
    ("asked", "least", "want"),
    [(None, 0, (17, 0)), (100, 0, (17, 0)), (17, 3, (17, 3)), (4, 4, (4, 4)), (None, 50, (17, 17)), (90, 80, (17, 17))],
)
def test_output_limits_are_clipped_to_the_room_that_is_left(
    asked: int | None, least: int, want: tuple[int, int]
) -> None:
    front, engine = front_of()
    front.submit("abc", SamplingParams(max_tokens=asked, min_tokens=least))
    assert (engine.requests[0].params.max_tokens, engine.requests[0].params.min_tokens) == want


@pytest.mark.parametrize(
    "prompt",
    [
        [1, 2],
        (1, 2),
        np.array([1, 2]),
        np.array([1, 2], np.uint8),
        range(1, 3),
        {"prompt_token_ids": [1, 2]},
        "bc",
        {"prompt": "bc"},
    ],
)
def test_prompts_come_in_many_forms(prompt: Any) -> None:
    front, engine = front_of()
    front.submit(prompt, SamplingParams())
    assert engine.requests[0].prompt_token_ids == [1, 2]
    assert all(type(one) is int for one in engine.requests[0].prompt_token_ids)


@pytest.mark.parametrize(
    "prompt",
    [
        None,
        5,
        1.5,
        "",
        [],
        {},
        np.array([], np.int32),
        np.array(5),
        np.array([[1, 2]]),
        np.array([[1], [2]]),
        np.array([1.0]),
        [1.0],
        [True],
        [None],
        ["a"],
        [[1, 2]],
        [VOCAB],
        [-1],
        [0] * 20,
        "a" * 20,
        {"prompt": None},
        {"prompt": [1]},
        {"prompt_token_ids": "ab"},
        {"prompt_token_ids": None},
        {"text": "ab"},
        {"prompt": "ab", "prompt_token_ids": [1]},
        {"prompt": "ab", "multi_modal_data": {}},
    ],
    ids=lambda prompt: repr(prompt).replace("\n", ""),
)
def test_prompts_that_cannot_be_used_are_refused_and_leave_nothing(prompt: Any) -> None:
    front, engine = front_of()
    with pytest.raises(ValueError, match=r"\w"):
        front.submit(prompt, SamplingParams())
    assert (engine.requests, front.num_unfinished) == ([], 0)


@pytest.mark.parametrize(
    ("user", "message"),
    [
        ("x" * 513, "user has 513 characters; at most 512 are possible"),
        ("ab\ud800", "user is not valid Unicode at character 2"),
        (7, "user must be text, not int"),
        (b"ann", "user must be text, not bytes"),
    ],
)
def test_users_that_cannot_be_used_are_refused_and_leave_nothing(user: Any, message: str) -> None:
    front, engine = front_of()
    with pytest.raises(ValueError, match=f"^{message}$"):
        front.submit("abc", SamplingParams(), user=user)
    assert (engine.requests, front.num_unfinished) == ([], 0)


@pytest.mark.parametrize(("user", "known"), [(None, None), ("", None), ("ë" * 512, "ë" * 512)])
def test_an_empty_user_is_none_and_others_stay_as_they_are(user: str | None, known: str | None) -> None:
    front, engine = front_of()
    front.submit("abc", SamplingParams(), user=user)
    assert engine.requests[0].user == known


def test_errors_name_value_and_range() -> None:
    front, _ = front_of()
    with pytest.raises(ValueError, match=r"prompt token 27 must be a token id in \[0, 26\]"):
        front.submit([27], SamplingParams())
    with pytest.raises(ValueError, match=r"has 20 tokens; .* at most 19, since max_model_len is 20"):
        front.submit([0] * 20, SamplingParams())
    with pytest.raises(ValueError, match="stop_token_ids: token id 27"):
        front.submit([0], SamplingParams(stop_token_ids=[27]))
    front.submit([0] * 19, SamplingParams())


def test_without_a_tokenizer_text_and_stop_strings_are_refused() -> None:
    front, engine = front_of(tokenizer=None)
    with pytest.raises(ValueError, match="token ids"):
        front.submit("ab", SamplingParams())
    with pytest.raises(ValueError, match="stop_token_ids"):
        front.submit([1], SamplingParams(stop="a"))
    output = front.submit([1], SamplingParams(logprobs=1), "r")
    front.take([token("c", logprobs=TokenLogprobs(-1.0, 1, ((2, -1.0),)), finish_reason="length")])
    assert (output.outputs[0].text, output.outputs[0].token_ids) == ("", [2])
    assert output.outputs[0].logprobs is not None
    assert output.outputs[0].logprobs[0][2].decoded_token is None
    assert len(engine.requests) == 1


def test_text_grows_with_events_until_the_last() -> None:
    front, _ = front_of()
    output = front.submit("a", SamplingParams(), "r")
    assert front.take([token("x", cached_tokens=7)]) == [output]
    assert (output.outputs[0].text, output.finished, output.num_cached_tokens) == ("x", False, 7)
    assert output.metrics.first_token_time is not None
    front.take([token("y", cached_tokens=7, finish_reason="length")])
    assert (output.outputs[0].text, output.outputs[0].finish_reason, output.finished) == ("xy", "length", True)
    assert output.metrics.finished_time is not None
    assert output.metrics.finished_time >= output.metrics.first_token_time
    assert front.num_unfinished == 0


def test_a_changed_output_is_returned_once_for_many_events() -> None:
    front, _ = front_of()
    output = front.submit("a", SamplingParams(), "r")
    assert front.take([token("x"), token("y"), token("z")]) == [output]
    assert output.outputs[0].text == "xyz"


@pytest.mark.parametrize(("include", "text"), [(False, "w"), (True, "wxy")])
def test_a_stop_string_cuts_the_text_and_ends_the_output_in_the_engine(include: bool, text: str) -> None:
    front, engine = front_of()
    output = front.submit("a", SamplingParams(stop=["xy"], include_stop_str_in_output=include), "r")
    front.take([token("w"), token("x")])
    assert output.outputs[0].text == "w", "what may begin a stop string is held back"
    front.take([token("y")])
    assert engine.aborted == [(FIRST, 0)]
    one = output.outputs[0]
    assert (one.text, one.finish_reason, one.stop_reason) == (text, "stop", "xy")
    assert output.finished
    assert front.take([token("z"), TokenEvent(FIRST, 0, None, finish_reason="abort")]) == []
    assert one.token_ids == [22, 23, 24]


def test_a_stop_string_in_the_last_token_asks_for_no_abort() -> None:
    front, engine = front_of()
    output = front.submit("a", SamplingParams(stop="y"), "r")
    front.take([token("y", finish_reason="length")])
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", "y")
    assert engine.aborted == []


def test_held_back_text_comes_out_at_the_end() -> None:
    front, _ = front_of()
    output = front.submit("a", SamplingParams(stop="xyz"), "r")
    front.take([token("x"), token("y", finish_reason="length")])
    assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("xy", "length")


def test_stop_strings_are_not_looked_for_in_the_least_output() -> None:
    front, _ = front_of()
    output = front.submit("a", SamplingParams(stop="x", min_tokens=1), "r")
    front.take([token("x"), token("y")])
    assert not output.finished
    front.take([token("x")])
    assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("xy", "stop")


@pytest.mark.parametrize(("asked", "reason"), [([24], 24), (None, None)])
def test_a_stop_token_is_not_in_the_text_and_is_the_reason_only_if_asked_for(
    asked: list[int] | None, reason: int | None
) -> None:
    front, _ = front_of()
    output = front.submit("a", SamplingParams(stop_token_ids=asked), "r")
    front.take([token("x"), token("y", finish_reason="stop", stop_token=24)])
    one = output.outputs[0]
    assert (one.text, one.token_ids, one.finish_reason, one.stop_reason) == ("x", [23, 24], "stop", reason)


def test_special_tokens_are_left_out_unless_wanted() -> None:
    for skip, text in ((True, "x"), (False, "<s>x")):
        front, _ = front_of()
        output = front.submit("a", SamplingParams(skip_special_tokens=skip), "r")
        front.take([TokenEvent(FIRST, 0, 26), token("x", finish_reason="length")])
        assert output.outputs[0].text == text


def test_several_outputs_end_one_by_one() -> None:
    front, engine = front_of()
    output = front.submit("a", SamplingParams(n=3, stop="q"), "r")
    front.take([token("x", 0, cached_tokens=1), token("y", 2, cached_tokens=9), token("z", 1)])
    assert output.num_cached_tokens == 1
    front.take([token("q", 1), token("b", 2, finish_reason="length")])
    assert engine.aborted == [(FIRST, 1)]
    assert [one.finish_reason for one in output.outputs] == [None, "stop", "length"]
    assert not output.finished
    assert front.take([token("c", 1), TokenEvent(FIRST, 1, None, finish_reason="abort")]) == []
    front.take([token("d", 0, finish_reason="length")])
    assert [one.text for one in output.outputs] == ["xd", "z", "yb"]
    assert [one.index for one in output.outputs] == [0, 1, 2]
    assert output.finished


def test_abort_goes_to_the_engine_and_its_event_ends_the_output() -> None:
    front, engine = front_of()
    output = front.submit("a", SamplingParams(stop="xy"), "r")
    front.take([token("w"), token("x")])
    front.abort("r")
    assert engine.aborted == [(FIRST, None)]
    front.take([TokenEvent(FIRST, 0, None, finish_reason="abort")])
    assert (output.outputs[0].text, output.outputs[0].finish_reason, output.finished) == ("wx", "abort", True)


def test_an_error_event_ends_the_output_with_its_message() -> None:
    front, _ = front_of()
    output = front.submit("a", SamplingParams(), "r")
    front.take([TokenEvent(FIRST, 0, None, finish_reason="error", error="the device is gone")])
    assert (output.outputs[0].finish_reason, output.outputs[0].error) == ("error", "the device is gone")


def test_events_of_unknown_requests_are_ignored() -> None:
    front, _ = front_of()
    assert front.take([token("x")]) == []


def test_a_request_that_the_engine_refuses_is_not_kept() -> None:
    front, engine = front_of()
    first = front.submit("a", SamplingParams(), "r")
    engine.add = lambda request: (_ for _ in ()).throw(ValueError("in use"))  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="in use"):
        front.submit("b", SamplingParams(), "r")
    front.take([token("x", finish_reason="length")])
    assert first.outputs[0].text == "x"


@pytest.mark.parametrize("wanted", [0, 2, 5])
def test_logprobs_are_the_chosen_token_and_as_many_as_wanted(wanted: int) -> None:
    front, _ = front_of()
    output = front.submit("a", SamplingParams(logprobs=wanted), "r")
    top = tuple((i, -float(i)) for i in range(1, 8))
    front.take([token("z", logprobs=TokenLogprobs(-9.0, 12, top)), token("c", logprobs=TokenLogprobs(-2.0, 2, top))])
    first, second = output.outputs[0].logprobs or []
    assert list(first) == [25, *range(1, wanted + 1)]
    assert (first[25].logprob, first[25].rank, first[25].decoded_token) == (-9.0, 12, "z")
    assert len(second) == (wanted if wanted >= 2 else wanted + 1)  # the chosen one is the second likeliest
    if wanted:
        assert (first[1].logprob, first[1].rank, first[1].decoded_token) == (-1.0, 1, "b")
    assert output.outputs[0].cumulative_logprob == -11.0


def test_prompt_logprobs_start_with_none() -> None:
    front, _ = front_of()
    output = front.submit("abc", SamplingParams(prompt_logprobs=1), "r")
    scores = (TokenLogprobs(-3.0, 5, ((7, -0.5),)), TokenLogprobs(-0.1, 1, ((2, -0.1),)))
    front.take([token("x", prompt_logprobs=scores, finish_reason="length")])
    assert output.prompt_logprobs is not None
    assert [None if one is None else list(one) for one in output.prompt_logprobs] == [None, [1, 7], [2]]
    assert output.outputs[0].logprobs is None


def test_made_ids_differ() -> None:
    front, engine = front_of()
    for _ in range(3):
        front.submit("a", SamplingParams())
    assert len({request.request_id for request in engine.requests}) == 3


def test_snapshots_do_not_change_with_later_events() -> None:
    front, _ = front_of()
    output = front.submit("a", SamplingParams(logprobs=0), "r")
    front.take([token("x", logprobs=TokenLogprobs(-1.0, 1, ()))])
    before = output.snapshot()
    front.take([token("y", logprobs=TokenLogprobs(-1.0, 1, ()), finish_reason="length")])
    assert (before.outputs[0].text, before.outputs[0].token_ids, before.finished) == ("x", [23], False)
    assert len(before.outputs[0].logprobs or []) == 1
    assert before.metrics.finished_time is None


def test_a_text_that_cannot_fit_is_refused_unread() -> None:
    front, engine = front_of(max_model_len=20)
    with pytest.raises(PromptTooLongError, match=r"81 characters; .* 20 tokens, which are at most 80 characters"):
        front.submit("a" * 81, SamplingParams())
    with pytest.raises(PromptTooLongError, match="the prompt has 80 tokens"):
        front.submit("a" * 80, SamplingParams())
    assert engine.requests == []


def test_a_lost_engine_ends_requests_with_its_error_but_those_that_it_never_had() -> None:
    front, _ = front_of()
    lost, kept = front.submit("a", SamplingParams(n=2)), front.submit("b", SamplingParams())
    front.take([token("c"), token("d", finish_reason="length", index=1)])
    assert front.fail("it is gone", keep={"1"}) == [lost]
    assert [(output.finish_reason, output.error) for output in lost.outputs] == [
        ("error", "it is gone"),
        ("length", None),
    ]
    assert lost.finished
    assert not kept.finished
    assert front.num_unfinished == 1
