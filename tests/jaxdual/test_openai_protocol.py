import contextlib
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdual.decoding.dysco import DyscoParams
from jaxdual.openai_protocol import ProtocolError, parse_chat, parse_completion
from jaxdual.openai_responses import error_body

USER = {"role": "user", "content": "hi"}


def chat(**fields):
    return parse_chat({"messages": [USER], **fields})


def completion(**fields):
    return parse_completion({"prompt": "def f", **fields})


def test_chat_defaults():
    request = chat()
    assert request.messages == (USER,)
    assert request.params.max_tokens is None
    assert (request.params.temperature, request.params.n, request.params.logprobs) == (1.0, 1, None)
    assert (request.model, request.stream, request.add_generation_prompt) == (None, False, True)


def test_completion_defaults():
    request = completion()
    assert request.prompts == ("def f",)
    assert (request.params.max_tokens, request.echo, request.add_special_tokens) == (16, False, True)


def test_sampling_fields_reach_the_engine():
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "presence_penalty": -1,
        "frequency_penalty": 2,
        "repetition_penalty": 1.1,
        "seed": -7,
        "n": 3,
        "min_tokens": 2,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
        "prompt_logprobs": 2,
    }
    for request in (chat(max_tokens=9, **fields), completion(max_tokens=9, **fields)):
        for name, value in fields.items():
            assert getattr(request.params, name) == value
        assert request.params.max_tokens == 9


def test_stop_token_ids_and_logit_bias_are_read():
    params = completion(stop=["a", "b"], stop_token_ids=[5, 6], logit_bias={"17": -100, "3": 1.5}).params
    assert params.stop_strings == ("a", "b")
    assert list(params.stop_token_ids) == [5, 6]
    assert params.logit_bias == {17: -100.0, 3: 1.5}
    assert completion(stop="\n").params.stop_strings == ("\n",)
    assert completion(stop=[], stop_token_ids=[], logit_bias={}).params.stop_strings == ()


def test_dysco_is_an_object_of_its_parameters():
    for make in (chat, completion):
        wanted = {"heads": [[1, 2], [3, 4]], "top_p": None, "top_k": 7, "tail": "auto", "preset": "paper"}
        assert make(dysco=wanted).params.dysco == DyscoParams(
            heads=[(1, 2), (3, 4)], top_p=None, top_k=7, preset="paper"
        )
        assert make(dysco={}).params.dysco == DyscoParams()
        assert make(dysco=None).params.dysco is None
        for value, message in (
            ([], "must be an object"),
            ({"head": []}, "unknown field 'head'; known are heads, profile, top_p"),
            ({"return_selection": True}, "unknown field 'return_selection'"),
            ({"strength": 0}, "strength=0 must be above 0"),
            ({"heads": [[1]]}, "list of .layer, head. pairs"),
            ({"profile": "/etc/passwd"}, "profile='/etc/passwd' must be one of llama-3.1-8b"),
            ({"profile": "mine.json"}, "profile='mine.json' must be one of llama-3.1-8b"),
            ({"top_k": "many"}, "top_k='many' must be a whole number"),
        ):
            with pytest.raises(ProtocolError, match=message) as caught:
                make(dysco=value)
            assert caught.value.param == "dysco"


def test_null_means_the_default():
    nulls = dict.fromkeys(
        ["temperature", "top_p", "n", "stop", "seed", "stream", "logit_bias", "response_format", "user", "audio"]
    )
    assert chat(**nulls) == chat()


def test_max_completion_tokens_goes_before_max_tokens():
    assert chat(max_tokens=5).params.max_tokens == 5
    assert chat(max_tokens=5, max_completion_tokens=7).params.max_tokens == 7


def test_model_defaults_fill_what_the_body_leaves_out():
    request = parse_chat({"messages": [USER], "top_p": 0.5}, {"temperature": 0.25, "top_p": 0.75})
    assert (request.params.temperature, request.params.top_p) == (0.25, 0.5)


def test_chat_log_probabilities():
    assert chat(logprobs=True).params.logprobs == 0
    assert chat(logprobs=True, top_logprobs=20).params.logprobs == 20
    assert chat(logprobs=False).params.logprobs is None


def test_completion_log_probabilities_with_echo_cover_the_prompt():
    assert completion(logprobs=4).params.prompt_logprobs is None
    params = completion(logprobs=4, echo=True).params
    assert (params.logprobs, params.prompt_logprobs) == (4, 4)


def test_zero_tokens_are_allowed_with_echo_only():
    request = completion(max_tokens=0, echo=True)
    assert request.echo_only
    assert request.params.max_tokens == 1
    with pytest.raises(ProtocolError, match="max_tokens must be at least 1, got 0"):
        completion(max_tokens=0)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
    ],
)
def test_forms_of_a_prompt(prompt, expected):
    assert completion(prompt=prompt).prompts == expected


@pytest.mark.parametrize("prompt", [[], [[]], ["a", 1], [1, "a"], [1.5], [True], [-1], [[1], "a"], 7, {"a": 1}])
def test_wrong_prompts(prompt):
    with pytest.raises(ProtocolError, match="prompt") as caught:
        completion(prompt=prompt)
    assert caught.value.param == "prompt"


def test_content_parts_become_one_text():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    request = parse_chat({"messages": [{"role": "user", "content": parts, "name": "x"}]})
    assert request.messages == ({"role": "user", "content": "one\ntwo", "name": "x"},)


def test_assistant_message_may_have_tool_calls_in_place_of_content():
    message = {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f"}}]}
    assert parse_chat({"messages": [USER, message]}).messages[1] == {**message, "content": None}


def test_tools_and_template_variables_reach_the_template():
    tools = [{"type": "function", "function": {"name": "search"}}]
    request = chat(tools=tools, tool_choice="auto", chat_template_kwargs={"enable_thinking": False})
    assert request.template_vars == {"tools": tools, "enable_thinking": False}


def test_fields_without_effect_are_accepted():
    accepted = {"safety_identifier": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"}
    neutral = {"response_format": {"type": "text"}, "modalities": ["text"], "tool_choice": "none", "priority": 0}
    assert chat(**accepted, **neutral) == chat()
    assert completion(n=2, best_of=2, suffix="") == completion(n=2)


@pytest.mark.parametrize("make", [chat, completion])
def test_the_cache_key_or_else_the_user_says_who_asks(make):
    assert make().user is make(user="").user is make(user=None).user is make(safety_identifier="u").user is None
    assert make(user="ann").user == make(user="ann", prompt_cache_key="").user == "ann"
    assert make(prompt_cache_key="k").user == make(user="ann", prompt_cache_key="k").user == "k"


def test_stream_options():
    request = chat(stream=True, stream_options={"include_usage": True})
    assert (request.stream, request.include_usage) == (True, True)


@pytest.mark.parametrize(
    ("fields", "param", "code", "message"),
    [
        ({"temprature": 1}, "temprature", "unknown_parameter", "unknown field 'temprature'"),
        ({"prompt": "x"}, "prompt", "unknown_parameter", "unknown field 'prompt'"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter", "json_object"),
        ({"audio": {"voice": "x"}}, "audio", "unsupported_parameter", "not supported"),
        ({"tool_choice": "required"}, "tool_choice", "unsupported_parameter", "only 'none' or 'auto'"),
        ({"temperature": 2.5}, "temperature", "invalid_value", "from 0 to 2, got 2.5"),
        ({"temperature": math.nan}, "temperature", "invalid_value", "got nan"),
        ({"temperature": 10**400}, "temperature", "invalid_value", "from 0 to 2"),
        ({"temperature": "hot"}, "temperature", "invalid_type", "must be a number, got 'hot'"),
        ({"temperature": True}, "temperature", "invalid_type", "must be a number"),
        ({"top_p": 0}, "top_p", "invalid_value", "above 0 and at most 1, got 0"),
        ({"top_k": -2}, "top_k", "invalid_value", "at least -1"),
        ({"presence_penalty": 2.1}, "presence_penalty", "invalid_value", "from -2 to 2"),
        ({"n": 0}, "n", "invalid_value", "from 1 to 128, got 0"),
        ({"n": 1.0}, "n", "invalid_type", "must be an integer"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value", "at least 1, got 0"),
        ({"max_tokens": 4, "min_tokens": 5}, None, "invalid_value", "min_tokens"),
        ({"seed": 2**63}, "seed", "invalid_value", "got 9223372036854775808"),
        ({"logprobs": 3}, "logprobs", "invalid_type", "must be a boolean"),
        ({"top_logprobs": 3}, "top_logprobs", "invalid_value", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value", "from 0 to 20, got 21"),
        ({"stop": ["x"] * 17}, "stop", "invalid_value", "at most 16 strings, got 17"),
        ({"stop": [""]}, "stop", "invalid_value", "must not be empty"),
        ({"stop": [1]}, "stop", "invalid_type", "a string or a list of strings"),
        ({"stop_token_ids": [-1]}, "stop_token_ids", "invalid_type", "token ids"),
        ({"logit_bias": {"1" * 5000: 1}}, "logit_bias", "invalid_value", "is not a token id"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "invalid_value", "'a' is not a token id"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "invalid_value", "from -100 to 100, got 101"),
        ({"logit_bias": [1]}, "logit_bias", "invalid_type", "an object"),
        ({"stream_options": {}}, "stream_options", "invalid_value", "needs stream"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options", "unknown_parameter", "'x'"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs", "invalid_value", "must not set 'tools'"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0]", "invalid_value", "tools\\[0\\] must be"),
        ({"model": 3}, "model", "invalid_type", "must be a string"),
        ({"user": 3}, "user", "invalid_type", "user must be a string, got 3"),
        ({"user": "x" * 513}, "user", "invalid_value", "user has 513 characters; at most 512 are possible"),
        ({"user": "\ud800", "prompt_cache_key": "k"}, "user", "invalid_value", "user is not valid Unicode"),
        ({"prompt_cache_key": "x" * 513}, "prompt_cache_key", "invalid_value", "prompt_cache_key has 513 characters"),
    ],
)
def test_wrong_fields_are_named(fields, param, code, message):
    with pytest.raises(ProtocolError, match=message) as caught:
        chat(**fields)
    assert (caught.value.param, caught.value.code) == (param, code)


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ([], "messages"),
        ("hi", "messages"),
        (["hi"], "messages[0]"),
        ([{"role": "robot", "content": "x"}], "messages[0].role"),
        ([{"content": "x"}], "messages[0].role"),
        ([USER, {"role": "user"}], "messages[1].content"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
    ],
)
def test_wrong_messages_are_named(messages, param):
    with pytest.raises(ProtocolError) as caught:
        parse_chat({"messages": messages})
    assert caught.value.param == param


@pytest.mark.parametrize("body", [None, [], "x", 3])
def test_body_must_be_an_object(body):
    with pytest.raises(ProtocolError, match="must be a JSON object"):
        parse_completion(body)


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["user", "text"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "1"]), inner),
    max_leaves=6,
)
FIELD = st.sampled_from(
    [
        *("messages", "prompt", "n", "temperature", "top_p", "top_k", "stop", "seed", "logprobs", "top_logprobs"),
        *("logit_bias", "max_tokens", "stream", "tools", "stream_options", "stop_token_ids", "chat_template_kwargs"),
        *("response_format", "min_tokens", "echo", "model", "user", "prompt_cache_key", "other"),
    ]
)


@given(st.dictionaries(FIELD, ANY_JSON, max_size=4))
@settings(max_examples=300, deadline=None)
def test_any_body_is_a_request_or_a_protocol_error(body):
    for parse, required in ((parse_chat, {"messages": [USER]}), (parse_completion, {"prompt": "x"})):
        with contextlib.suppress(ProtocolError):
            parse({**required, **body})


def test_long_values_are_cut_in_messages():
    with pytest.raises(ProtocolError) as caught:
        completion(stop=[["x" * 10**5]])
    assert len(caught.value.message) < 200


def test_error_body_is_openai_s():
    assert error_body("no", "n", "invalid_value") == {
        "error": {"message": "no", "type": "invalid_request_error", "param": "n", "code": "invalid_value"}
    }
