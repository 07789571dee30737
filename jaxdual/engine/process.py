"""`python -m jaxdual.engine.process FD`: one engine, driven by the front at the other end of socket FD.

The main thread is the engine's step loop, and there is no other. The process ends with its front.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial

from jaxdual.engine.build import BuiltEngine, build_engine
from jaxdual.engine.request import Request, TokenEvent
from jaxdual.engine.wire import (
    Abort,
    Add,
    Adopt,
    AgentAt,
    Answer,
    ArrivalLost,
    Ask,
    Compiled,
    Died,
    Events,
    Expect,
    Forget,
    Granted,
    HandedOff,
    PeerDied,
    Prefill,
    Ready,
    Settled,
    Start,
    StartFailed,
    Stop,
    ToEngine,
)
from jaxdual.errors import EngineDeadError
from jaxdual.frames import MessageSocket
from jaxdual.kv.slots import IntegrityError

_STATS_SECONDS = 0.1  # between two figures sent along with events
_WARM_UP_SECONDS = 1.0  # between two shapes that are compiled while requests wait for it
_CPU_NICENESS = 5


class EngineLoop:
    """Serves a front: its messages between two steps, shapes to compile while there is nothing else to do.

    Args:
      built: the engine.
      channel: to the front.
    """

    def __init__(self, built: BuiltEngine, channel: MessageSocket) -> None:
        self._built = built
        self._engine = built.engine
        self._channel = channel
        self._warm_ups: Iterator[tuple[str, Callable[[], float]]] = built.engine.runner.warm_ups()
        self._next_warm_up = next(self._warm_ups, None)
        self._warm_up_due = 0.0
        self._stats_due = 0.0
        self._stopping = False
        self._agent_address: str | None = None  # as the front knows it

    def run(self) -> None:
        """Returns after `Stop`.

        Raises:
          ConnectionError: the front is gone.
          EngineDeadError: the engine has failed.
        """
        self._send_handoffs()
        while not self._stopping:
            idle = not self._engine.has_work and self._next_warm_up is None
            for message in self._channel.receive(wait=idle, beside=self._engine.descriptors):
                self._handle(message)
            if self._engine.has_work:
                self._send_events(self._engine.step())
            else:
                self._engine.poll()
            self._send_handoffs()
            # Now and then also beside requests: else a server under steady load would never be ready.
            free = not self._engine.has_work or time.monotonic() >= self._warm_up_due
            if self._next_warm_up is not None and free and not self._stopping:
                self._warm_up(*self._next_warm_up)

    def _handle(self, message: object) -> None:
        match message:
            case Add(request):
                self._queue(request, partial(self._engine.add, request))
            case Prefill(request, target):
                self._queue(request, partial(self._engine.add, request, target))
            case Adopt(request, stored):
                self._queue(request, partial(self._engine.adopt, request, stored))
            case Expect() | Forget() | Settled() | PeerDied():
                self._handle_arrival(message)
            case Abort(request_id, index):
                self._engine.abort(request_id, index)
            case Ask(number, check_integrity):
                self._channel.send(Answer(number, self._built.stats(), self._check() if check_integrity else None))
            case Stop():
                self._stopping = True

    def _queue(self, request: Request, queue: Callable[[], None]) -> None:
        try:
            queue()
        except ValueError as error:  # the front has checked it: only its defect comes here
            refused = [
                TokenEvent(request.request_id, index, None, finish_reason="error", error=str(error))
                for index in range(request.params.n)
            ]
            self._channel.send(Events(refused, None))

    def _handle_arrival(self, message: Expect | Forget | Settled | PeerDied) -> None:
        if self._engine.transfers is None:
            return
        arrivals = self._engine.transfers.arrivals
        match message:
            case Expect(request_id, tokens, peer):
                arrivals.expect(request_id, tokens, peer)
            case Forget(request_id):
                arrivals.forget(request_id)
            case Settled(request_id):
                arrivals.settled(request_id)
            case PeerDied(peer):
                arrivals.peer_died(peer)

    def _send_handoffs(self) -> None:
        transfers = self._engine.transfers
        if transfers is None:
            return
        if transfers.agent_address != self._agent_address:
            # Before what comes of it: else the next attempts would be made with the old one, too.
            self._agent_address = transfers.agent_address
            self._channel.send(AgentAt(self._agent_address))
        for request_id, target in transfers.arrivals.take_granted():
            self._channel.send(Granted(request_id, target))
        for request_id in transfers.arrivals.take_lost():
            self._channel.send(ArrivalLost(request_id))
        for request_id, complete in transfers.exports.take_over():
            self._channel.send(HandedOff(request_id, complete))

    def _check(self) -> str | None:
        try:
            self._engine.check_integrity()
        except IntegrityError as error:
            return str(error)
        return None

    def _send_events(self, events: list[TokenEvent]) -> None:
        now = time.monotonic()
        stats = None
        if now >= self._stats_due or not self._engine.has_work:
            stats, self._stats_due = self._built.stats(), now + _STATS_SECONDS
        if events or stats is not None:
            self._channel.send(Events(events, stats))

    def _warm_up(self, name: str, run: Callable[[], float]) -> None:
        seconds = run()
        self._next_warm_up = next(self._warm_ups, None)
        self._channel.send(Compiled(name, seconds, last=self._next_warm_up is None))
        self._warm_up_due = time.monotonic() + _WARM_UP_SECONDS


def main() -> int:
    """Runs the process; returns its exit status."""
    # Ctrl-C and a service manager's signal reach the whole group; the front decides what becomes of the requests.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    channel = MessageSocket(socket.socket(fileno=int(sys.argv[1])), ToEngine, "the front")
    try:
        return _serve(channel)
    except ConnectionError:
        return 0  # nobody is left to serve


def _serve(channel: MessageSocket) -> int:
    start, *more = channel.receive(wait=True)
    if not isinstance(start, Start):
        raise TypeError(f"the first message is {type(start).__name__}, not Start")
    if more:  # before its answer, a front that sends more wants the end
        return 0
    try:
        built = build_engine(start.config)
    except Exception as error:
        if not isinstance(error, ValueError):
            traceback.print_exc()
        channel.send(StartFailed(type(error).__name__, str(error)))
        return 1
    if built.info.device == "cpu":
        _give_way()
    channel.send(Ready(built.info, built.stats()))
    try:
        EngineLoop(built, channel).run()
        built.engine.close()
    except ConnectionError:
        raise
    except Exception as error:
        traceback.print_exc()
        channel.send(Died(str(error) if isinstance(error, EngineDeadError) else f"{type(error).__name__}: {error}"))
        return 1
    return 0


def _give_way() -> None:
    """Lets the front go first where both need the same cores: it needs little, and clients wait for it."""
    for thread in os.listdir("/proc/self/task") if os.path.isdir("/proc/self/task") else ():
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, int(thread), _CPU_NICENESS)


if __name__ == "__main__":
    sys.exit(main())
