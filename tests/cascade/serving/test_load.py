"""The example's cascade under load, over HTTP and gRPC at once, while a tier is killed."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections import Counter
from pathlib import Path

import grpc
import httpx
import pytest

from models.questions import multiple_choice
from models.training import quiz
from server.proto.jaxdual.v1 import inference_pb2 as pb
from server.proto.jaxdual.v1 import inference_pb2_grpc
from tests.server.program import ROOT, Program

pytestmark = pytest.mark.slow

REQUESTS, AT_ONCE, KILLED_AT = 120, 12, 50
DEADLINE = 240.0
QUESTIONS = quiz.questions(quiz.HELDOUT_SEED, REQUESTS)

type Answer = tuple[str, str]  # tier and text


class Faces:
    """Asks a server by either face; a cancelled request gives None."""

    def __init__(self, http: httpx.AsyncClient, stub: inference_pb2_grpc.InferenceStub) -> None:
        self._http, self._stub = http, stub

    async def ask(self, number: int) -> Answer | None:
        """Every third question is streamed, every third goes over gRPC, and every tenth is given up at once."""
        question = QUESTIONS[number]
        text = multiple_choice(question.subject, question.question, question.choices)
        if number % 10 == 9:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.003):
                    await self._whole(text)
            return None
        return await (self._whole, self._streamed, self._by_grpc)[number % 3](text)

    async def _whole(self, text: str) -> Answer:
        response = await self._http.post("/v1/chat/completions", json=_body(text))
        assert response.status_code == 200, response.text
        body = response.json()
        assert response.headers["x-jaxdual-tier"] == body["cascade"]["tier"]
        return body["cascade"]["tier"], body["choices"][0]["message"]["content"]

    async def _streamed(self, text: str) -> Answer:
        answer, tier = "", ""
        async with self._http.stream("POST", "/v1/chat/completions", json=_body(text) | {"stream": True}) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                assert "error" not in chunk, chunk
                tier = chunk["cascade"]["tier"] if "cascade" in chunk else tier
                answer += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
        return tier, answer

    async def _by_grpc(self, text: str) -> Answer:
        request = pb.GenerateRequest(
            model="auto",
            chat=pb.Chat(messages=[pb.ChatMessage(role="user", content=text)]),
            sampling_params=pb.SamplingParams(max_tokens=4, temperature=0),
        )
        answer, tier = "", ""
        async for response in self._stub.Generate(request):
            answer += "".join(output.text for output in response.outputs)
            tier = response.cascade.tier or tier
        return tier, answer


def _body(text: str) -> dict[str, object]:
    messages = [{"role": "user", "content": text}]
    return {"model": "auto", "messages": messages, "max_tokens": 4, "temperature": 0}


def test_a_tier_that_dies_under_load_costs_no_request_and_changes_no_answer(tmp_path: Path) -> None:
    """All answers are those of an undisturbed run, and metrics count what the answers say."""
    with Program(tmp_path, "--cascade", ROOT / "examples" / "cascade.toml") as server:
        server.wait_until_serving()

        async def run(kill: bool) -> list[Answer | None]:
            gate = asyncio.Semaphore(AT_ONCE)
            limits = httpx.Limits(max_connections=None)
            async with (
                httpx.AsyncClient(base_url=server.client.base_url, timeout=DEADLINE, limits=limits) as http,
                grpc.aio.insecure_channel(server.grpc) as channel,
            ):
                faces = Faces(http, inference_pb2_grpc.InferenceStub(channel))

                async def one(number: int) -> Answer | None:
                    async with gate:
                        if kill and number == KILLED_AT:
                            os.kill(server.engines()[0], signal.SIGKILL)
                        return await faces.ask(number)

                return await asyncio.wait_for(asyncio.gather(*map(one, range(REQUESTS))), DEADLINE)

        undisturbed, disturbed = (asyncio.run(run(kill)) for kill in (False, True))
        assert disturbed == undisturbed
        tiers = Counter(answer[0] for answer in undisturbed if answer is not None)
        assert set(tiers) == {"small", "large"}
        assert min(tiers.values()) > 20
        right = sum(
            answer is not None and answer[1].strip() == question.letter
            for answer, question in zip(undisturbed, QUESTIONS, strict=True)
        )
        assert right > 0.75 * tiers.total()
        metrics = server.client.get("/metrics").text
        counted = {
            tier: float(value)
            for tier, value in re.findall(
                r'cascade_requests_total\{.*reason="(?:confident|last)",tier="(\w+)"\} (\S+)', metrics
            )
        }
        given_up = 2 * undisturbed.count(None)
        for tier, count in tiers.items():
            assert 2 * count <= counted[tier] <= 2 * count + given_up
        restarts = dict(re.findall(r'engine_restarts_total\{model_name="(\w+)"\} (\S+)', metrics))
        assert sum(map(float, restarts.values())) == 1
