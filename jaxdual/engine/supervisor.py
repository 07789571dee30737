"""The life of an engine in a process of its own: start, warm-up, death, next start, end."""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import logging
from collections.abc import Callable, Collection, Mapping, Sequence

from jaxdual.config import ClusterConfig, ConfigError, EngineConfig
from jaxdual.engine.client import EngineProcess
from jaxdual.engine.request import Request, TokenEvent
from jaxdual.engine.wire import Abort, Add, Answer, Ask, Compiled, Events, Ready, StartFailed, Stop, UseMode
from jaxdual.errors import EngineDeadError, NotServingError
from jaxdual.frames import Message
from jaxdual.outputs import EngineInfo, EngineStats

_MOST_FAILED_STARTS = 5  # in a row; a start has failed if the engine dies before it serves
_RESTART_SECONDS = 1.0  # from the first failed start in a row to the next one; doubled with each further one

_logger = logging.getLogger(__name__)


class EngineState(enum.Enum):
    """What an engine is doing. Requests are taken in all states but `DRAINING` and `STOPPED`."""

    STARTING = "starting"
    WARMING = "warming up"  # compiles shapes between requests
    SERVING = "serving"
    RESTARTING = "restarting"
    DRAINING = "draining"
    STOPPED = "stopped"


class EngineSupervisor:
    """Runs an engine process, and starts another one when it dies. It belongs to one loop.

    For a front it is the engine (`TokenEngine`): requests that come while there is no process wait for the next one.

    Args:
      config: of the engine.
      cluster: how many of them make one, if more than one do.
      environment: what the process's environment has beside this one's.
      on_ready: called each time that a process is about to take requests; a ValueError that it raises ends the start.
      on_events: called with what requests have given.
      on_lost: called when requests have lost their process: with the reason, and with whether there will be another
        one, to which they may be added again.
    """

    def __init__(
        self,
        config: EngineConfig,
        cluster: ClusterConfig | None = None,
        environment: Mapping[str, str] | None = None,
        *,
        on_ready: Callable[[EngineInfo], None],
        on_events: Callable[[Sequence[TokenEvent]], None],
        on_lost: Callable[[str, bool], None],
    ) -> None:
        self._config, self._cluster, self._environment = config, cluster, environment
        self._on_ready = on_ready
        self._on_events = on_events
        self._on_lost = on_lost
        self.restarts = 0
        self._state = EngineState.STARTING
        self._listeners: list[Callable[[EngineState], None]] = []
        self._process: EngineProcess | None = None
        self._ready = False  # whether the process takes requests
        self._started: asyncio.Future[None] | None = None
        self._warm = asyncio.Event()
        self._proved = False  # that the process works
        self._why_stopped = "the engine was shut down"
        self._failed_starts = 0
        self._restart: asyncio.Task[None] | None = None
        self._info: EngineInfo | None = None
        self._stats: EngineStats | None = None
        self._compile_seconds: dict[str, float] = {}
        self._waiting: dict[str, Request] = {}  # of the time without a process
        self._questions: dict[int, asyncio.Future[Answer]] = {}
        self._asked = 0

    # Life.

    async def start(self) -> None:
        """Starts the engine; returns when it takes requests. Further calls wait for the first.

        Raises:
          ConfigError, ModelError, TokenizerError: settings or files that can't be used.
          EngineDeadError: the process has died.
          NotServingError: it was shut down before.
        """
        if self._state is EngineState.STOPPED:
            raise NotServingError(self._why_stopped)
        if self._started is None:
            self._started = asyncio.get_running_loop().create_future()
            await self._launch()
        await asyncio.shield(self._started)

    async def warmed_up(self) -> None:
        """Waits until all padded shapes are compiled."""
        await self.start()
        await self._warm.wait()

    def drain(self) -> None:
        """From now on there are no new requests; a process that dies has no successor."""
        self._set_state(EngineState.DRAINING)

    async def shutdown(self) -> None:
        """Ends all requests and the process."""
        self._why_stopped = "the engine was shut down"
        self._set_state(EngineState.STOPPED)
        self._end_start(NotServingError(self._why_stopped))
        if self._restart is not None:
            self._restart.cancel()
        self._lose_all(self._why_stopped)
        if self._process is not None:
            await self._process.stop()
            self._process = None

    @property
    def state(self) -> EngineState:
        return self._state

    def on_state(self, listener: Callable[[EngineState], None]) -> None:
        """Calls `listener` with each new state."""
        self._listeners.append(listener)

    def check_open(self) -> None:
        """Raises `NotServingError` where new requests are not taken any more."""
        if self._state is EngineState.DRAINING:
            raise NotServingError("shutting down: no new requests are taken")
        if self._state is EngineState.STOPPED:
            raise NotServingError(self._why_stopped)

    # Requests.

    def add(self, request: Request) -> None:
        """Hands a request to the process, or keeps it until there is one."""
        if self._process is not None and self._ready and self._process.is_connected:
            self._process.send(Add(request))
        else:
            self._waiting[request.request_id] = request

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Ends a request, or one of its outputs; a request that waits for a process goes with its last output."""
        if request_id not in self._waiting:
            if self._process is not None:
                self._process.send(Abort(request_id, index))
        elif index is None:
            del self._waiting[request_id]

    @property
    def waiting(self) -> Collection[str]:
        """Ids of the requests that wait for a process."""
        return self._waiting.keys()

    # Figures.

    @property
    def info(self) -> EngineInfo:
        """What is served; known once `start` has returned."""
        if self._info is None:
            raise NotServingError("the engine has not started yet")
        return self._info

    @property
    def pid(self) -> int | None:
        """Id of the process; None while there is none."""
        return None if self._process is None else self._process.pid

    @property
    def stats(self) -> EngineStats | None:
        """The latest figures that an engine has sent; None before the first."""
        return self._stats

    @property
    def compile_seconds(self) -> dict[str, float]:
        """What the present process has compiled so far: seconds by shape."""
        return dict(self._compile_seconds)

    async def ask(self, *, check_integrity: bool) -> Answer:
        """The engine's figures now.

        Args:
          check_integrity: has it prove that pages, queues and requests agree.

        Raises:
          EngineDeadError: there is no engine now.
        """
        return await self._question(lambda number: Ask(number, check_integrity))

    async def use_mode(self, mode: str) -> None:
        """See `wire.UseMode`.

        Raises:
          ValueError: it can't be done now, or there is no such mode.
          EngineDeadError: there is no engine now.
        """
        answer = await self._question(lambda number: UseMode(number, mode))
        if answer.error is not None:
            raise ValueError(answer.error)
        if self._cluster is not None:  # the next process is to start in it
            self._cluster = dataclasses.replace(self._cluster, path_mode=mode)  # type: ignore[arg-type]  # checked there

    async def _question(self, message: Callable[[int], Message]) -> Answer:
        await self.start()
        if self._process is None or not self._ready:
            raise EngineDeadError(self._why_stopped if self._state is EngineState.STOPPED else "the engine restarts")
        self._asked += 1
        question: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._questions[self._asked] = question
        self._process.send(message(self._asked))
        return await question

    # What the process says.

    async def _launch(self) -> None:
        self._ready = False
        self._compile_seconds = {}
        try:
            process = await EngineProcess.launch(
                self._config, self._on_message, self._on_death, self._cluster, environment=self._environment
            )
        except OSError as error:
            self._on_death(f"the engine process can't be started: {error}")
            return
        if self._state is EngineState.STOPPED:  # meanwhile
            await process.stop()
        else:
            self._process = process

    def _on_message(self, message: object) -> None:
        match message:
            case Events(events, stats):
                self._stats = stats or self._stats
                if events and self._warm.is_set():  # before, a shape may still be too much for the device
                    self._works()
                self._on_events(events)
            case Compiled(name, seconds, last):
                self._compile_seconds[name] = seconds
                if last:
                    self._works()
                if last and self._ready:
                    self._warm.set()
                    self._set_state(EngineState.SERVING)
            case Answer(number):
                question = self._questions.pop(number, None)
                if question is not None and not question.done():
                    question.set_result(message)
            case Ready(info, stats, warm):
                self._stats = stats
                self._take_requests(info, warm=warm)
            case StartFailed(kind, text):
                if self._info is None:
                    self._give_up(_start_error(kind, text))
                else:
                    name = self._info.served_model_name
                    _logger.error("the engine of %s can't be started again: %s: %s", name, kind, text)

    def _works(self) -> None:
        self._proved, self._failed_starts = True, 0

    def _take_requests(self, info: EngineInfo, *, warm: bool) -> None:
        try:
            self._on_ready(info)
        except ValueError as error:
            self._give_up(error)
            return
        self._info = info
        self._ready = True
        if self._started is not None and not self._started.done():
            self._started.set_result(None)
        if warm:
            self._warm.set()
        self._set_state(EngineState.SERVING if warm else EngineState.WARMING)
        waiting, self._waiting = self._waiting, {}
        for request in waiting.values():
            self.add(request)

    def _on_death(self, reason: str) -> None:
        self._process = None
        self._ready = False
        if self._state in (EngineState.STOPPED, EngineState.DRAINING):
            self._end_start(EngineDeadError(reason))
            self._lose_all(reason)
            return
        if self._info is None:  # never started: the caller of `start` is told
            self._give_up(EngineDeadError(reason))
            return
        self._failed_starts += not self._proved
        self._proved = False
        self._warm.clear()
        _logger.error("%s: %s", self._info.served_model_name, reason)
        if self._failed_starts >= _MOST_FAILED_STARTS:
            self._give_up(EngineDeadError(f"{reason}; it has failed {self._failed_starts} times in a row"))
            return
        self._lose_running(reason, goes_on=True)
        self._set_state(EngineState.RESTARTING)
        self._restart = asyncio.get_running_loop().create_task(self._start_again())

    async def _start_again(self) -> None:
        if self._failed_starts:
            await asyncio.sleep(_RESTART_SECONDS * 2 ** (self._failed_starts - 1))
        self.restarts += 1
        await self._launch()

    # Ends.

    def _give_up(self, error: Exception) -> None:
        """No engine any more."""
        self._why_stopped = str(error)
        self._set_state(EngineState.STOPPED)
        self._end_start(error)
        if self._process is not None:
            self._process.send(Stop())  # a cluster has engines to end, and files to remove
        self._lose_all(str(error))

    def _end_start(self, error: Exception) -> None:
        """Tells those who wait for the start that there will be none."""
        if self._started is not None and not self._started.done():
            self._started.set_exception(error)
            self._started.exception()  # nobody may be waiting

    def _lose_all(self, reason: str) -> None:
        self._waiting.clear()
        self._lose_running(reason, goes_on=False)

    def _lose_running(self, reason: str, *, goes_on: bool) -> None:
        """Tells of what the process had under way."""
        for question in self._questions.values():
            if not question.done():
                question.set_exception(EngineDeadError(reason))
        self._questions.clear()
        self._on_lost(reason, goes_on)

    def _set_state(self, state: EngineState) -> None:
        # Whoever drains or stops has the last word.
        final = {EngineState.DRAINING: 1, EngineState.STOPPED: 2}
        if state is self._state or final.get(self._state, 0) > final.get(state, 0):
            return
        self._state = state
        for listener in self._listeners:
            listener(state)


def _start_error(kind: str, text: str) -> Exception:
    if kind == ConfigError.__name__:
        return ConfigError(text)
    if kind == "ModelError":
        from models.errors import ModelError  # the package is slow to import, and a front needs nothing else of it

        return ModelError(text)
    return EngineDeadError(f"{kind}: {text}")
