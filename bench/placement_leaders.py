"""The other side of `bench.placement`: all group leaders and clients, and their ways to the scheduler."""

from __future__ import annotations

import contextlib
import random
import select
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol, Self

from bench.placement_desk import (
    READ_BYTES,
    Ask,
    Decoding,
    Desk,
    Fetch,
    Finished,
    FromDesk,
    Placed,
    Prefilled,
    ReadProgress,
    State,
    Submit,
    ToDesk,
    Told,
)
from bench.workers import ROOT
from jaxdual.frames import Frames
from jaxdual.scheduling.loads import EngineReport, PathRequest, Role
from jaxdual.scheduling.paths import Placement
from jaxdual.scheduling.read_side import ReadSide

NODE_ENGINES = 8
# Requests of the 64K trace (DualPath Table 2): contexts evenly from the first turn's to the last one's.
_PROMPTS = (9_484, 55_958)
_APPENDED, _GENERATED = 429, 176
_BLOCK_TOKENS = 64
_DECODE_TOKENS = 1_500_000  # KV memory of a decode engine
_STEP_ROUNDS = 3  # from one event of a placement to the next, in fetches of each group
_MOST_ROUNDS = 200  # for all requests to be placed, or to end
_FILLED = 4  # requests that arrive before a fetch until enough are live


class Link(Protocol):
    """A way to the scheduler."""

    def send(self, message: ToDesk) -> None:
        """Keeps a message until `flush`."""

    def flush(self) -> None:
        """Sends what was kept, as far as the other end takes it; `receive` sends the rest."""

    def receive(self, timeout: float | None = None) -> list[FromDesk]:
        """Answers that have come.

        Args:
          timeout: seconds to wait for the first; None for as long as it takes.
        """


class InProcess:
    """Calls the scheduler in this process.

    Attributes:
      cpu_seconds: of the scheduler alone.
    """

    def __init__(self) -> None:
        self.cpu_seconds = 0.0
        self._desk = Desk()
        self._kept: list[ToDesk] = []
        self._answers: list[FromDesk] = []

    def send(self, message: ToDesk) -> None:
        self._kept.append(message)

    def flush(self) -> None:
        began = time.process_time()
        for message in self._kept:
            self._answers += self._desk.handle(message)
        self.cpu_seconds += time.process_time() - began
        self._kept.clear()

    def receive(self, timeout: float | None = None) -> list[FromDesk]:
        answers, self._answers = self._answers, []
        return [
            State(self.cpu_seconds, answer.live, answer.waiting, answer.trouble)
            if isinstance(answer, State)
            else answer
            for answer in answers
        ]


class OverSocket:
    """Starts a scheduler's process on a core of its own, and speaks with it in frames.

    Args:
      core: that it is pinned to.
    """

    def __init__(self, core: int) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "bench.placement_desk", str(theirs.fileno()), str(core)]
            self._process = subprocess.Popen(command, cwd=ROOT, pass_fds=[theirs.fileno()])
        ours.setblocking(False)
        self._socket = ours
        self._frames = Frames(FromDesk)
        self._outbox = bytearray()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._socket.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def send(self, message: ToDesk) -> None:
        self._outbox += self._frames.encode(message)

    def flush(self) -> None:
        with contextlib.suppress(BlockingIOError):
            del self._outbox[: self._socket.send(self._outbox)]

    def receive(self, timeout: float | None = None) -> list[FromDesk]:
        """Answers that have come.

        Raises:
          ConnectionError: the scheduler's process has ended.
        """
        answers: list[FromDesk] = []
        until = None if timeout is None else time.perf_counter() + timeout
        while not answers:
            left = None if until is None else max(0.0, until - time.perf_counter())
            readable, writable, _ = select.select([self._socket], [self._socket] if self._outbox else [], [], left)
            if not readable and not writable:
                break
            if self._outbox:
                self.flush()
            if readable:
                data = self._socket.recv(READ_BYTES)
                if not data:
                    raise ConnectionError("the scheduler's process has ended")
                answers += self._frames.feed(data)
        return answers


class Leaders:
    """Groups of engines that fetch in turn, and clients that keep a number of requests live.

    Before each fetch some requests end, chosen at random of those that decode, and as many arrive. Each placement is
    followed by five events: half of its hits are read, all are, it is prefilled, it decodes, it is finished.

    Args:
      link: to the scheduler.
      engines: a multiple of 24; a third prefill.
      live: requests that are not over.
      per_fetch: requests that end and arrive before a fetch.
      window: fetches that wait for their answers at once.

    Attributes:
      submitted, placed, told, finished: requests; `told` counts the engine of each that did not fetch it.
      latencies: seconds from each fetch to its answer.
    """

    def __init__(self, link: Link, engines: int, live: int, per_fetch: int, window: int) -> None:
        self.submitted = self.placed = self.told = self.finished = 0
        self.latencies: list[float] = []
        self._link = link
        self._live, self._per_fetch, self._window = live, per_fetch, window
        self._random = random.Random(0)
        nodes = engines // NODE_ENGINES
        self._reports = [EngineReport(e, e // NODE_ENGINES, e // NODE_ENGINES, 0, 0, 0) for e in range(engines)]
        for report in self._reports[engines // 3 :]:
            report.free_tokens = _DECODE_TOKENS
        self._roles = [Role.PREFILL if node < nodes // 3 else Role.DECODE for node in range(nodes)]
        self._order = self._random.sample(range(nodes), nodes)
        self._turn = 0
        self._fetched: deque[float] = deque()  # when, of fetches without an answer
        self._steps = (self._read_half, self._read_rest, self._prefilled, self._decoding)
        self._due: list[deque[tuple[int, Placement]]] = [deque() for _ in self._steps]
        self._decodes: list[Placement] = []

    def fill(self) -> None:
        """Brings the requests in, and lets them spread until their number at each step is steady."""
        while self.submitted < self._live:
            self._fetch(0, min(_FILLED, self._live - self.submitted))
        for _ in range(2 * len(self._steps) * _STEP_ROUNDS * len(self._order)):
            self.step()

    def step(self) -> None:
        """One fetch of one group, with what happens before."""
        ending = min(self._per_fetch, len(self._decodes))
        self._fetch(ending, ending)

    def wait(self, until: float) -> None:
        """Takes answers until a time of `time.perf_counter`."""
        while (left := until - time.perf_counter()) > 0:
            self._receive(left)

    def place_all(self) -> None:
        """Fetches until no request waits; nothing ends or arrives."""
        self._fetch_until(lambda: self.placed == self.submitted, 0)
        self.settle()

    def end_all(self) -> None:
        """Fetches until all placed requests are over; nothing arrives."""
        self._fetch_until(lambda: self.finished == self.placed, self._live)
        self.settle()

    def settle(self) -> None:
        """Waits for the answers to all fetches."""
        while self._fetched:
            self._receive()

    def ask(self, *, check: bool = False) -> State:
        """What the scheduler says of itself.

        Args:
          check: whether it checks its integrity.
        """
        self.settle()
        self._link.send(Ask(check))
        self._link.flush()
        while True:
            for answer in self._link.receive():
                if isinstance(answer, State):
                    return answer
                self._take(answer)

    def _fetch_until(self, done: Callable[[], bool], ending: int) -> None:
        for _ in range(_MOST_ROUNDS * len(self._order)):
            if done():
                return
            self._fetch(min(ending, len(self._decodes)), 0)

    def _fetch(self, ending: int, arriving: int) -> None:
        while len(self._fetched) >= self._window:
            self._receive()
        for step, (queue, act) in enumerate(zip(self._due, self._steps, strict=True)):
            while queue and queue[0][0] <= self._turn:
                _, placement = queue.popleft()
                act(placement)
                self._plan(step + 1, placement)
        for _ in range(ending):
            self._finish()
        for _ in range(arriving):
            self._submit()
        group = self._order[self._turn % len(self._order)]
        reports = self._reports[group * NODE_ENGINES : (group + 1) * NODE_ENGINES]
        self._link.send(Fetch(self._roles[group], group, reports))
        self._turn += 1
        self._fetched.append(time.perf_counter())
        self._link.flush()

    def _receive(self, timeout: float | None = None) -> None:
        for answer in self._link.receive(timeout):
            self._take(answer)

    def _take(self, answer: FromDesk) -> None:
        if isinstance(answer, Placed):
            self.latencies.append(time.perf_counter() - self._fetched.popleft())
            for placement in answer.placements:
                self._begin(placement)
        elif isinstance(answer, Told):
            self.told += len(answer.placements)

    # What clients and engines do.

    def _submit(self) -> None:
        prompt = self._random.randint(*_PROMPTS)
        hit = (prompt - _APPENDED) // _BLOCK_TOKENS * _BLOCK_TOKENS
        self._link.send(Submit(PathRequest(self.submitted, prompt, hit, _GENERATED, time.monotonic())))
        self.submitted += 1

    def _begin(self, placement: Placement) -> None:
        self.placed += 1
        self._count(placement.prefill_engine, 1, placement)
        self._count(placement.decode_engine, 1, placement)
        reader, _, tokens = _read_of(placement)
        self._add_unread(reader, tokens)
        self._plan(0, placement)

    def _plan(self, step: int, placement: Placement) -> None:
        if step < len(self._steps):
            self._due[step].append((self._turn + _STEP_ROUNDS * len(self._order), placement))
        else:
            self._decodes.append(placement)

    def _read_half(self, placement: Placement) -> None:
        _, _, tokens = _read_of(placement)
        self._read(placement, tokens // 2)

    def _read_rest(self, placement: Placement) -> None:
        _, _, tokens = _read_of(placement)
        self._read(placement, tokens - tokens // 2)

    def _read(self, placement: Placement, tokens: int) -> None:
        reader, side, _ = _read_of(placement)
        self._add_unread(reader, -tokens)
        self._link.send(ReadProgress(placement.number, side, tokens))

    def _prefilled(self, placement: Placement) -> None:
        self._count(placement.prefill_engine, -1, placement)
        self._link.send(Prefilled(placement.number))

    def _decoding(self, placement: Placement) -> None:
        self._reports[placement.decode_engine].free_tokens -= placement.request.prompt_tokens
        self._link.send(Decoding(placement.number))

    def _finish(self) -> None:
        chosen = self._random.randrange(len(self._decodes))
        self._decodes[chosen], self._decodes[-1] = self._decodes[-1], self._decodes[chosen]
        placement = self._decodes.pop()
        self._count(placement.decode_engine, -1, placement)
        self._reports[placement.decode_engine].free_tokens += placement.request.prompt_tokens
        self._link.send(Finished(placement.number))
        self.finished += 1

    def _count(self, engine: int, sign: int, placement: Placement) -> None:
        self._reports[engine].seq += sign
        self._reports[engine].tok += sign * placement.request.prompt_tokens

    def _add_unread(self, engine: int, tokens: int) -> None:
        """To all engines of the node: they report the same disk queue."""
        first = engine // NODE_ENGINES * NODE_ENGINES
        for report in self._reports[first : first + NODE_ENGINES]:
            report.read_q += tokens


def _read_of(placement: Placement) -> tuple[int, ReadSide, int]:
    """The engine that reads, its side, and tokens."""
    read = placement.read
    if read.prefill_tokens:
        return placement.prefill_engine, ReadSide.PREFILL, read.prefill_tokens
    return placement.decode_engine, ReadSide.DECODE, read.decode_tokens
