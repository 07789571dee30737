"""A KV agent as its engine sees it: it answers, hangs, is given up."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxdual.agent import client
from jaxdual.agent.client import AgentProcess
from jaxdual.agent.wire import Attach, GroupSlots, Lookup
from jaxdual.config import ConfigError
from jaxdual.transport.slab import SharedSlab

SILENT = 2.0


@pytest.fixture
def slab() -> Iterator[SharedSlab]:
    with_pages = SharedSlab(1 << 16)
    yield with_pages
    with_pages.close()


@pytest.fixture
def agent(slab: SharedSlab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AgentProcess]:
    monkeypatch.setattr(client, "_SILENT_SECONDS", SILENT)
    monkeypatch.setattr(client, "_PAUSE_SECONDS", SILENT / 4)
    process = AgentProcess(Attach(str(tmp_path), 1 << 20, [GroupSlots(0, 4096, 4096)]), slab)
    yield process
    process.kill()


def listen(agent: AgentProcess, seconds: float) -> list[Any]:
    messages, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        messages += agent.receive(0.1)
    return messages


def test_what_is_asked_for_at_once_is_answered_after_the_start(agent: AgentProcess) -> None:
    agent.send(Lookup(7, [b"k" * 16]))
    assert agent.attached is None
    messages: list[Any] = []
    while not messages:
        messages = agent.receive(10.0)
    assert agent.attached is not None
    assert [(message.number, message.hits) for message in messages] == [(7, 0)]


def test_an_agent_that_is_stopped_is_taken_for_dead(agent: AgentProcess) -> None:
    agent.wait()
    assert listen(agent, 1.5 * SILENT) == []  # idle, but alive
    os.kill(agent.pid, signal.SIGSTOP)
    begin = time.monotonic()
    with pytest.raises(ConnectionError, match="has said nothing for"):
        listen(agent, 10 * SILENT)
    assert time.monotonic() - begin >= SILENT / 2


def test_an_engine_that_does_not_listen_finds_its_agent_alive(agent: AgentProcess) -> None:
    agent.wait()
    time.sleep(2 * SILENT)
    assert agent.receive() == []
    assert listen(agent, SILENT) == []


def test_time_in_which_both_were_stopped_does_not_count(agent: AgentProcess) -> None:
    agent.wait()
    listen(agent, 0.2)
    os.kill(agent.pid, signal.SIGSTOP)
    time.sleep(2 * SILENT)  # neither does the engine listen
    agent.receive()
    os.kill(agent.pid, signal.SIGCONT)
    assert listen(agent, SILENT) == []


def test_a_store_that_can_t_be_opened_is_said(slab: SharedSlab, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    process = AgentProcess(Attach(str(tmp_path / "file"), 1 << 20, [GroupSlots(0, 4096, 4096)]), slab)
    with pytest.raises(ConfigError, match="kv_store="):
        process.wait()
