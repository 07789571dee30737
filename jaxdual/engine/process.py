"""`python -m jaxdual.engine.process FD`: one engine, driven by the front at the other end of socket FD.

The main thread is the engine's step loop, and there is no other. The process ends with its front.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from jaxdual.config import EngineConfig
from jaxdual.engine.build import Built, engine_of
from jaxdual.engine.cluster_part import ClusterPart
from jaxdual.engine.layerwise.build import prefill_engine_of
from jaxdual.engine.loading import load_model
from jaxdual.engine.request import Request, TokenEvent
from jaxdual.engine.wire import (
    Abort,
    Add,
    Adopt,
    Answer,
    Ask,
    Compiled,
    Died,
    Events,
    Expect,
    Forget,
    HitsRead,
    PeerDied,
    Prefill,
    Ready,
    Settled,
    Start,
    StartFailed,
    Stop,
    ToEngine,
    UseMode,
)
from jaxdual.errors import EngineDeadError
from jaxdual.frames import MessageSocket
from jaxdual.kv.slots import IntegrityError
from jaxdual.scheduling.loads import Role

_STATS_SECONDS = 0.1  # between two figures sent along with events
_WARM_UP_SECONDS = 1.0  # between two shapes that are compiled while requests wait for it
_CPU_NICENESS = 5
_LOOK_SECONDS = 0.5


class EngineLoop:
    """Serves a front: its messages between two steps, shapes to compile while there is nothing else to do.

    Args:
      built: the engine.
      channel: to the front.
      compile_ahead: whether there are shapes to compile.
    """

    def __init__(self, built: Built[Any], channel: MessageSocket, *, compile_ahead: bool = True) -> None:
        self._built = built
        self._engine = built.engine
        self._channel = channel
        shapes: Iterator[tuple[str, Callable[[], float]]] = built.engine.warm_ups()
        self._warm_ups = shapes if compile_ahead else iter(())
        self._next_warm_up = next(self._warm_ups, None)
        self._warm_up_due = 0.0
        self._stats_due = 0.0
        self._busy = False
        self._stopping = False

    def run(self) -> None:
        """Returns after `Stop`.

        Raises:
          ConnectionError: the front is gone.
          EngineDeadError: the engine has failed.
        """
        self._tell()
        while not self._stopping:
            timeout = self._engine.patience if self._next_warm_up is None else 0.0
            for message in self._channel.receive(timeout, self._engine.descriptors):
                self._handle(message)
            if self._engine.has_work:
                self._busy = True
                self._send_events(self._engine.step())
            else:
                self._engine.poll()
            self._tell()
            if self._busy and not self._engine.has_work:
                self._busy = False
                self._channel.send(Events([], self._built.stats()))
            # Now and then also beside requests: else a server under steady load would never be ready.
            free = not self._engine.has_work or time.monotonic() >= self._warm_up_due
            if self._next_warm_up is not None and free and not self._stopping:
                self._warm_up(*self._next_warm_up)

    def _handle(self, message: object) -> None:
        match message:
            case Add(request):
                self._queue(request, partial(self._engine.add, request))
            case Prefill(request, target, hits, moves):
                self._queue(request, partial(self._engine.prefill, request, target, hits, moves=moves))
            case Adopt(request, stored, moved):
                self._queue(request, partial(self._engine.adopt, request, stored, moved=moved))
            case Expect() | HitsRead() | Forget() | Settled() | PeerDied():
                self._engine.handle(message)
            case Abort(request_id, index):
                self._engine.abort(request_id, index)
            case UseMode(number, mode):
                self._channel.send(Answer(number, self._built.stats(), self._use_mode(mode)))
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

    def _tell(self) -> None:
        for message in self._engine.take_messages():
            self._channel.send(message)

    def _use_mode(self, mode: str) -> str | None:
        try:
            self._engine.use_mode(mode)
        except ValueError as error:
            return str(error)
        return None

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
    start, *more = channel.receive(None)
    if not isinstance(start, Start):
        raise TypeError(f"the first message is {type(start).__name__}, not Start")
    if more:  # before its answer, a front that sends more wants the end
        return 0
    try:
        with _ends_with(channel):
            built = _build(start.config, start.part)
    except Exception as error:
        if not isinstance(error, ValueError):
            traceback.print_exc()
        channel.send(StartFailed(type(error).__name__, str(error)))
        return 1
    if built.info.device == "cpu":
        _give_way()
    channel.send(Ready(built.info, built.stats(), warm=not start.config.compile_ahead))
    try:
        EngineLoop(built, channel, compile_ahead=start.config.compile_ahead).run()
        built.engine.close()
    except ConnectionError:
        raise
    except Exception as error:
        if not isinstance(error.__cause__ or error, EngineDeadError):  # a defect, not what it said itself
            traceback.print_exc()
        channel.send(Died(str(error) if isinstance(error, EngineDeadError) else f"{type(error).__name__}: {error}"))
        return 1
    return 0


def _build(config: EngineConfig, part: ClusterPart | None) -> Built[Any]:
    """The engine that a front or a cluster wants."""
    loaded = load_model(config)
    if part is not None and part.role is Role.PREFILL and config.shares_kv_store and loaded.info.full_attention:
        return prefill_engine_of(loaded, config, part)
    return engine_of(loaded, config, part)


@contextlib.contextmanager
def _ends_with(channel: MessageSocket) -> Iterator[None]:
    """Ends this process with its front, while nothing listens to that: a start may wait for others for long."""
    done = threading.Event()

    def watch() -> None:
        poll = select.poll()
        poll.register(channel.fileno(), select.POLLRDHUP)
        while not done.wait(_LOOK_SECONDS):
            if poll.poll(0):
                os._exit(0)

    thread = threading.Thread(target=watch, name="front", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _give_way() -> None:
    """Lets the front go first where both need the same cores: it needs little, and clients wait for it."""
    for thread in os.listdir("/proc/self/task") if os.path.isdir("/proc/self/task") else ():
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, int(thread), _CPU_NICENESS)


if __name__ == "__main__":
    sys.exit(main())
