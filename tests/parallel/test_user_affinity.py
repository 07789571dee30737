"""Users come back to the rank that knows the beginning of what they ask, through every face."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from jaxdual import LLM, AsyncLLM, SamplingParams
from jaxdual.model_folder import shipped_model
from jaxdual.offline import __main__ as command
from jaxdual.outputs import RequestOutput
from jaxdual.served_models import ServedModels
from server.http import create_app
from server.proto.jaxdual.v1 import inference_pb2 as pb
from server.proto.kserve import open_inference_pb2 as kserve
from server.proto.kserve.open_inference_pb2_grpc import GRPCInferenceServiceStub
from tests.server.grpc.face import Face, read_all, serving

SETTINGS: dict[str, Any] = {
    "block_size": 8,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "max_model_len": 128,
    "expert_parallel_size": 2,
    "dispatch_policy": "gimbal",
    "seed": 0,
}
GREEDY = SamplingParams(max_tokens=2, temperature=0)
DEADLINE = 240.0  # seconds; reached only by a failing test


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(shipped_model("moe"), **SETTINGS)


def prompt(name: str) -> str:
    """A text of a few blocks that no other name's begins with."""
    return f"{name} = {name!r}\nfor letter in {name}:\n    print(letter, {name}.count(letter))\n"


def messages(name: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": prompt(name)}, {"role": "user", "content": "Go on."}]


def last(outputs: Any) -> RequestOutput:
    *_, output = outputs
    return output


def submitted(llm: LLM, text: str, user: str | None) -> RequestOutput:
    output = llm.submit(text, GREEDY, user=user)
    while llm.has_unfinished:
        llm.step()
    return output


# Of two requests in a row without a user each rank gets one, so that the second finds nothing cached.
FACES: dict[str, Callable[[LLM, str, str | None], RequestOutput]] = {
    "generate": lambda llm, name, user: last(llm.generate(prompt(name), GREEDY, user=user)),
    "generate, one each": lambda llm, name, user: last(llm.generate([prompt(name)], GREEDY, user=[user])),
    "chat": lambda llm, name, user: last(llm.chat(messages(name), GREEDY, user=user)),
    "stream": lambda llm, name, user: last(llm.stream(prompt(name), GREEDY, user=user)),
    "submit": lambda llm, name, user: submitted(llm, prompt(name), user),
}


@pytest.mark.parametrize("face", FACES)
def test_the_second_request_of_a_user_finds_the_first_one_s_blocks(llm: LLM, face: str) -> None:
    name = face.replace(", ", "_").replace(" ", "_")
    before = llm.stats().dispatch_decisions
    outputs = [FACES[face](llm, name + "_alone", None) for _ in range(2)]
    assert [output.num_cached_tokens for output in outputs] == [0, 0]
    outputs = [FACES[face](llm, name + "_user", name) for _ in range(2)]
    assert outputs[0].num_cached_tokens == 0
    assert outputs[1].num_cached_tokens >= 16
    assert outputs[0].outputs[0].token_ids == outputs[1].outputs[0].token_ids
    after = llm.stats().dispatch_decisions
    assert {rule: after[rule] - before.get(rule, 0) for rule in after} == {"round_robin": 3, "affinity": 1}
    llm.check_integrity()


@pytest.mark.parametrize(("seconds", "remembered"), [(0.0, False), (float("inf"), True)])
def test_users_are_remembered_for_as_long_as_the_setting_says(seconds: float, remembered: bool) -> None:
    llm = LLM(shipped_model("moe"), **SETTINGS, user_ttl=seconds)
    for _ in range(2):  # a rank is chosen at once
        llm.submit("x", GREEDY, user="ann")
    assert llm.stats().dispatch_decisions == ({"round_robin": 1, "affinity": 1} if remembered else {"round_robin": 2})


def test_users_that_do_not_fit_the_prompts_are_refused(llm: LLM) -> None:
    with pytest.raises(ValueError, match="1 users for 2 prompts: give one, or one for each"):
        llm.generate(["a", "b"], GREEDY, user=["ann"])
    with pytest.raises(ValueError, match="user has 600 characters"):
        llm.generate(["a", "b"], GREEDY, user=[None, "x" * 600])
    assert not llm.has_unfinished


def test_lines_of_a_batch_go_to_their_user_s_rank(tmp_path: Path, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    class Shared:
        @staticmethod
        def from_config(_: object) -> LLM:
            return llm

    monkeypatch.setattr(command, "LLM", Shared)
    ranks = llm._engine.ranks
    lines = [("/v1/completions", {"prompt": prompt("batch"), "user": "row"}) for _ in range(3)]
    lines.append(("/v1/chat/completions", {"messages": messages("batch"), "prompt_cache_key": "row"}))
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(
        "".join(
            json.dumps({"custom_id": f"{i}", "url": url, "body": {**body, "max_tokens": 2}}) + "\n"
            for i, (url, body) in enumerate(lines)
        )
    )
    before = [rank.kv.stats.prefix_queries for rank in ranks]
    assert command.main(["-i", str(source), "-o", str(out), "--no-progress"]) == 0
    assert all(json.loads(row)["error"] is None for row in out.read_text().splitlines())
    assert sorted(rank.kv.stats.prefix_queries > was for rank, was in zip(ranks, before, strict=True)) == [False, True]


async def _native(face: Face, _: httpx.AsyncClient, user: str | None) -> int:
    params = pb.SamplingParams(max_tokens=2, temperature=0)
    request = pb.GenerateRequest(text=prompt(f"native {user}"), sampling_params=params, user=user or "")
    return (await read_all(face.stub.Generate(request)))[-1].usage.cached_tokens


async def _kserve(face: Face, _: httpx.AsyncClient, user: str | None) -> int:
    request = kserve.ModelInferRequest(model_name="moe")
    request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    request.inputs[0].contents.bytes_contents.append(prompt(f"kserve {user}").encode())
    request.parameters["max_tokens"].int64_param = 2
    if user is not None:
        request.parameters["user"].string_param = user
    answer = await GRPCInferenceServiceStub(face.channel).ModelInfer(request)
    return answer.parameters["cached_tokens"].int64_param


async def _completions(_: Face, http: httpx.AsyncClient, user: str | None) -> int:
    body = {"prompt": prompt(f"completions {user}"), "max_tokens": 2, "user": user}
    return _cached(await http.post("/v1/completions", json=body))


async def _chat(_: Face, http: httpx.AsyncClient, user: str | None) -> int:
    body = {"messages": messages(f"chat {user}"), "max_tokens": 2, "prompt_cache_key": user}
    return _cached(await http.post("/v1/chat/completions", json=body))


async def _python(face: Face, _: httpx.AsyncClient, user: str | None) -> int:
    return [
        output.num_cached_tokens async for output in face.llm.generate(prompt(f"python {user}"), GREEDY, user=user)
    ][-1]


def _cached(response: httpx.Response) -> int:
    assert response.status_code == 200, response.text
    return response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


@pytest.mark.slow
def test_the_server_s_faces_send_users_back_and_count_it() -> None:
    faces: list[Callable[[Face, httpx.AsyncClient, str | None], Awaitable[int]]]
    faces = [_native, _kserve, _completions, _chat, _python]

    async def use() -> None:
        async with AsyncLLM(shipped_model("moe"), **SETTINGS) as llm, serving(llm) as face:
            transport = httpx.ASGITransport(create_app(ServedModels(llm), face.metrics))
            async with httpx.AsyncClient(transport=transport, base_url="http://faces", timeout=DEADLINE) as http:
                for number, ask in enumerate(faces):
                    for user in (None, f"user-{number}"):
                        first, second = [await ask(face, http, user) for _ in range(2)]
                        assert (first, second >= 16) == (0, user is not None), ask.__name__
                while face.sample("dispatch_decisions_total", rule="affinity") != len(faces):
                    await asyncio.sleep(0.01)  # figures come a moment after events
                assert face.sample("dispatch_decisions_total", rule="round_robin") == 3 * len(faces)

    asyncio.run(asyncio.wait_for(use(), DEADLINE))
