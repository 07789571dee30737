"""A cascade for callers without an asyncio loop: what batch jobs need of an `LLM`."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jaxdual.cascade.options import CascadeOptions
from jaxdual.cascade.serving.prompt import CascadePrompt, ChatPrompt, PlainPrompt
from jaxdual.cascade.serving.service import CascadeLLM
from jaxdual.config import EngineConfig
from jaxdual.errors import EngineDeadError, NotServingError, QueueFullError
from jaxdual.front import Prompt
from jaxdual.outputs import CompletionOutput, EngineStats, RequestMetrics, RequestOutput
from jaxdual.sampling_params import SamplingParams
from jaxdual.tokenizer import Tokenizer

_LONGEST_STEP = 0.1  # seconds: callers show progress between two steps, and look whether they were interrupted


class BlockingCascade:
    """Runs a `CascadeLLM` whenever it is called, in the calling thread; its engines run all the time.

    Args:
      cascade: not started yet.

    Raises:
      ConfigError, ModelError, TokenizerError, EngineDeadError: it can't be started.
    """

    def __init__(self, cascade: CascadeLLM) -> None:
        self.cascade = cascade
        self._loop = asyncio.new_event_loop()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._finished: list[RequestOutput] = []
        self._refusals: dict[str, ValueError] = {}
        self._news = asyncio.Event()
        try:
            self._loop.run_until_complete(cascade.start())
        except BaseException:
            self.close()
            raise

    @property
    def config(self) -> EngineConfig:
        """Settings of the smallest tier's engine, which sees every request."""
        return self.cascade.config.local[0].engine

    @property
    def served_model_name(self) -> str:
        """The cascade's name in responses."""
        return self.cascade.served_model_name

    @property
    def system_fingerprint(self) -> str:
        """See `CascadeLLM.system_fingerprint`."""
        return self.cascade.system_fingerprint

    def get_default_sampling_params(self) -> SamplingParams:
        """See `CascadeLLM.get_default_sampling_params`."""
        return self.cascade.get_default_sampling_params()

    def tokenizer_of(self, output: RequestOutput) -> Tokenizer | None:
        """That of the tier that has answered; None if it has none, or is not here."""
        return None if output.decision is None else self.cascade.tokenizer_of(output.decision.tier)

    def tokenize(self, prompt: Prompt, *, add_special_tokens: bool = True) -> CascadePrompt:
        """See `CascadeLLM.tokenize`."""
        return PlainPrompt(prompt, add_special_tokens)

    def tokenize_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        add_special_tokens: bool = False,
        template_vars: Mapping[str, Any] | None = None,
    ) -> CascadePrompt:
        """See `CascadeLLM.tokenize_chat`."""
        return ChatPrompt(messages, add_generation_prompt, add_special_tokens, template_vars or {})

    def submit(
        self,
        prompt: CascadePrompt,
        params: SamplingParams,
        request_id: str,
        *,
        user: str | None = None,
        options: CascadeOptions | None = None,
        left_open: Collection[str] = (),
    ) -> None:
        """Queues a prompt; `step` works on it.

        Raises:
          ValueError: parameters that a cascade can't have. What else can't be used `refusal` tells later.
        """
        self.cascade.check(prompt, params)
        if request_id in self._tasks:
            raise ValueError(f"request_id={request_id!r} is in use")
        work = self._answer(prompt, params, request_id, user, options, left_open)
        self._tasks[request_id] = self._loop.create_task(work)

    def step(self) -> list[RequestOutput]:
        """Runs until a request has finished, or for a moment; returns those that have."""
        if not self._finished:
            self._loop.run_until_complete(self._wait())
        finished, self._finished = self._finished, []
        self._news.clear()
        return finished

    def refusal(self, output: RequestOutput) -> ValueError | None:
        """What was wrong with the request of an output that has ended with an error; None where it was not to blame."""
        return self._refusals.pop(output.request_id, None)

    def abort(self, request_id: str) -> None:
        """Ends a request, of which nothing more is heard. Unknown ids are ignored."""
        task = self._tasks.pop(request_id, None)
        if task is not None:
            task.cancel()

    def warmup(self) -> None:
        """Waits until all engines have compiled all shapes."""
        self._loop.run_until_complete(self.cascade.warmed_up())

    def stats(self) -> EngineStats:
        """Tokens of all engines since their start, by their latest figures."""
        loads = [load for engine in self.cascade.engines.values() if (load := engine.load()) is not None]
        return EngineStats(
            prompt_tokens=sum(load.prompt_tokens for load in loads),
            generation_tokens=sum(load.generation_tokens for load in loads),
        )

    def close(self) -> None:
        """Ends all requests and engines. Calling it again does nothing."""
        if self._loop.is_closed():
            return
        self._loop.run_until_complete(self._end(list(self._tasks.values())))
        self._loop.close()

    async def _end(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.cascade.shutdown()

    async def _wait(self) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), _LONGEST_STEP)

    async def _answer(
        self,
        prompt: CascadePrompt,
        params: SamplingParams,
        request_id: str,
        user: str | None,
        options: CascadeOptions | None,
        left_open: Collection[str],
    ) -> None:
        arrival = time.monotonic()
        try:
            stream = await self.cascade.submit(
                prompt, params, request_id, user=user, options=options, left_open=left_open
            )
            try:
                async for _ in stream:
                    pass
            finally:
                stream.close()
            output = stream.output
        except (ValueError, QueueFullError, NotServingError, EngineDeadError) as error:
            if isinstance(error, ValueError):
                self._refusals[request_id] = error
            completion = CompletionOutput(0, finish_reason="error", error=str(error))
            output = RequestOutput(request_id, None, [], [completion], RequestMetrics(arrival), finished=True)
        self._tasks.pop(request_id, None)
        self._finished.append(output)
        self._news.set()
