"""Replays agent sessions through an engine or a cluster, and keeps what every request took."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from jaxdual.front import TokenizedPrompt
from jaxdual.offline.trace import Session, TraceError, Turn
from jaxdual.offline.trace_prompts import PromptTokens
from jaxdual.outputs import RequestOutput
from jaxdual.request_stream import RequestStream
from jaxdual.sampling_params import SamplingParams

# Parts of the time to the first token, in their order, as `RequestMetrics` has them. An engine tells some of them.
TTFT_PARTS = ("queue", "allocation", "read", "prefill")


class Submits(Protocol):
    """What a replay needs of `AsyncLLM`."""

    async def submit(
        self, prompt: TokenizedPrompt, sampling_params: SamplingParams, request_id: str, *, user: str
    ) -> RequestStream: ...


@dataclass(slots=True)
class RequestRecord:
    """What became of one turn; times in seconds, None where it did not come to that.

    Attributes:
      number: of the turn, from 0.
      prompt_tokens, cached_tokens, generated_tokens: the prompt, the part of it that was in a cache, and the output.
      status: "unfinished" until the request has ended.
      error: why it failed.
      ttft: from sending to the first token.
      ttst: from the first token to the second.
      tpot: mean time of a token after the first.
      ttft_parts: what the engine tells of `ttft`, by `TTFT_PARTS`.
    """

    number: int
    prompt_tokens: int
    cached_tokens: int = 0
    generated_tokens: int = 0
    status: Literal["ok", "failed", "unfinished"] = "unfinished"
    error: str | None = None
    ttft: float | None = None
    ttst: float | None = None
    tpot: float | None = None
    ttft_parts: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class AgentRecord:
    """What became of a session; times in seconds from the start of the replay, None where it did not come to that.

    Attributes:
      session: what it replays.
      requests: those that were sent, in order.
      started: when its first turn was sent.
      finished: when its last turn ended, if all were served.
    """

    session: Session
    requests: list[RequestRecord] = field(default_factory=list)
    started: float | None = None
    finished: float | None = None

    @property
    def jct(self) -> float | None:
        """Seconds from the agent's start to its end."""
        return None if self.started is None or self.finished is None else self.finished - self.started


class Replay:
    """Sends each session's turns one after the other, all sessions beside each other, with forced output lengths.

    Each agent is a user of its own.

    An agent whose request fails stops there, as its next prompt would need the output.

    Args:
      llm: where requests go.
      sessions: one for each agent.
      starts: seconds from the start of the replay at which each sends its first turn.
      tokens: makes the prompts.
      on_end: called with each request that has ended.

    Attributes:
      agents: one record for each session.
      seconds: how long the replay took.
    """

    def __init__(
        self,
        llm: Submits,
        sessions: Sequence[Session],
        starts: Sequence[float],
        tokens: PromptTokens,
        on_end: Callable[[RequestRecord], None] = lambda _: None,
    ) -> None:
        self.agents = [AgentRecord(session) for session in sessions]
        self.seconds = 0.0
        self._starts = starts
        self._llm = llm
        self._tokens = tokens
        self._on_end = on_end
        self._zero = 0.0  # of the loop's clock, which is also the front's

    async def run(self, deadline: float | None = None) -> None:
        """Replays; after `deadline` seconds, ends what is under way and starts nothing more."""
        self._zero = asyncio.get_running_loop().time()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(deadline), asyncio.TaskGroup() as group:
                    for number, start in enumerate(self._starts):
                        group.create_task(self._replay(number, start))
        finally:
            self.seconds = self._now()

    async def _replay(self, number: int, start: float) -> None:
        agent = self.agents[number]
        await asyncio.sleep(start - self._now())
        agent.started = self._now()
        context: list[int] = []
        for index, turn in enumerate(agent.session.turns):
            if turn.delay:
                await asyncio.sleep(turn.delay)
            prompt = self._tokens.prompt(agent.session, index, context)
            record = RequestRecord(index, len(prompt))
            agent.requests.append(record)
            output = await self._send(prompt, turn, record, f"agent-{number}")
            self._on_end(record)
            if output is None:
                return
            context = prompt + output
        agent.finished = self._now()

    async def _send(self, prompt: list[int], turn: Turn, record: RequestRecord, agent: str) -> list[int] | None:
        """The output tokens of a request; None if it failed."""
        params = SamplingParams(temperature=0.0, max_tokens=turn.generate, min_tokens=turn.generate, ignore_eos=True)
        second_token_time = None
        try:
            request_id = f"{agent}-turn-{record.number}"
            stream = await self._llm.submit(TokenizedPrompt(None, prompt), params, request_id, user=agent)
        except (ValueError, RuntimeError) as error:  # refused, or nothing there to serve it
            record.status, record.error = "failed", str(error)
            return None
        with contextlib.closing(stream):
            async for grown in stream:
                if second_token_time is None and len(grown.outputs[0].token_ids) > 1:
                    second_token_time = asyncio.get_running_loop().time()
        _measure(record, stream.output, second_token_time)
        output = stream.output.outputs[0]
        if output.error is not None or len(output.token_ids) != turn.generate:
            record.status = "failed"
            record.error = output.error or f"it gave {len(output.token_ids)} of {turn.generate} output tokens"
            return None
        record.status = "ok"
        return list(output.token_ids)

    def _now(self) -> float:
        return asyncio.get_running_loop().time() - self._zero


def check_lengths(sessions: Sequence[Session], max_model_len: int) -> None:
    """Makes sure that all requests fit the model: it would cut off the outputs of others.

    Raises:
      TraceError: one is longer than `max_model_len` tokens.
    """
    longest, name, number = max(
        (prompt + turn.generate, session.session_id, number)
        for session in sessions
        for number, (prompt, turn) in enumerate(zip(session.prompt_lengths(), session.turns, strict=True))
    )
    if longest > max_model_len:
        scale = int(max_model_len / longest * 1e4) / 1e4
        raise TraceError(
            f"turn {number} of session {name!r} has {longest} tokens of prompt and output, but max_model_len is "
            f"{max_model_len}; lengths {scale} times as large, or fewer turns, would fit"
        )


def _measure(record: RequestRecord, output: RequestOutput, second_token_time: float | None) -> None:
    metrics, count = output.metrics, len(output.outputs[0].token_ids)
    record.cached_tokens, record.generated_tokens = output.num_cached_tokens, count
    first, end = metrics.first_token_time, metrics.finished_time
    if first is None:
        return
    record.ttft = first - metrics.arrival_time
    for part in TTFT_PARTS:
        seconds = getattr(metrics, f"{part}_seconds")
        if seconds is not None:
            record.ttft_parts[part] = seconds
    if second_token_time is not None and end is not None:
        record.ttst = second_token_time - first
        record.tpot = (end - first) / (count - 1)
