"""`AsyncLLM`: many callers on an asyncio loop, one engine in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from jaxdual.config import MAX_QUEUED_REQUESTS, ConfigError, EngineConfig
from jaxdual.engine.client import EngineProcess
from jaxdual.engine.request import Request
from jaxdual.engine.wire import Abort, Add, Answer, Ask, Compiled, Events, Ready, StartFailed
from jaxdual.errors import EngineDeadError, NotServingError, QueueFullError
from jaxdual.front import Front, Prompt, TokenizedPrompt
from jaxdual.outputs import EngineInfo, EngineStats, RequestOutput
from jaxdual.sampling_params import SamplingParams
from jaxdual.served_model import ServedModel, front_of

_LONG_TEXT = 4096  # characters from which tokenizing leaves the loop
_MOST_FAILED_STARTS = 5
_RESTART_SECONDS = 0.5  # before the second start in a row; doubled with each further one

_logger = logging.getLogger(__name__)


class EngineState(enum.Enum):
    """What an `AsyncLLM` is doing. Requests are taken in all states but `DRAINING` and `STOPPED`."""

    STARTING = "starting"
    WARMING = "warming up"  # compiles shapes between requests
    SERVING = "serving"
    RESTARTING = "restarting"
    DRAINING = "draining"
    STOPPED = "stopped"


class RequestStream:
    """A request under way: iterating gives its output each time that it has grown, the last time finished.

    It is the same object each time, which changes only between two awaits; what comes while the reader is busy is
    merged. Iterating never raises for a failed engine: the outputs then end with `finish_reason` "error".

    Attributes:
      output: the output so far.
    """

    def __init__(self, output: RequestOutput, close: Callable[[RequestStream], None]) -> None:
        self.output = output
        self._close = close
        self._changed = False
        self._ended = False
        self._waiter: asyncio.Future[None] | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._ended:
            raise StopAsyncIteration
        if self._waiter is not None and not self._waiter.done():
            raise RuntimeError("a stream has one reader at a time")
        while not self._changed:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        self._changed = False
        self._ended = self.output.finished
        return self.output

    def close(self) -> None:
        """Ends the request, if it has not finished."""
        if not self.output.finished:
            self._close(self)

    def wake(self) -> None:
        """Tells the reader that the output has changed."""
        self._changed = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class AsyncLLM(ServedModel):
    """`LLM` for asyncio, its engine in a process of its own that is started again when it dies.

    It belongs to one loop. `async with` starts and stops it.

    Args:
      model, settings: as for `LLM`.
      max_queued_requests: outputs that may wait for their turn beyond the `max_num_seqs` that run; more are refused.

    Raises:
      ConfigError: a setting that is unknown or out of range.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        max_queued_requests: int = MAX_QUEUED_REQUESTS,
        **settings: Any,
    ) -> None:
        config = EngineConfig.from_mapping({"model": None if model is None else str(model), **settings})
        self._init(config, max_queued_requests)

    @classmethod
    def from_config(cls, config: EngineConfig, *, max_queued_requests: int = MAX_QUEUED_REQUESTS) -> AsyncLLM:
        """An `AsyncLLM` with this configuration."""
        llm = cls.__new__(cls)
        llm._init(config, max_queued_requests)
        return llm

    def _init(self, config: EngineConfig, max_queued_requests: int) -> None:
        self.config = config
        self.max_queued_requests = max_queued_requests
        self.restarts = 0
        self._state = EngineState.STARTING
        self._listeners: list[Callable[[EngineState], None]] = []
        self._process: EngineProcess | None = None
        self._ready = False  # whether the process takes requests
        self._started: asyncio.Future[None] | None = None
        self._warm = asyncio.Event()
        self._why_stopped = "the engine was shut down"
        self._failed_starts = 0
        self._restart: asyncio.Task[None] | None = None
        self._info: EngineInfo | None = None
        self._text: Front | None = None
        self._stats: EngineStats | None = None
        self._compile_seconds: dict[str, float] = {}
        # Requests of the time without an engine, by the engine's id.
        self._waiting: dict[str, Request] = {}
        # By the identity of the output: an id may be in use again while its aborted owner ends.
        self._streams: dict[int, RequestStream] = {}
        self._num_sequences = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._questions: dict[int, asyncio.Future[Answer]] = {}
        self._asked = 0

    # Life.

    async def start(self) -> None:
        """Starts the engine; returns when it takes requests. Further calls wait for the first.

        Raises:
          ConfigError, ModelError, TokenizerError: settings or files that can't be used.
          EngineDeadError: the engine process has died.
          NotServingError: it was shut down before.
        """
        if self._state is EngineState.STOPPED:
            raise NotServingError(self._why_stopped)
        if self._started is None:
            self._started = asyncio.get_running_loop().create_future()
            await self._launch()
        await asyncio.shield(self._started)

    async def ready(self) -> None:
        """Waits until requests are taken.

        Raises:
          NotServingError: they never will be, or not any more.
        """
        try:
            await self.start()
        except (ValueError, EngineDeadError) as error:
            raise NotServingError(str(error)) from None

    async def warmed_up(self) -> None:
        """Waits until all padded shapes are compiled: from then on no request compiles anything."""
        await self.start()
        await self._warm.wait()

    async def drain(self, seconds: float) -> None:
        """Refuses new requests, waits for those under way to finish, and ends what is left after `seconds`."""
        self._set_state(EngineState.DRAINING)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)
        for stream in list(self._streams.values()):
            self.abort(stream.output.request_id)

    async def shutdown(self) -> None:
        """Ends all requests, with an error, and the engine."""
        self._why_stopped = "the engine was shut down"
        self._set_state(EngineState.STOPPED)
        self._end_start(NotServingError(self._why_stopped))
        if self._restart is not None:
            self._restart.cancel()
        self._lose_engine(self._why_stopped, keep_waiting=False)
        if self._process is not None:
            await self._process.stop()
            self._process = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.shutdown()

    # What is served.

    @property
    def state(self) -> EngineState:
        return self._state

    def on_state(self, listener: Callable[[EngineState], None]) -> None:
        """Calls `listener` with each new state."""
        self._listeners.append(listener)

    @property
    def info(self) -> EngineInfo:
        """What is served: model, sizes, number type; known once `start` has returned."""
        if self._info is None:
            raise NotServingError("the engine has not started yet")
        return self._info

    @property
    def engine_pid(self) -> int | None:
        """Process id of the engine; None while there is none."""
        return None if self._process is None else self._process.pid

    def startup_report(self) -> dict[str, Any]:
        """Seconds of the present engine's start: loading the model, and compiling by shape (so far)."""
        return {
            "model": self.served_model_name,
            "load_seconds": 0.0 if self._stats is None else self._stats.load_seconds,
            "compile_seconds": sum(self._compile_seconds.values()),
            "compile_seconds_by_shape": dict(self._compile_seconds),
        }

    # Requests.

    @property
    def num_unfinished(self) -> int:
        """Requests that have not finished."""
        return len(self._streams)

    async def tokenize(self, prompt: Prompt, *, add_special_tokens: bool = True) -> TokenizedPrompt:
        """See `Front.tokenize`; a long text is read on another thread, where it holds up nobody's tokens."""
        front = self._front
        if isinstance(prompt, str) and len(prompt) < _LONG_TEXT:
            return front.tokenize(prompt, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(front.tokenize, prompt, add_special_tokens=add_special_tokens)

    async def tokenize_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        add_special_tokens: bool = False,
        template_vars: Mapping[str, Any] | None = None,
    ) -> TokenizedPrompt:
        """See `Front.tokenize_chat`; it happens on another thread."""
        return await asyncio.to_thread(
            self._front.tokenize_chat,
            messages,
            add_generation_prompt=add_generation_prompt,
            add_special_tokens=add_special_tokens,
            template_vars=template_vars,
        )

    def check_door(self, outputs: int = 1) -> None:
        """Raises what `submit` would raise now whatever the prompt, so that a refusal costs no tokenizing.

        Args:
          outputs: that are to be submitted together.

        Raises:
          ValueError: more outputs than are ever taken together.
          QueueFullError, NotServingError: as for `submit`.
        """
        if self._state is EngineState.DRAINING:
            raise NotServingError("shutting down: no new requests are taken")
        if self._state is EngineState.STOPPED:
            raise NotServingError(self._why_stopped)
        # What runs counts, whatever the queue, so that a request that fits into an idle engine is never refused there.
        most = self.config.max_num_seqs + self.max_queued_requests
        if outputs > most:
            raise ValueError(f"{outputs} outputs are asked for together; at most {most} may be under way at once")
        if self._num_sequences + outputs > most:
            raise QueueFullError(
                f"{self._num_sequences} outputs are under way, {most} may be, and {outputs} more are asked for: try "
                "again later"
            )

    async def submit(
        self,
        prompt: Prompt | TokenizedPrompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> RequestStream:
        """Queues a prompt. Whoever submits closes the stream in the end.

        While the engine is started again, requests wait for it.

        Args:
          prompt, sampling_params, request_id, priority: as for `LLM.submit`.

        Raises:
          ValueError: a prompt, parameter or id that can't be used.
          QueueFullError: as many outputs as may wait are waiting.
          NotServingError: it is draining, was shut down, or its engine can't be started.
        """
        await self.start()
        params = self.get_default_sampling_params() if sampling_params is None else sampling_params
        self.check_door(params.n)
        if not isinstance(prompt, TokenizedPrompt):
            prompt = await self.tokenize(prompt)
            self.check_door(params.n)
        output = self._front.submit(prompt, params, request_id, priority=priority)
        stream = RequestStream(output, self._close)
        self._streams[id(output)] = stream
        self._num_sequences += len(output.outputs)
        self._idle.clear()
        return stream

    async def generate(
        self,
        prompt: Prompt | TokenizedPrompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """Completes a prompt; yields its output each time that it has grown, the last time finished.

        It is the same object each time. Cancelling the task, or closing the generator, ends the request; a loop that is
        left early closes it when it is garbage, so whoever breaks out uses `contextlib.aclosing`.

        Args:
          prompt, sampling_params, request_id, priority: as for `LLM.submit`.

        Raises:
          ValueError, QueueFullError, NotServingError: as for `submit`.
          EngineDeadError: the engine has died with the request.
        """
        stream = await self.submit(prompt, sampling_params, request_id, priority=priority)
        try:
            async for output in stream:
                errors = [one.error for one in output.outputs if one.error is not None]
                if errors:
                    raise EngineDeadError(errors[0])
                yield output
        finally:
            stream.close()

    def abort(self, request_id: str) -> bool:
        """Ends a request, whose output finishes with "abort"; returns whether one of this id was under way."""
        front = self._front
        before = front.num_unfinished
        front.abort(request_id)
        self._deliver(front.take(()))
        return front.num_unfinished < before

    # Figures.

    def load(self) -> EngineStats | None:
        """The latest figures that the engine has sent, at most a moment old while it runs; None before the first."""
        return self._stats

    async def stats(self) -> EngineStats:
        """The engine's figures now.

        Raises:
          EngineDeadError: there is no engine now.
        """
        return (await self._ask(check_integrity=False)).stats

    async def check_integrity(self) -> None:
        """Proves that pages, queues and requests agree.

        Raises:
          RuntimeError: they don't.
          EngineDeadError: there is no engine now.
        """
        answer = await self._ask(check_integrity=True)
        if answer.error is not None:
            raise RuntimeError(answer.error)

    async def _ask(self, *, check_integrity: bool) -> Answer:
        await self.start()
        if self._process is None or not self._ready:
            raise EngineDeadError(self._why_stopped if self._state is EngineState.STOPPED else "the engine restarts")
        self._asked += 1
        question: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._questions[self._asked] = question
        self._process.send(Ask(self._asked, check_integrity))
        return await question

    # The engine process.

    async def _launch(self) -> None:
        self._ready = False
        self._compile_seconds = {}
        try:
            self._process = await EngineProcess.launch(self.config, self._on_message, self._on_death)
        except OSError as error:
            self._on_death(f"the engine process can't be started: {error}")

    def _on_message(self, message: object) -> None:
        match message:
            case Events(events, stats):
                self._stats = stats or self._stats
                self._deliver(self._front.take(events))
            case Compiled(name, seconds, last):
                self._compile_seconds[name] = seconds
                if last:
                    self._warm.set()
                    self._failed_starts = 0
                    self._set_state(EngineState.SERVING)
            case Answer(number):
                question = self._questions.pop(number, None)
                if question is not None and not question.done():
                    question.set_result(message)
            case Ready(info, stats):
                self._stats = stats
                self._on_ready(info)
            case StartFailed(kind, text):
                self._on_start_failed(kind, text)

    def _on_ready(self, info: EngineInfo) -> None:
        try:
            if self._text is None:
                self._text = front_of(_Sender(self), info)
        except ValueError as error:
            self._give_up(error)
            return
        self._info = info
        self._ready = True
        if self._started is not None and not self._started.done():
            self._started.set_result(None)
        self._set_state(EngineState.WARMING)
        waiting, self._waiting = self._waiting, {}
        for request in waiting.values():
            self._send_request(request)

    def _on_start_failed(self, kind: str, text: str) -> None:
        if self._info is None:
            self._give_up(_start_error(kind, text))
        else:
            _logger.error("the engine can't be started again: %s: %s", kind, text)

    def _on_death(self, reason: str) -> None:
        self._process = None
        if self._state in (EngineState.STOPPED, EngineState.DRAINING):
            self._ready = False
            self._end_start(EngineDeadError(reason))
            self._lose_engine(reason, keep_waiting=False)
            return
        if self._info is None:  # never started: the caller of `start` is told
            self._give_up(EngineDeadError(reason))
            return
        self._failed_starts += not self._warm.is_set()
        self._ready = False
        self._warm.clear()
        _logger.error("%s; %d requests end with an error", reason, len(self._streams) - len(self._waiting))
        if self._failed_starts >= _MOST_FAILED_STARTS:
            self._give_up(EngineDeadError(f"{reason}; it has failed {self._failed_starts} times in a row"))
            return
        self._lose_engine(reason, keep_waiting=True)
        self._set_state(EngineState.RESTARTING)
        self._restart = asyncio.get_running_loop().create_task(self._start_again())

    async def _start_again(self) -> None:
        if self._failed_starts:
            await asyncio.sleep(_RESTART_SECONDS * 2**self._failed_starts)
        self.restarts += 1
        await self._launch()

    def _give_up(self, error: Exception) -> None:
        """No engine any more."""
        self._why_stopped = str(error)
        self._set_state(EngineState.STOPPED)
        self._end_start(error)
        if self._process is not None:
            self._process.kill()
        self._lose_engine(str(error), keep_waiting=False)

    def _end_start(self, error: Exception) -> None:
        """Tells those who wait for the start that there will be none."""
        if self._started is not None and not self._started.done():
            self._started.set_exception(error)
            self._started.exception()  # nobody may be waiting

    def _lose_engine(self, reason: str, *, keep_waiting: bool) -> None:
        """Ends what the engine had under way, and what waits for one as well unless `keep_waiting`."""
        for question in self._questions.values():
            if not question.done():
                question.set_exception(EngineDeadError(reason))
        self._questions.clear()
        if not keep_waiting:
            self._waiting.clear()
        if self._text is not None:
            self._deliver(self._text.fail(reason, keep=self._waiting))

    def _send_request(self, request: Request) -> None:
        """Hands a request to the engine, or keeps it until there is one."""
        if self._process is not None and self._ready and self._process.is_connected:
            self._process.send(Add(request))
        else:
            self._waiting[request.request_id] = request

    def _send_abort(self, request_id: str, index: int | None) -> None:
        """Ends a request in the engine; one that waits for an engine goes when its last output has ended."""
        if request_id not in self._waiting:
            if self._process is not None:
                self._process.send(Abort(request_id, index))
        elif index is None:
            del self._waiting[request_id]

    # Both sides.

    @property
    def _front(self) -> Front:
        if self._text is None:
            raise NotServingError("the engine has not started yet")
        return self._text

    def _close(self, stream: RequestStream) -> None:
        self.abort(stream.output.request_id)

    def _deliver(self, outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            stream = self._streams.get(id(output))
            if stream is None:
                continue
            if output.finished:
                del self._streams[id(output)]
                self._num_sequences -= len(output.outputs)
            stream.wake()
        if not self._streams:
            self._idle.set()

    def _set_state(self, state: EngineState) -> None:
        # Whoever drains or stops has the last word.
        final = {EngineState.DRAINING: 1, EngineState.STOPPED: 2}
        if state is self._state or final.get(self._state, 0) > final.get(state, 0):
            return
        self._state = state
        for listener in self._listeners:
            listener(state)


class _Sender:
    """What `Front` knows as its engine."""

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm

    def add(self, request: Request) -> None:
        self._llm._send_request(request)

    def abort(self, request_id: str, index: int | None = None) -> None:
        self._llm._send_abort(request_id, index)


def _start_error(kind: str, text: str) -> Exception:
    if kind == ConfigError.__name__:
        return ConfigError(text)
    if kind == "ModelError":
        from models.errors import ModelError  # the package is slow to import, and a front needs nothing else of it

        return ModelError(text)
    return EngineDeadError(f"{kind}: {text}")
