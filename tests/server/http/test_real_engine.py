"""The HTTP face over a real engine in its own process."""

import asyncio
import itertools
import os
import signal

import httpx
import openai
import pytest

from jaxdual import LLM, AsyncLLM, SamplingParams
from jaxdual.engine.supervisor import EngineState
from jaxdual.model_folder import shipped_model
from tests.server.http.scripted import RunningServer

pytestmark = pytest.mark.slow

SETTINGS = {"model": shipped_model("small"), "max_num_seqs": 32, "max_model_len": 1024}
PROMPTS = [f"def function_{i}(a, b):\n    " + "return a\n" * (i % 5) for i in range(250)]
GREEDY = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def server():
    with RunningServer(lambda: AsyncLLM(**SETTINGS)) as running:
        yield running


@pytest.fixture(scope="module")
def expected():
    """Prompts and what they give alone, but those where two tokens are so close that the batch may decide."""
    outputs = LLM(**SETTINGS).generate(PROMPTS, SamplingParams(**GREEDY, logprobs=2))
    clear = {output.prompt: output.outputs[0].text for output in outputs if margin(output.outputs[0]) > 1e-3}
    return dict(itertools.islice(clear.items(), 200))


def margin(completion):
    """Least difference between the two likeliest tokens of a position."""
    likeliest = (sorted(entry.logprob for entry in position.values()) for position in completion.logprobs)
    return min(logprobs[-1] - logprobs[-2] for logprobs in likeliest)


@pytest.mark.parametrize("stream", [False, True])
def test_two_hundred_requests_at_once_get_their_own_answers(server, expected, stream):
    async def one(client, prompt):
        answer = await client.completions.create(model="small", prompt=prompt, stream=stream, **GREEDY)
        if not stream:
            return answer.choices[0].text
        return "".join([choice.text async for chunk in answer for choice in chunk.choices])

    async def ask():
        limits = httpx.Limits(max_connections=None)
        async with (
            httpx.AsyncClient(timeout=120, limits=limits) as transport,
            openai.AsyncOpenAI(
                base_url=f"{server.url}/v1", api_key="none", max_retries=0, http_client=transport
            ) as client,
        ):
            return await asyncio.gather(*(one(client, prompt) for prompt in expected))

    answers = asyncio.run(ask())
    assert answers == list(expected.values())
    assert len(set(answers)) > 20


def test_a_chat_with_a_real_template(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=60) as client:
        fields = {"model": "small", "messages": [{"role": "user", "content": "Write a function."}], **GREEDY}
        whole = client.chat.completions.create(**fields)
        chunks = client.chat.completions.create(**fields, stream=True)
        text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert whole.usage.prompt_tokens > 4


def test_a_client_that_leaves_frees_the_engine(server):
    def stats():
        return asyncio.run_coroutine_threadsafe(server.llm.stats(), server._loop).result(60)

    before = stats()
    body = {"prompt": "x", "max_tokens": 1000, "ignore_eos": True, "n": 32}
    with httpx.stream("POST", f"{server.url}/v1/completions", json={**body, "stream": True}, timeout=60) as response:
        assert response.status_code == 200
        next(response.iter_bytes())
    server.wait_for(lambda: server.llm.num_unfinished == 0, "the request to end in the front")
    asyncio.run_coroutine_threadsafe(server.llm.check_integrity(), server._loop).result(60)
    after = stats()
    assert after.num_running + after.num_waiting == 0
    assert 0 < after.generation_tokens - before.generation_tokens < body["max_tokens"] * body["n"] / 2


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 10**30, "max_tokens": 10**30, "min_tokens": 5},
        {"temperature": 1e-320},
        {"temperature": 2, "repetition_penalty": 1e-320, "frequency_penalty": -2},
        {"top_p": 1e-320, "min_p": 1},
        {"logit_bias": {str(i): -100 for i in range(500)}, "seed": -(2**63)},
    ],
)
def test_extreme_parameters_are_served(server, fields):
    body = {"prompt": "def f", "max_tokens": 4, **fields}
    response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    assert server.call(lambda: server.llm.state) in (EngineState.SERVING, EngineState.WARMING)


def test_an_engine_that_is_killed_gives_a_503_and_comes_back(server, monkeypatch):
    monkeypatch.setattr("jaxdual.async_api._MOST_ENGINES_LOST", 0)  # a request that loses its engine is not tried again
    answers = []

    async def ask():
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
            body = {"prompt": "x", "max_tokens": 250, "ignore_eos": True, "n": 16}
            asking = asyncio.create_task(http.post("/v1/completions", json=body))
            while not await asyncio.to_thread(server.call, lambda: server.llm.num_unfinished):
                await asyncio.sleep(0.005)
            os.kill(server.call(lambda: server.llm.engine_pid), signal.SIGKILL)
            answers.append(await asking)
            metrics = await http.get("/metrics")
            answers.append(await http.post("/v1/completions", json={"prompt": "x", "max_tokens": 3}))
            return metrics.text

    metrics = asyncio.run(ask())
    assert [answer.status_code for answer in answers] == [503, 200]
    assert answers[0].json()["error"]["code"] == "engine_error"
    assert 'jaxdual:engine_restarts_total{model_name="small"} 1.0' in metrics
