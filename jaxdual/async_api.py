"""`AsyncLLM`: many callers on an asyncio loop, one engine in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from jaxdual.cascade.gate import Gate
from jaxdual.config import MAX_QUEUED_REQUESTS, ClusterConfig, ConfigError, EngineConfig
from jaxdual.engine.request import TokenEvent
from jaxdual.engine.supervisor import EngineState, EngineSupervisor
from jaxdual.errors import EngineDeadError, NotServingError, QueueFullError
from jaxdual.front import Front, Prompt, TokenizedPrompt
from jaxdual.outputs import EngineInfo, EngineStats, RequestOutput
from jaxdual.request_stream import RequestStream
from jaxdual.sampling_params import SamplingParams
from jaxdual.served_model import ServedModel, front_of

_MOST_ENGINES_LOST = 2  # by one request, before it is taken for the cause
_LONG_TEXT = 4096  # characters from which tokenizing leaves the loop

_logger = logging.getLogger(__name__)


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
        self._init(config, None, max_queued_requests, None)

    @classmethod
    def from_config(
        cls,
        config: EngineConfig,
        *,
        cluster: ClusterConfig | None = None,
        max_queued_requests: int = MAX_QUEUED_REQUESTS,
        environment: Mapping[str, str] | None = None,
    ) -> AsyncLLM:
        """An `AsyncLLM` with this configuration; with `cluster`, one engine of many processes.

        Args:
          environment: what the engine's environment has beside this process's; not of a cluster.

        Raises:
          ConfigError: a setting that only clusters have a use for.
        """
        llm = cls.__new__(cls)
        llm._init(config, cluster, max_queued_requests, environment)
        return llm

    def _init(
        self,
        config: EngineConfig,
        cluster: ClusterConfig | None,
        max_queued_requests: int,
        environment: Mapping[str, str] | None,
    ) -> None:
        if not cluster:
            config.check_alone()
        elif config.scheduling_policy != "fcfs":
            raise ConfigError(
                f"scheduling_policy={config.scheduling_policy!r} is that of an engine by itself: a cluster takes "
                "requests first come, first served"
            )
        self.config = config
        self._most_running = config.max_num_seqs * (cluster.decode if cluster else config.num_ranks)
        self.max_queued_requests = max_queued_requests
        self._engine = EngineSupervisor(
            config,
            cluster,
            environment,
            on_ready=self._on_ready,
            on_events=self._on_events,
            on_lost=self._on_lost,
        )
        self._text: Front | None = None  # from the engine's first start on
        # By the identity of the output: an id may be in use again while its aborted owner ends.
        self._streams: dict[int, RequestStream] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    # Life.

    async def start(self) -> None:
        """Starts the engine; returns when it takes requests. Further calls wait for the first.

        Raises:
          ConfigError, ModelError, TokenizerError: settings or files that can't be used.
          EngineDeadError: the engine process has died.
          NotServingError: it was shut down before.
        """
        await self._engine.start()

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
        """Waits until all padded shapes are compiled; see `LLM.warmup`."""
        await self._engine.warmed_up()

    async def drain(self, seconds: float) -> None:
        """Refuses new requests, waits for those under way to finish, and ends what is left after `seconds`."""
        self._engine.drain()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)
        for stream in list(self._streams.values()):
            self.abort(stream.output.request_id)

    async def shutdown(self) -> None:
        """Ends all requests, with an error, and the engine."""
        await self._engine.shutdown()

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
        return self._engine.state

    def on_state(self, listener: Callable[[EngineState], None]) -> None:
        """Calls `listener` with each new state."""
        self._engine.on_state(listener)

    @property
    def info(self) -> EngineInfo:
        """What is served: model, sizes, number type; known once `start` has returned."""
        return self._engine.info

    @property
    def engine_pid(self) -> int | None:
        """Process id of the engine; None while there is none."""
        return self._engine.pid

    @property
    def restarts(self) -> int:
        """Engines started after the first."""
        return self._engine.restarts

    def startup_report(self) -> dict[str, Any]:
        """Seconds of the present engine's start: loading the model, and compiling by shape (so far)."""
        stats, by_shape = self._engine.stats, self._engine.compile_seconds
        return {
            "model": self.served_model_name,
            "load_seconds": 0.0 if stats is None else stats.load_seconds,
            "compile_seconds": sum(by_shape.values()),
            "compile_seconds_by_shape": by_shape,
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
        self._engine.check_open()
        # What runs counts, whatever the queue, so that a request that fits into an idle engine is never refused there.
        most = self._most_running + self.max_queued_requests
        if outputs > most:
            raise ValueError(f"{outputs} outputs are asked for together; at most {most} may be under way at once")
        under_way = sum(len(stream.output.outputs) for stream in self._streams.values())
        if under_way + outputs > most:
            raise QueueFullError(
                f"{under_way} outputs are under way, {most} may be, and {outputs} more are asked for: try again later"
            )

    async def submit(
        self,
        prompt: Prompt | TokenizedPrompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        user: str | None = None,
        gate: Gate | None = None,
    ) -> RequestStream:
        """Queues a prompt. Whoever submits closes the stream in the end.

        While the engine is started again, requests wait for it.

        Args:
          prompt, sampling_params, request_id, priority, user, gate: as for `LLM.submit`.

        Raises:
          ValueError: a prompt, parameter, id or user that can't be used.
          QueueFullError: as many outputs as may wait are waiting.
          NotServingError: it is draining, was shut down, or its engine can't be started.
        """
        await self.start()
        params = self.get_default_sampling_params() if sampling_params is None else sampling_params
        self.check_door(params.n)
        if not isinstance(prompt, TokenizedPrompt):
            prompt = await self.tokenize(prompt)
            self.check_door(params.n)
        output = self._front.submit(prompt, params, request_id, priority=priority, user=user, gate=gate)
        stream = RequestStream(output, self._close)
        self._streams[id(output)] = stream
        self._idle.clear()
        return stream

    async def generate(
        self,
        prompt: Prompt | TokenizedPrompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        user: str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Completes a prompt; yields its output each time that it has grown, the last time finished.

        It is the same object each time. Cancelling the task, or closing the generator, ends the request; a loop that is
        left early closes it when it is garbage, so whoever breaks out uses `contextlib.aclosing`.

        Args:
          prompt, sampling_params, request_id, priority, user: as for `LLM.submit`.

        Raises:
          ValueError, QueueFullError, NotServingError: as for `submit`.
          EngineDeadError: the engine has died with the request.
        """
        stream = await self.submit(prompt, sampling_params, request_id, priority=priority, user=user)
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
        return self._engine.stats

    async def stats(self) -> EngineStats:
        """The engine's figures now.

        Raises:
          EngineDeadError: there is no engine now.
        """
        return (await self._engine.ask(check_integrity=False)).stats

    async def check_integrity(self) -> None:
        """Proves that pages, queues and requests agree.

        Raises:
          RuntimeError: they don't.
          EngineDeadError: there is no engine now.
        """
        answer = await self._engine.ask(check_integrity=True)
        if answer.error is not None:
            raise RuntimeError(answer.error)

    async def use_path_mode(self, mode: str) -> None:
        """Has a cluster whose engines share a store go on in another path mode, see `ClusterConfig.path_mode`.

        Raises:
          ValueError: no such mode, requests are under way, or there is no such cluster.
          EngineDeadError: there is no engine now.
        """
        await self._engine.use_mode(mode)

    # What the engine says.

    def _on_ready(self, info: EngineInfo) -> None:
        if self._text is None:
            self._text = front_of(self._engine, info)

    def _on_events(self, events: Sequence[TokenEvent]) -> None:
        self._deliver(self._front.take(events))

    def _on_lost(self, reason: str, goes_on: bool) -> None:
        if self._text is None:
            return
        if goes_on:
            self._text.resume(_MOST_ENGINES_LOST, keep=self._engine.waiting)
        ended = self._text.fail(reason, keep=self._engine.waiting)
        if ended:
            _logger.error("%s: %d requests end with an error: %s", self.served_model_name, len(ended), reason)
        self._deliver(ended)

    # Streams.

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
            stream.wake()
        if not self._streams:
            self._idle.set()
