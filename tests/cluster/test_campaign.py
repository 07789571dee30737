"""A campaign of faults over a running load of conversations: every answer is whole, and nothing is left behind.

Each fault is of one kind and happens at one point of some prompt's way, see `faulty.sitecustomize`. First each kind
comes once at every point where it may, then the quick ones come again and again. `JAXDUAL_FAULTS` says how many faults
there are; `make test-faults` has a number that takes a few minutes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxdual import LLM, AsyncLLM, EngineConfig, SamplingParams
from jaxdual.config import ClusterConfig
from tests.cluster.faulty.sitecustomize import OF_AGENTS, VARIABLE
from tests.cluster.test_processes import SETTINGS, children, settled
from tests.engine.models import TieCounter, folder

pytestmark = pytest.mark.faults

FAULTS = int(os.environ.get("JAXDUAL_FAULTS", "200"))
CARRIER = os.environ.get("JAXDUAL_FAULTS_CARRIER", "tcp")
MOST_DESCRIPTORS = 150
WORKERS = 6
TURNS = 6
PARAMS = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
POINTS = ("reserved", "read there", "read here", "coming", "pushed", "ready", "stored", "quarantined")
SIGNALS = ("agent stopped", "agent killed", "engine killed", "cluster killed")
QUICK = {
    "reserved": ("client gone",),
    "read there": ("client gone", "broken", "gone", "slow"),
    "read here": ("client gone", "broken", "gone", "slow"),
    "coming": ("client gone", "fails", "late"),
    "pushed": ("client gone", "fails", "late"),
    "ready": ("client gone",),
    "stored": ("client gone", "no space", "slow"),
    "quarantined": ("client gone",),
}
CELLS = [(point, kind) for point in POINTS for kind in (*SIGNALS, *QUICK[point])]
SIGNALS_FROM = 60  # faults that are signals at least, in a campaign of 2,000
TAKEN_SECONDS = 3.0  # for somebody to come to the point of an order
WARM_SECONDS = 120.0  # for a new cluster to have everything compiled, beside its requests
PAUSE_SECONDS = 0.15  # between two faults, at most; longer after a process was killed, until something is answered


class Campaign:
    """Conversations, and what is done to the processes that serve them.

    Args:
      llm: the cluster.
      orders: where faults are ordered.
    """

    def __init__(self, llm: AsyncLLM, orders: Path) -> None:
        self.llm, self.orders = llm, orders
        self.rng = random.Random(1)
        self.done: Counter[tuple[str, str]] = Counter()
        self.answers: list[tuple[list[int], list[int]]] = []
        self.left = 0
        self.over = False
        self._clients: dict[str, asyncio.Task[None]] = {}
        self._asked = 0
        self._helping = False  # the fault of the moment only brings another one about, and does not count

    async def converse(self, number: int) -> None:
        """One conversation after another until the faults are over; each turn sends all before it."""
        rng = random.Random(number)
        while not self.over:
            history: list[int] = []
            for _ in range(TURNS):
                prompt = history + [rng.randrange(90) for _ in range(rng.choice([3, 8, 9, 17]))]
                tokens = await self.ask(prompt)
                if tokens is None:
                    break
                self.answers.append((prompt, tokens))
                history = prompt + tokens

    async def ask(self, prompt: list[int]) -> list[int] | None:
        """The answer; None if its client has left."""
        self._asked += 1
        name = f"request-{self._asked}"
        stream = await self.llm.submit({"prompt_token_ids": prompt}, PARAMS, name)

        async def listen() -> None:
            with contextlib.closing(stream):
                async for output in stream:
                    assert output.outputs[0].error is None, output.outputs[0].error

        client = self._clients[name] = asyncio.create_task(listen())
        await asyncio.wait([client])
        del self._clients[name]
        if client.cancelled():
            self.left += 1
            return None
        client.result()
        return list(stream.output.outputs[0].token_ids)

    async def disturb(self) -> None:
        """Orders faults until there were enough."""
        for point, kind in self._faults():
            if sum(self.done.values()) >= FAULTS and all(self.done[cell] for cell in CELLS):
                break
            if not await self._fault(point, kind):
                continue
            if kind in SIGNALS:
                await self._answered(2)
                if kind == "cluster killed":
                    # Five that end before all is compiled would be taken for one that can't run.
                    await asyncio.wait_for(self.llm.warmed_up(), WARM_SECONDS)
            else:
                await asyncio.sleep(self.rng.uniform(0, PAUSE_SECONDS))
        self.over = True

    async def watch(self) -> None:
        """Has clients leave that are to."""
        while not self.over:
            for path in self.orders.glob("leave *"):
                name = path.read_text().partition("#")[0]
                path.unlink()
                client = self._clients.get(name or f"request-{self._asked}")
                if client is not None:
                    client.cancel()
            await asyncio.sleep(0.01)

    def _faults(self) -> Iterator[tuple[str, str]]:
        """All cells first, then those that are missing and the quick ones, and signals now and then."""
        yield from self.rng.sample(CELLS, len(CELLS))
        quick = [(point, kind) for point in POINTS for kind in QUICK[point]]
        while True:
            missing = [cell for cell in CELLS if not self.done[cell]]
            signals = sum(count for (_, kind), count in self.done.items() if kind in SIGNALS)
            if missing and self.rng.random() < 0.5:
                yield self.rng.choice(missing)
            elif signals < SIGNALS_FROM * FAULTS / 2000:
                yield self.rng.choice([cell for cell in CELLS if cell[1] in SIGNALS])
            else:
                yield self.rng.choice(quick)

    async def _fault(self, point: str, kind: str) -> bool:
        """Orders a fault; whether it has happened."""
        if point == "quarantined":  # memory comes there when it is still read into, and too late
            self._helping = True
            await self._fault("read there", "slow")
            self._helping = False
        order = self.orders / "order"
        order.with_suffix(".part").write_text(f"{point}|{kind}")
        order.with_suffix(".part").rename(order)
        end = time.monotonic() + TAKEN_SECONDS
        while order.exists() and time.monotonic() < end:
            await asyncio.sleep(0.01)
        with contextlib.suppress(FileNotFoundError):
            order.unlink()
            return False
        # An agent removes its mark when it does wrong.
        marks = list(self.orders.glob("agent *")) if kind in OF_AGENTS else []
        while any(mark.exists() for mark in marks) and time.monotonic() < end:
            await asyncio.sleep(0.01)
        for mark in marks:
            with contextlib.suppress(FileNotFoundError):
                mark.unlink()
                return False
        self.done[point, kind] += not self._helping
        return True

    async def _answered(self, count: int) -> None:
        """Waits for so many more answers."""
        want = len(self.answers) + count
        end = time.monotonic() + 60
        while len(self.answers) < want:
            assert time.monotonic() < end, "nothing is answered any more"
            await asyncio.sleep(0.05)


def descriptors(pids: list[int]) -> dict[int, int]:
    return {pid: len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids}


def test_every_answer_is_whole_and_nothing_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    orders = tmp_path / "orders"
    orders.mkdir()
    monkeypatch.setenv(VARIABLE, str(orders))
    root = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", f"{root / 'faulty'}:{root.parent.parent}")
    config = EngineConfig(
        model=str(folder("qwen3")),
        kv_store=str(tmp_path / "store"),
        kv_store_capacity_bytes=1 << 30,
        kv_load_timeout=1.0,
        kv_transport=CARRIER,  # type: ignore[arg-type]
        **SETTINGS | {"compile_ahead": True},
    )
    began = time.monotonic()

    async def main() -> Campaign:
        cluster = ClusterConfig(prefill=1, decode=2, path_mode="split")
        async with AsyncLLM.from_config(config, cluster=cluster) as llm:
            campaign = Campaign(llm, orders)
            async with asyncio.TaskGroup() as group:
                for number in range(WORKERS):
                    group.create_task(campaign.converse(number))
                group.create_task(campaign.watch())
                group.create_task(campaign.disturb())
            # All comes back: pages, leases and quarantined memory.
            await settled(llm)
            assert llm.engine_pid is not None
            modules = ("jaxdual.engine.process", "jaxdual.agent.process")
            processes = [llm.engine_pid, *(pid for module in modules for pid in children(llm.engine_pid, module))]
            before = descriptors(processes)
            # Whatever an agent has gone through, it has no more of them than this.
            assert max(before.values()) < MOST_DESCRIPTORS, before
            for number in range(3):
                assert await campaign.ask([number] * 20) is not None
            await settled(llm)
            assert descriptors(processes) == before
        return campaign

    campaign = asyncio.run(asyncio.wait_for(main(), 600.0 + 3.0 * FAULTS))
    assert not children(os.getpid(), "jaxdual.engine.process")
    assert not children(os.getpid(), "jaxdual.agent.process")
    ties = TieCounter("qwen3")
    alone = LLM(folder("qwen3"), **SETTINGS)
    prompts = [{"prompt_token_ids": prompt} for prompt, _ in campaign.answers]
    for output, (prompt, tokens) in zip(alone.generate(prompts, PARAMS), campaign.answers, strict=True):
        ties.compare(prompt, output.outputs[0].token_ids, tokens)
    said = capfd.readouterr().err
    assert "Traceback" not in said, said  # nobody dies but of what is done to it
    with capfd.disabled():
        print(f"\n{sum(campaign.done.values())} faults in {time.monotonic() - began:.0f} s, {campaign.left} clients")
        print(f"left, {len(campaign.answers)} answers, {ties.tokens} tokens compared, {ties.ties} ties")
        kinds = [*SIGNALS, *sorted({kind for kinds in QUICK.values() for kind in kinds})]
        print(f"{'':12s}" + "".join(f"{kind:>15s}" for kind in kinds))
        for point in POINTS:
            counts = [str(campaign.done[point, kind]) if (point, kind) in CELLS else "" for kind in kinds]
            print(f"{point:12s}" + "".join(f"{count:>15s}" for count in counts))
    assert ties.ties <= 1 + ties.tokens // 10_000
    assert all(campaign.done[cell] for cell in CELLS)
