"""Clusters whose engines Ray places: two hosts of Ray's on this machine, each at an address of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxdual import AsyncLLM, EngineConfig
from jaxdual.config import ClusterConfig, ConfigError
from tests.cluster.test_processes import DEADLINE, GREEDY, SETTINGS, alone, complete_all, make_prompts, settled, within
from tests.engine.models import TieCounter, folder

pytestmark = [pytest.mark.ray]

HOSTS = ("127.0.0.1", "127.0.0.2")


class Host:
    """A host of a Ray cluster, with two CPUs; the first one is its head."""

    def __init__(self, address: str, head: str | None, port: int) -> None:
        ours = ["--head", f"--port={port}", "--include-dashboard=false"] if head is None else [f"--address={head}"]
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"),
                *("--num-cpus=2", "--num-gpus=0", f"--node-ip-address={address}", "--object-store-memory=100000000"),
                *ours,
            ],
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def kill(self) -> None:
        """Ends all that Ray runs on it at once, and all that these have started."""
        for pid in [*tree(self._process.pid), self._process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()

    @property
    def engines(self) -> list[int]:
        """Processes of engines on it."""
        return [pid for pid in tree(self._process.pid) if b"jaxdual.engine.process" in command(pid)]


def tree(pid: int) -> list[int]:
    """Descendants of a process."""
    found, todo = [], [pid]
    while todo:
        for path in Path(f"/proc/{todo.pop()}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                more = list(map(int, path.read_text().split()))
                todo += more
                found += more
    return found


def command(pid: int) -> list[bytes]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return []


def compare(ties: TieCounter, prompts: list[list[int]], want: list[Any], got: list[Any]) -> None:
    for prompt, (expected,), (found,) in zip(prompts, want, got, strict=True):
        ties.compare(prompt, expected, found)


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    with socket.socket() as free:
        free.bind((HOSTS[0], 0))
        port = free.getsockname()[1]
    head = f"{HOSTS[0]}:{port}"
    os.environ["RAY_ADDRESS"] = head
    first = Host(HOSTS[0], None, port)
    wait_for_port(port)
    second = Host(HOSTS[1], head, port)
    try:
        wait_for_cpus(4)
        yield first, second
    finally:
        del os.environ["RAY_ADDRESS"]
        second.kill()
        first.kill()


def wait_for_port(port: int) -> None:
    end = time.monotonic() + DEADLINE
    while True:
        with contextlib.suppress(OSError), socket.create_connection((HOSTS[0], port), 1):
            return
        assert time.monotonic() < end
        time.sleep(0.1)


def wait_for_cpus(count: int) -> None:
    """In a process of its own: this one doesn't become one of Ray's."""
    script = (
        "import ray, time\n"
        "ray.init(configure_logging=False)\n"
        f"while ray.cluster_resources().get('CPU', 0) < {count}: time.sleep(0.1)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=DEADLINE)


@contextlib.asynccontextmanager
async def cluster(prefill: int, decode: int, **settings: Any) -> AsyncIterator[AsyncLLM]:
    config = EngineConfig(model=str(folder("qwen3")), **SETTINGS | settings)
    placed = ClusterConfig(prefill=prefill, decode=decode, cluster="ray")
    async with AsyncLLM.from_config(config, cluster=placed) as llm:
        yield llm


def test_engines_on_two_hosts_give_the_tokens_of_one_engine(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    prompts = make_prompts(12)
    want = alone("qwen3", prompts, GREEDY)

    async def main() -> None:
        async with cluster(1, 2, kv_store=str(tmp_path), kv_store_capacity_bytes=1 << 30) as llm:
            assert sorted(len(host.engines) for host in hosts) == [1, 2]
            ties = TieCounter("qwen3")
            compare(ties, prompts, want, await complete_all(llm, prompts, GREEDY))
            assert ties.ties <= 1
            await settled(llm)
        for host in hosts:
            assert not host.engines

    within(main())


def test_an_engine_that_dies_is_placed_again(hosts: tuple[Host, Host]) -> None:
    prompts = make_prompts(16, seed=6)
    want = alone("qwen3", prompts, GREEDY)

    async def main() -> None:
        async with cluster(1, 1) as llm:
            ties = TieCounter("qwen3")
            engines = sorted(pid for host in hosts for pid in host.engines)
            for pid in engines:
                work = asyncio.create_task(complete_all(llm, prompts, GREEDY))
                await asyncio.sleep(0.2)
                assert not work.done()
                os.kill(pid, signal.SIGKILL)
                compare(ties, prompts, want, await work)
            assert ties.ties <= 1
            await llm.warmed_up()
            await settled(llm)
            now = [pid for host in hosts for pid in host.engines]
            assert len(now) == 2
            assert not set(now) & set(engines)

    within(main())


def test_too_few_cpus_are_an_error(hosts: tuple[Host, Host]) -> None:
    async def main() -> None:
        with pytest.raises(ConfigError, match="5 engines need 5 CPUs of Ray's, which has 4"):
            async with cluster(2, 3):
                pass

    within(main())


def test_a_host_that_is_lost_is_replaced(hosts: tuple[Host, Host]) -> None:
    """Last: the second host is gone after it."""
    prompts = make_prompts(16, seed=7)
    want = alone("qwen3", prompts, GREEDY)

    async def main() -> None:
        async with cluster(1, 1) as llm:
            work = asyncio.create_task(complete_all(llm, prompts, GREEDY))
            await asyncio.sleep(0.2)
            assert sum(len(host.engines) for host in hosts) == 2
            lost = hosts[1].engines
            hosts[1].kill()
            ties = TieCounter("qwen3")
            compare(ties, prompts, want, await work)
            assert ties.ties <= 1
            await llm.warmed_up()
            assert len(hosts[0].engines) == 2
            assert not set(lost) & set(hosts[0].engines)
            await settled(llm)

    within(main())
