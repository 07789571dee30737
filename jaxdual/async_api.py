"""`AsyncLLM`: many callers on an asyncio loop, one engine on a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from jaxdual.api import LLM
from jaxdual.errors import EngineDeadError
from jaxdual.front import Prompt
from jaxdual.outputs import EngineStats, RequestOutput
from jaxdual.sampling_params import SamplingParams
from jaxdual.tokenizer import Tokenizer

type _Listener = Callable[[RequestOutput | EngineDeadError], None]


class AsyncLLM:
    """`LLM` for asyncio. Start it inside a running loop or outside; call it from any loop or thread.

    Args:
      model, settings: as for `LLM`.

    Raises:
      ConfigError, ModelError, TokenizerError: as for `LLM`.
    """

    def __init__(self, model: str | Path | None = None, **settings: Any) -> None:
        self._llm = LLM(model, **settings)
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        # By the identity of the output: a caller may use an id again while an aborted request of that id ends.
        self._listeners: dict[int, tuple[RequestOutput, _Listener]] = {}
        self._stopping = False
        self._dead: EngineDeadError | None = None
        self._thread = threading.Thread(target=self._run, name="jaxdual-engine", daemon=True)
        self._thread.start()

    def get_tokenizer(self) -> Tokenizer:
        """See `LLM.get_tokenizer`."""
        return self._llm.get_tokenizer()

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """Completes a prompt; yields its output so far each time that it has grown, the last time finished.

        Leaving the loop early, or cancelling the task, ends the request.

        Args:
          prompt, sampling_params, request_id, priority: as for `LLM.submit`.

        Raises:
          ValueError: a prompt, parameter or id that can't be used.
          EngineDeadError: the engine has failed or was shut down.
        """
        loop = asyncio.get_running_loop()
        outputs: asyncio.Queue[RequestOutput | EngineDeadError] = asyncio.Queue()

        def listen(output: RequestOutput | EngineDeadError) -> None:
            with contextlib.suppress(RuntimeError):  # the caller's loop was closed: nobody listens any more
                loop.call_soon_threadsafe(outputs.put_nowait, output)

        # Away from the engine's thread, where a long text would hold up everybody's tokens.
        tokenized = await asyncio.to_thread(self._llm.tokenize, prompt)

        def submit() -> RequestOutput:
            output = self._llm.submit(tokenized, sampling_params, request_id, priority=priority)
            self._listeners[id(output)] = output, listen
            return output

        submitted = self._call(submit)
        finished = False
        try:
            # Shielded: a caller that is cancelled now still has a request to end.
            await asyncio.shield(asyncio.wrap_future(submitted))
            while not finished:
                output = await outputs.get()
                if isinstance(output, EngineDeadError):
                    raise output
                finished = output.finished
                yield output
        finally:
            if not finished:
                self._commands.put(lambda: self._end(submitted))

    async def abort(self, request_id: str) -> None:
        """Ends a request; its `generate` yields a last output with "abort". Unknown ids are ignored."""
        await asyncio.wrap_future(self._call(lambda: self._llm.abort(request_id)))

    async def warmup(self) -> None:
        """See `LLM.warmup`; requests wait meanwhile."""
        await asyncio.wrap_future(self._call(self._llm.warmup))

    async def stats(self) -> EngineStats:
        """See `LLM.stats`."""
        return await asyncio.wrap_future(self._call(self._llm.stats))

    async def check_integrity(self) -> None:
        """See `LLM.check_integrity`."""
        await asyncio.wrap_future(self._call(self._llm.check_integrity))

    def shutdown(self) -> None:
        """Ends all requests and the engine's thread."""
        self._commands.put(self._stop)
        self._thread.join()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.shutdown)

    def _call[T](self, function: Callable[[], T]) -> Future[T]:
        """Runs a function on the engine's thread, between two steps."""
        future: Future[T] = Future()

        def command() -> None:
            if not future.set_running_or_notify_cancel():
                return
            if self._dead is not None:
                future.set_exception(self._dead)
                return
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        self._commands.put(command)
        if self._dead is not None:  # its thread may have looked at the queue for the last time
            self._run_commands(wait=False)
        return future

    def _end(self, submitted: Future[RequestOutput]) -> None:
        """Ends a request whose caller has left, unless it was refused or has finished."""
        if submitted.exception() is None and self._listeners.pop(id(submitted.result()), None) is not None:
            self._llm.abort(submitted.result().request_id)

    def _stop(self) -> None:
        self._stopping = True

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._run_commands(wait=not self._llm.has_unfinished)
                if not self._stopping and self._llm.has_unfinished:
                    self._deliver(self._llm.step())
            self._dead = EngineDeadError("the engine was shut down")
        except Exception as error:
            self._dead = error if isinstance(error, EngineDeadError) else EngineDeadError(str(error))
        for _, listen in self._listeners.values():
            listen(self._dead)
        self._listeners.clear()
        self._run_commands(wait=False)

    def _run_commands(self, *, wait: bool) -> None:
        while True:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return
            command()
            wait = False

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            _, listen = self._listeners.get(id(output), (None, None))
            if listen is None:
                continue
            if output.finished:
                del self._listeners[id(output)]
            listen(output.snapshot())
