"""Faults in the processes of a cluster, at points of a prompt's way that a campaign names (`test_campaign`).

Python imports this module first where its folder is on PYTHONPATH. It does nothing but in engines and KV agents that
find `JAXDUAL_TEST_FAULTS` in their environment: a folder, where the campaign leaves one order at a time, "point|kind".
The first process that comes to that point takes the order and carries it out: it kills or stops a process, or has the
next operation of its agent go wrong. The real code runs, with the real consequences.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STOPPED_SECONDS = 0.4
LATE_SECONDS = 1.5  # longer than the campaign's `kv_load_timeout`
VARIABLE = "JAXDUAL_TEST_FAULTS"
# What the next operation of an agent that fits does wrong.
OF_AGENTS = ("fails", "late", "broken", "gone", "slow", "no space")


def plant(folder: Path, module: str) -> None:
    """Plants the points of one of a cluster's processes."""
    if module == "jaxdual.engine.process":
        _plant_in_engine(folder)
    elif module == "jaxdual.agent.process":
        _plant_in_agent(folder)


class _Point:
    """A point that engines come to; `link` leads to the engine's agent."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name

    def reached(self, link: Any, request: str) -> None:
        order = self._folder / "order"
        try:
            point, kind = order.read_text().split("|")
        except (OSError, ValueError):
            return
        if point != self._name:
            return
        taken = self._folder / f"taken {os.getpid()} {time.monotonic_ns()}"
        try:
            order.rename(taken)
        except OSError:
            return
        agent = link._agent.pid if link._agent is not None else None
        with contextlib.suppress(ProcessLookupError):
            self._do(kind, agent, request)

    def _do(self, kind: str, agent: int | None, request: str) -> None:
        if kind == "client gone":
            (self._folder / f"leave {time.monotonic_ns()}").write_text(request)
        elif kind == "engine killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "cluster killed":
            os.kill(os.getppid(), signal.SIGKILL)
        elif agent is None:
            return
        elif kind == "agent killed":
            os.kill(agent, signal.SIGKILL)
        elif kind == "agent stopped":
            os.kill(agent, signal.SIGSTOP)
            subprocess.Popen(["sh", "-c", f"sleep {STOPPED_SECONDS}; kill -CONT {agent}"], env={})
        else:
            (self._folder / f"agent {agent}").write_text(kind)


def _before(owner: type, name: str, point: _Point, request: Any, link: Any = lambda self: self._link) -> None:
    """Has a method come to a point before it runs."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **options: Any) -> Any:
        point.reached(link(self), request(self, *args, **options))
        return method(self, *args, **options)

    setattr(owner, name, wrapped)


def _plant_in_engine(folder: Path) -> None:
    from jaxdual.engine.departures import Departures
    from jaxdual.engine.handoff import Arrivals
    from jaxdual.engine.layerwise.forward import Forward
    from jaxdual.engine.layerwise.reads import JobReads
    from jaxdual.engine.transfers import Transfers

    def point(name: str) -> _Point:
        return _Point(folder, name)

    _before(Arrivals, "_load", point("read there"), lambda self, arrival, lease: arrival.request_id)
    _before(JobReads, "_load", point("read here"), lambda self, job: job.request.request_id)
    _before(Forward, "_ask_for", point("coming"), lambda self, job, *rest: job.request.request_id)
    _before(Forward, "_push", point("pushed"), lambda self, going, piece: going.job.request.request_id)
    _before(Transfers, "adopt", point("ready"), lambda self, name, *rest, **options: name)
    _before(Departures, "_hand_over", point("stored"), lambda self, sent: "")
    # After them: memory is reserved, or in quarantine.
    reserved, quarantined = point("reserved"), point("quarantined")
    grant, end = Arrivals._grant, Arrivals._end

    def granting(self: Any, arrival: Any) -> bool:
        granted = grant(self, arrival)
        if granted and arrival.lease is not None:
            reserved.reached(self._link, arrival.request_id)
        return granted

    def ending(self: Any, arrival: Any) -> None:
        end(self, arrival)
        if arrival.lease is not None and arrival.lease.under_way:
            quarantined.reached(self._link, arrival.request_id)

    Arrivals._grant, Arrivals._end = granting, ending  # type: ignore[method-assign]


def _plant_in_agent(folder: Path) -> None:
    import asyncio

    from jaxdual.agent.peers import Peers
    from jaxdual.kv.store import file

    mark = folder / f"agent {os.getpid()}"

    def ordered(*kinds: str) -> str | None:
        """What this agent is to do wrong now, once."""
        with contextlib.suppress(OSError):
            kind = mark.read_text()
            if kind in kinds:
                mark.unlink()
                return kind
        return None

    move, read_file, write_whole = Peers._move, file.FileStore._read_file, file.write_whole

    async def moving(self: Any, *args: Any, **options: Any) -> bool:
        kind = ordered("fails", "late")
        if kind == "fails":
            return False
        if kind == "late":
            await asyncio.sleep(LATE_SECONDS)
        return await move(self, *args, **options)

    def reading(self: Any, key: bytes, into: memoryview, flags: int) -> Any:
        kind = ordered("broken", "gone", "slow")
        path = self._folder.block(key)
        with contextlib.suppress(OSError):
            if kind == "gone":
                os.unlink(path)
            elif kind == "broken":
                with open(path, "r+b") as block:
                    byte = block.read(1)
                    block.seek(0)
                    block.write(bytes([byte[0] ^ 1]))
        if kind == "slow":
            time.sleep(LATE_SECONDS)
        return read_file(self, key, into, flags)

    def writing(*args: Any) -> None:
        kind = ordered("no space", "slow")
        if kind == "no space":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if kind == "slow":
            time.sleep(LATE_SECONDS)
        write_whole(*args)

    Peers._move = moving  # type: ignore[method-assign]
    file.FileStore._read_file = reading  # type: ignore[method-assign]
    file.write_whole = writing


if VARIABLE in os.environ and "-m" in sys.orig_argv:
    plant(Path(os.environ[VARIABLE]), sys.orig_argv[sys.orig_argv.index("-m") + 1])
