"""`/v1/completions` and `/v1/chat/completions` as the stock openai client sees them."""

import json

import pytest

from jaxdual.tokenizer import Tokenizer
from tests.server.http.scripted import EOS, TOKENIZER

MODEL = "scripted"
USER = {"role": "user", "content": "hi"}
TEXT = "def f(x):\n    return x\n"
READER = Tokenizer.from_dir(TOKENIZER)


def echoed(text, count, start=0):
    """What the scripted engine answers a text with."""
    tokens = READER.encode(text)
    return READER.decode([tokens[(start + i) % len(tokens)] for i in range(count)])


def texts(chunks, count=1):
    """Texts of the choices of a stream, put together."""
    joined = [""] * count
    for chunk in chunks:
        for choice in chunk.choices:
            joined[choice.index] += choice.text
    return joined


def test_a_completion_has_text_usage_and_reason(client):
    answer = client.completions.create(model=MODEL, prompt=TEXT, max_tokens=6)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.index) == (echoed(TEXT, 6), "length", 0)
    tokens = len(READER.encode(TEXT))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (tokens, 6)
    assert (answer.object, answer.model, answer.system_fingerprint) == ("text_completion", MODEL, "fp_scripted")
    assert answer.id.startswith("cmpl-")


def test_several_prompts_with_several_choices_are_numbered_by_prompt(client):
    prompts = ["def a", "import os"]
    expected = [echoed(prompt, 5, index) for prompt in prompts for index in range(2)]
    for forms in (prompts, [READER.encode(prompt) for prompt in prompts]):
        answer = client.completions.create(model=MODEL, prompt=forms, n=2, max_tokens=5)
        assert [choice.text for choice in answer.choices] == expected
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert answer.usage.completion_tokens == 20


def test_a_stream_says_what_the_whole_answer_says(client):
    prompts = ["def a(b):", "import os\n", "x = 1"]
    fields = {"model": MODEL, "prompt": prompts, "n": 2, "max_tokens": 11}
    whole = client.completions.create(**fields)
    chunks = list(client.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert texts(chunks, 6) == [choice.text for choice in whole.choices]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    reasons = [(c.index, c.finish_reason) for chunk in chunks for c in chunk.choices if c.finish_reason]
    assert sorted(reasons) == [(i, "length") for i in range(6)]
    assert len({chunk.id for chunk in chunks}) == 1


def test_echo_with_log_probabilities_streams_what_the_whole_answer_has(client):
    fields = {"model": MODEL, "prompt": "def a(b): # é😀", "max_tokens": 30, "echo": True, "logprobs": 2}
    whole = client.completions.create(**fields).choices[0]
    chunks = list(client.completions.create(**fields, stream=True))
    assert texts(chunks) == [whole.text]
    assert whole.text.startswith(fields["prompt"])
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        parts = [getattr(c.logprobs, name) for chunk in chunks for c in chunk.choices if c.logprobs]
        assert [item for part in parts for item in part] == getattr(whole.logprobs, name)
    assert whole.logprobs.token_logprobs[0] is None
    assert whole.logprobs.text_offset[-1] < len(whole.text)


@pytest.mark.parametrize("stream", [False, True])
def test_echo_of_no_new_tokens_scores_the_prompt(client, stream):
    answer = client.completions.create(
        model=MODEL, prompt=TEXT, echo=True, max_tokens=0, logprobs=1, stream=stream, **usage_of(stream)
    )
    chunks = list(answer) if stream else [answer]
    assert texts(chunks) == [TEXT]
    scored = [c.logprobs for chunk in chunks for c in chunk.choices if c.logprobs]
    assert len(scored) == 1
    assert len(scored[0].tokens) == len(READER.encode(TEXT))
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == ["length"]
    assert chunks[-1].usage.completion_tokens == 0


def usage_of(stream):
    return {"stream_options": {"include_usage": True}} if stream else {}


def test_characters_of_several_tokens_are_never_torn(client):
    prompt = "é😀日本"
    chunks = list(client.completions.create(model=MODEL, prompt=prompt, max_tokens=20, stream=True))
    assert "\ufffd" not in "".join(c.text for chunk in chunks[:-2] for c in chunk.choices)
    whole = client.completions.create(model=MODEL, prompt=prompt, max_tokens=20)
    assert texts(chunks) == [whole.choices[0].text]


def test_a_stop_string_ends_a_stream_and_is_not_sent(client):
    chunks = list(client.completions.create(model=MODEL, prompt=TEXT, max_tokens=50, stop=["return"], stream=True))
    assert texts(chunks) == [TEXT[: TEXT.index("return")]]
    last = chunks[-1].choices[0]
    assert (last.finish_reason, last.stop_reason) == ("stop", "return")


def test_a_stop_token_ends_a_completion(server, client):
    server.call(setattr, server.llm, "script", [5, 6, EOS])
    choice = client.completions.create(model=MODEL, prompt="a", max_tokens=50).choices[0]
    assert (choice.text, choice.finish_reason) == (READER.decode([5, 6]), "stop")


def test_continuous_usage_counts_up(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(
        client.completions.create(model=MODEL, prompt="a b", max_tokens=9, stream=True, stream_options=options)
    )
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 9


@pytest.mark.parametrize("stream", [False, True])
def test_the_user_or_cache_key_reaches_the_engine(server, client, stream):
    for fields in ({}, {"user": "ann"}, {"user": "ann", "prompt_cache_key": "k"}):
        list(client.completions.create(model="scripted", prompt=["x", "y"], stream=stream, extra_body=fields))
        list(client.chat.completions.create(model="scripted", messages=[USER], stream=stream, **fields))
    assert server.llm.users == [None] * 3 + ["ann"] * 3 + ["k"] * 3


def test_a_chat_is_answered(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=[USER], max_tokens=7, logprobs=True, top_logprobs=2, extra_body={"ignore_eos": True}
    )
    prompt = READER.apply_chat_template([USER])
    (choice,) = answer.choices
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert choice.message.content == READER.decode(READER.encode(prompt, False)[:7], skip_special_tokens=True)
    assert len(choice.logprobs.content) == 7
    assert [len(entry.top_logprobs) for entry in choice.logprobs.content] == [2] * 7
    assert answer.usage.prompt_tokens == len(READER.encode(prompt, False))
    assert answer.id.startswith("chatcmpl-")


def test_a_streamed_chat_has_role_content_reason_usage_in_this_order(client):
    fields = {"model": MODEL, "messages": [USER], "max_tokens": 9, "n": 2, "logprobs": True, "top_logprobs": 1}
    fields["extra_body"] = {"ignore_eos": True}
    whole = client.chat.completions.create(**fields)
    chunks = list(client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    for index in range(2):
        choices = [c for chunk in chunks for c in chunk.choices if c.index == index]
        assert (choices[0].delta.role, choices[0].delta.content) == ("assistant", "")
        assert [c.delta.role for c in choices[1:]] == [None] * (len(choices) - 1)
        assert (choices[-1].finish_reason, choices[-1].delta.content) == ("length", None)
        assert [c.finish_reason for c in choices[:-1]] == [None] * (len(choices) - 1)
        assert "".join(c.delta.content or "" for c in choices) == whole.choices[index].message.content
        scored = [entry for c in choices if c.logprobs for entry in c.logprobs.content]
        assert scored == whole.choices[index].logprobs.content


def test_tools_reach_the_template(server, client):
    tools = [{"type": "function", "function": {"name": "search", "parameters": {}}}]
    extra = {"chat_template_kwargs": {"enable_thinking": False}}
    client.chat.completions.create(model=MODEL, messages=[USER], tools=tools, max_tokens=1, extra_body=extra)
    assert server.call(lambda: server.llm.template_vars) == {"tools": tools, "enable_thinking": False}


def test_events_are_server_sent_events_that_end_with_done(http):
    body = {"model": MODEL, "prompt": "a b", "max_tokens": 3, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as response:
        text = response.read().decode()
    assert response.headers["content-type"].startswith("text/event-stream")
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])
    assert json.loads(events[0].removeprefix("data: "))["object"] == "text_completion"


def test_prompt_logprobs_come_with_the_first_chunk(client):
    extra = {"prompt_logprobs": 1}
    whole = client.completions.create(model=MODEL, prompt="def a", max_tokens=2, extra_body=extra)
    chunks = list(client.completions.create(model=MODEL, prompt="def a", max_tokens=2, stream=True, extra_body=extra))
    assert chunks[0].choices[0].prompt_logprobs == whole.choices[0].prompt_logprobs
    assert sum(hasattr(c, "prompt_logprobs") for chunk in chunks for c in chunk.choices) == 1
    chat = {"model": MODEL, "messages": [USER], "max_tokens": 2, "extra_body": extra}
    first = next(iter(client.chat.completions.create(**chat, stream=True)))
    assert first.prompt_logprobs == client.chat.completions.create(**chat).prompt_logprobs
