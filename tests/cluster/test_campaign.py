"""A campaign of faults over a running load of conversations: every answer is whole, and nothing is left behind.

`JAXDUAL_FAULTS` says how many faults; `make test-faults` has a number that takes a few minutes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from jaxdual import LLM, AsyncLLM, SamplingParams
from tests.cluster.test_processes import SETTINGS, children, cluster
from tests.engine.models import TieCounter, folder

pytestmark = pytest.mark.faults

FAULTS = int(os.environ.get("JAXDUAL_FAULTS", "24"))
WORKERS = 5
TURNS = 6
PARAMS = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
STOPPED_SECONDS = 0.3
KILL_PAUSE_SECONDS = (
    6.0  # from one killed engine to the next: it starts anew and compiles, and may fail so only so often
)
DEADLINE = 60.0 + 30.0 * FAULTS


class Campaign:
    """Conversations, and what is done to the processes that serve them."""

    def __init__(self, llm: AsyncLLM) -> None:
        self.llm = llm
        self.rng = random.Random(1)
        self.done: Counter[str] = Counter()
        self.answers: list[tuple[list[int], list[int]]] = []
        self.aborted = 0
        self.over = False
        self._engine_killed = 0.0

    async def converse(self, number: int) -> None:
        """One conversation after another until the faults are over; each turn sends all before it."""
        rng = random.Random(number)
        while not self.over:
            history: list[int] = []
            for _ in range(TURNS):
                prompt = history + [rng.randrange(90) for _ in range(rng.choice([3, 8, 9, 17]))]
                tokens = await self.ask(prompt, leave=rng.random() < 0.15)
                if tokens is None:
                    break
                self.answers.append((prompt, tokens))
                history = prompt + tokens

    async def ask(self, prompt: list[int], *, leave: bool) -> list[int] | None:
        stream = await self.llm.submit({"prompt_token_ids": prompt}, PARAMS)
        try:
            async for output in stream:
                if leave and output.outputs[0].token_ids:
                    self.aborted += 1
                    return None
                assert output.outputs[0].error is None
        finally:
            stream.close()
        return list(stream.output.outputs[0].token_ids)

    async def disturb(self) -> None:
        """Faults of all kinds, at random moments."""
        kinds = ["stop engine", "stop agent", "kill agent", "kill engine"]
        while sum(self.done.values()) < FAULTS:
            await asyncio.sleep(self.rng.uniform(0.05, 0.6))
            kind = kinds[sum(self.done.values()) % len(kinds)]
            pid = self.pick(kind.split()[1])
            if pid is None:
                continue
            if kind == "kill engine":
                wait = self._engine_killed + KILL_PAUSE_SECONDS - time.monotonic()
                await asyncio.sleep(max(0.0, wait))
                self._engine_killed = time.monotonic()
            with contextlib.suppress(ProcessLookupError):
                if kind.startswith("kill"):
                    os.kill(pid, signal.SIGKILL)
                else:
                    os.kill(pid, signal.SIGSTOP)
                    await asyncio.sleep(STOPPED_SECONDS)
                    os.kill(pid, signal.SIGCONT)
                self.done[kind] += 1
        self.over = True

    def pick(self, what: str) -> int | None:
        if self.llm.engine_pid is None:
            return None
        found = children(self.llm.engine_pid, f"jaxdual.{what}.process")
        return self.rng.choice(found) if found else None


def descriptors(pids: list[int]) -> dict[int, int]:
    return {pid: len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids}


def test_every_answer_is_whole_and_nothing_is_left_behind(capsys: pytest.CaptureFixture[str]) -> None:
    async def main() -> Campaign:
        async with cluster("qwen3", 1, 2) as llm:
            campaign = Campaign(llm)
            await asyncio.gather(campaign.disturb(), *(campaign.converse(number) for number in range(WORKERS)))
            # All comes back: pages, leases and quarantined memory.
            end = time.monotonic() + 60
            while True:
                stats = await llm.stats()
                if not (stats.num_running or stats.num_waiting) and stats.kv_blocks_available == stats.kv_blocks:
                    break
                assert time.monotonic() < end, stats
                await asyncio.sleep(0.1)
            await llm.check_integrity()
            assert llm.engine_pid is not None
            before = descriptors(children(llm.engine_pid, "jaxdual.engine.process"))
            for number in range(3):
                assert await campaign.ask([number] * 20, leave=False) is not None
            assert descriptors(children(llm.engine_pid, "jaxdual.engine.process")) == before
        return campaign

    campaign = asyncio.run(asyncio.wait_for(main(), DEADLINE))
    assert not children(os.getpid(), "jaxdual.engine.process")
    ties = TieCounter("qwen3")
    alone = LLM(folder("qwen3"), **SETTINGS)
    prompts = [{"prompt_token_ids": prompt} for prompt, _ in campaign.answers]
    for output, (prompt, tokens) in zip(alone.generate(prompts, PARAMS), campaign.answers, strict=True):
        ties.compare(prompt, output.outputs[0].token_ids, tokens)
    with capsys.disabled():
        print(f"\n{dict(campaign.done)}, {campaign.aborted} clients left, {len(campaign.answers)} answers,", end=" ")
        print(f"{ties.tokens} tokens compared, {ties.ties} ties", end=" ")
    assert ties.ties <= 1 + ties.tokens // 10_000
    assert min(campaign.done[kind] for kind in ("stop engine", "stop agent", "kill agent", "kill engine")) > 0
