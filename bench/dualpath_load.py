"""A load of agents for `bench.dualpath`: contexts that are stored already, and turns that each add a little to them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxdual import AsyncLLM, SamplingParams
from jaxdual.front import TokenizedPrompt
from jaxdual.offline.card_watch import CardWatch
from jaxdual.offline.replay import Replay
from jaxdual.offline.trace import Session, Turn
from jaxdual.request_stream import RequestStream

_SAMPLE_SECONDS = 0.25  # between two looks at the cards


@dataclass(frozen=True, slots=True)
class Load:
    """What the agents do. All start at once.

    Attributes:
      contexts: tokens of each agent's first prompt.
      turns: of each agent.
      append, generate: tokens of each further turn's prompt, and of every output.
    """

    contexts: tuple[int, ...]
    turns: int
    append: int
    generate: int

    @property
    def sessions(self) -> list[Session]:
        return [
            Session(
                f"agent {number}",
                (Turn(context, self.generate), *[Turn(self.append, self.generate)] * (self.turns - 1)),
            )
            for number, context in enumerate(self.contexts)
        ]

    @property
    def first_turns(self) -> list[Session]:
        """What stores the contexts: with a second token, since the engine that gives it stores them."""
        return [Session(session.session_id, (Turn(session.turns[0].append, 2),)) for session in self.sessions]


class RunTokens:
    """First prompts that are the same in all runs, and further turns that no run before has had.

    Args:
      vocab_size: tokens are below it.
      run: number of the run.
    """

    def __init__(self, vocab_size: int, run: int) -> None:
        self._vocab_size, self._run = vocab_size, run

    def prompt(self, session: Session, number: int, context: Sequence[int]) -> list[int]:
        """See `PromptTokens.prompt`."""
        agent = int(session.session_id.split()[1])
        key = (agent, number, self._run) if number else (agent,)
        new = np.random.default_rng(key).integers(self._vocab_size, size=session.turns[number].append)
        return [*context, *map(int, new)]


@dataclass(slots=True)
class Run:
    """What one run of a load took.

    Attributes:
      mode: path mode.
      repeat: number of the repeat.
      seconds: until all agents had ended.
      agent_seconds: of each agent.
      requests: of each, its time to the first token and the parts of that, in seconds, and its tokens.
      nbytes: that passed each card, see `EngineStats.card_bytes`.
      timeline: the same from the beginning on, with the seconds since then.
      cpu_share: part of all cores' time that all processes together took.
      answers: prompts and outputs.
      hit_tokens, prompt_tokens: of all prompts.
    """

    mode: str
    repeat: int
    seconds: float
    agent_seconds: list[float]
    requests: list[dict[str, float]]
    nbytes: dict[str, int]
    timeline: list[tuple[float, dict[str, int]]]
    cpu_share: float
    answers: list[tuple[list[int], list[int]]]
    hit_tokens: int
    prompt_tokens: int
    errors: list[str] = field(default_factory=list)


class _Recorded:
    """An `AsyncLLM` whose answers are kept."""

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm
        self.streams: list[RequestStream] = []

    async def submit(
        self, prompt: TokenizedPrompt, sampling_params: SamplingParams, request_id: str, *, user: str
    ) -> RequestStream:
        self.streams.append(await self._llm.submit(prompt, sampling_params, request_id, user=user))
        return self.streams[-1]


async def run_load(llm: AsyncLLM, load: Load, mode: str, repeat: int, number: int) -> Run:
    """Runs a load once; `number` is that of no run before."""
    before, cpu = dict((await llm.stats()).card_bytes), _cpu_seconds()
    recorded = _Recorded(llm)
    replay = Replay(recorded, load.sessions, [0.0] * len(load.contexts), RunTokens(llm.info.vocab_size, number))
    async with CardWatch(llm, _SAMPLE_SECONDS) as watch:
        await replay.run()
        cpu_share = (_cpu_seconds() - cpu) / replay.seconds / len(os.sched_getaffinity(0))
    await settled(llm)
    records = [record for agent in replay.agents for record in agent.requests]
    return Run(
        mode=mode,
        repeat=repeat,
        seconds=replay.seconds,
        agent_seconds=[agent.jct or float("nan") for agent in replay.agents],
        requests=[
            {
                "ttft": record.ttft,
                "prompt_tokens": record.prompt_tokens,
                "cached_tokens": record.cached_tokens,
                **record.ttft_parts,
            }
            for record in records
            if record.ttft is not None
        ],
        nbytes=_less(dict((await llm.stats()).card_bytes), before),
        timeline=watch.timeline,
        cpu_share=cpu_share,
        answers=[
            (list(stream.output.prompt_token_ids), list(stream.output.outputs[0].token_ids))
            for stream in recorded.streams
        ],
        hit_tokens=sum(record.cached_tokens for record in records),
        prompt_tokens=sum(record.prompt_tokens for record in records),
        errors=[record.error for record in records if record.error is not None],
    )


async def store_contexts(llm: AsyncLLM, load: Load) -> None:
    """Has the contexts computed and stored."""
    replay = Replay(llm, load.first_turns, [0.0] * len(load.contexts), RunTokens(llm.info.vocab_size, 0))
    await replay.run()
    await settled(llm)


async def settled(llm: AsyncLLM, seconds: float = 60.0) -> None:
    """Waits until nothing is under way, and all that is full is stored.

    Raises:
      TimeoutError: it does not end.
    """
    end = time.monotonic() + seconds
    before, looks = None, 0
    while time.monotonic() < end:
        stats = await llm.stats()
        idle = not (stats.num_running or stats.num_waiting or stats.kv_staging_blocks_used)
        looks = looks + 1 if idle and stats.card_bytes == before else 0
        if looks == 4:
            return
        before = stats.card_bytes
        await asyncio.sleep(0.1)
    raise TimeoutError(f"after {seconds:.0f} s something is under way: {stats}")


def _less(after: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    return {name: count - before.get(name, 0) for name, count in after.items()}


def _cpu_seconds() -> float:
    """Of this process and its descendants that live."""
    total, todo = 0, [os.getpid()]
    while todo:
        pid = todo.pop()
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                todo += map(int, path.read_text().split())
    return total / os.sysconf("SC_CLK_TCK")


def as_json(run: Run, prefill: int, decode: int, case: str, tokens_equal: bool | None) -> dict[str, Any]:
    """A run as `bench.dualpath` reports it."""
    return {
        "case": case,
        "mode": run.mode,
        "prefill": prefill,
        "decode": decode,
        "repeat": run.repeat,
        "jct_s": run.seconds,
        "agent_jct_s": run.agent_seconds,
        "tokens_equal": tokens_equal,
        "bytes": run.nbytes,
        "cpu_share": run.cpu_share,
        "hit_tokens": run.hit_tokens,
        "prompt_tokens": run.prompt_tokens,
        "ttft_s": {
            part: float(np.mean([one[part] for one in run.requests if part in one]))
            for part in ("ttft", "queue", "allocation", "read", "prefill")
            if any(part in one for one in run.requests)
        },
        "errors": run.errors,
    }
