"""`CascadeLLM`: several models as one, the smallest that is sure enough of a prompt answers it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import itertools
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from jaxdual.async_api import AsyncLLM
from jaxdual.cascade.config import CascadeConfig, ExternalTier, LocalTier
from jaxdual.cascade.decision import Decision
from jaxdual.cascade.gate import Gate
from jaxdual.cascade.options import CascadeOptions, CascadeRequestError, ConfidenceSpec
from jaxdual.cascade.serving.asking import ask, told
from jaxdual.cascade.serving.external import RemoteTier
from jaxdual.cascade.serving.prompt import CascadePrompt, ChatPrompt, PlainPrompt
from jaxdual.cascade.serving.route import Route
from jaxdual.cascade.serving.stream import CascadeStream, UnderWay
from jaxdual.cascade.serving.tiers import EngineTier, Question, Tier
from jaxdual.config import MAX_QUEUED_REQUESTS, ConfigError, EngineConfig
from jaxdual.engine.supervisor import EngineState
from jaxdual.errors import NotServingError, QueueFullError
from jaxdual.front import Prompt, TokenizedPrompt
from jaxdual.sampling_params import RECOMMENDED_SAMPLING, SamplingParams
from jaxdual.tokenizer import Tokenizer, TokenizerError

# Of several engines' states, the first of these is that of all together.
_WORST_FIRST = (EngineState.STARTING, EngineState.RESTARTING, EngineState.WARMING, EngineState.DRAINING)


class CascadeLLM:
    """Several models with the surface of an `AsyncLLM`. It belongs to one loop; `async with` starts and stops it.

    Args:
      config: tiers and bounds.
      engines: of the tiers that have one, by their names.

    Raises:
      ConfigError: a tier without an engine.
    """

    def __init__(self, config: CascadeConfig, engines: Mapping[str, AsyncLLM]) -> None:
        missing = [tier.name for tier in config.local if tier.name not in engines]
        if missing:
            raise ConfigError(f"tier {missing[0]!r} has no engine")
        self.config = config
        self.engines = {tier.name: engines[tier.name] for tier in config.local}
        self._tiers: list[Tier] = [
            RemoteTier(tier) if isinstance(tier, ExternalTier) else EngineTier(tier, engines[tier.name])
            for tier in config.tiers
        ]
        self._default_gates: list[Gate | None] | None = None  # until the engines have started
        self._one_tokenizer: bool | None = None  # likewise
        self._under_way: dict[str, UnderWay] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._state_listeners: list[Callable[[EngineState], None]] = []
        self._decision_listeners: list[Callable[[Decision], None]] = []
        self._numbers = itertools.count()
        for engine in self.engines.values():
            engine.on_state(lambda _: self._tell_state())

    @classmethod
    def from_config(cls, config: CascadeConfig, max_queued_requests: int = MAX_QUEUED_REQUESTS) -> CascadeLLM:
        """A cascade with an engine for each tier that has a model of its own.

        Raises:
          ConfigError: a setting that an engine by itself has no use for.
        """
        return cls(config, {tier.name: _engine_of(tier, max_queued_requests) for tier in config.local})

    # Life.

    async def start(self) -> None:
        """Starts all engines; returns when all take requests.

        Raises:
          ConfigError: a tier can't have a gate, or its tokenizer has no token for a letter.
          ModelError, TokenizerError, EngineDeadError, NotServingError: as for `AsyncLLM.start`.
        """
        await asyncio.gather(*(_start(name, engine) for name, engine in self.engines.items()))
        self._resolve()

    async def ready(self) -> None:
        """Waits until all tiers take requests that ever will.

        Raises:
          NotServingError: none will, or not any more.
        """
        self._check_open()
        if self._default_gates is not None and self.state is not EngineState.STOPPED:
            return
        results = await asyncio.gather(*(engine.ready() for engine in self.engines.values()), return_exceptions=True)
        errors = [result for result in results if isinstance(result, BaseException)]
        if len(errors) == len(results):
            raise errors[-1]
        if self._default_gates is None:
            try:
                self._resolve()
            except ValueError as error:
                raise NotServingError(str(error)) from None

    async def warmed_up(self) -> None:
        """Waits until all engines have compiled all shapes."""
        await self.start()
        await asyncio.gather(*(engine.warmed_up() for engine in self.engines.values()))

    async def drain(self, seconds: float) -> None:
        """Refuses new requests, waits for those under way to finish, and ends what is left after `seconds`.

        Tiers go on until then, for requests under way may still be handed on.
        """
        self._draining = True
        self._tell_state()
        deadline = time.monotonic() + seconds
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)
        for request_id in list(self._under_way):
            self.abort(request_id)
        left = max(0.0, deadline - time.monotonic())
        await asyncio.gather(*(engine.drain(left) for engine in self.engines.values()))

    async def shutdown(self) -> None:
        """Ends all requests, with an error, and all engines."""
        self._draining = True
        await asyncio.gather(*(engine.shutdown() for engine in self.engines.values()))
        for tier in self._tiers:
            if isinstance(tier, RemoteTier):
                await tier.close()

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
        """The least ready state of its engines; those that have stopped for good don't count while others run."""
        states = {engine.state for engine in self.engines.values()} - {EngineState.STOPPED}
        if not states:
            return EngineState.STOPPED
        if self._draining:
            return EngineState.DRAINING
        return next((state for state in _WORST_FIRST if state in states), EngineState.SERVING)

    def on_state(self, listener: Callable[[EngineState], None]) -> None:
        """Calls `listener` with `state` each time that an engine's has changed."""
        self._state_listeners.append(listener)

    def on_decision(self, listener: Callable[[Decision], None]) -> None:
        """Calls `listener` with the decision on each request that has ended."""
        self._decision_listeners.append(listener)

    @property
    def served_model_name(self) -> str:
        """The cascade's name in responses."""
        return self.config.name

    @property
    def tier_names(self) -> Sequence[str]:
        """Names of all tiers, smallest first."""
        return [tier.name for tier in self.config.tiers]

    @property
    def system_fingerprint(self) -> str:
        """Identifies the models of all tiers and what decides between them."""
        # Names, models and thresholds; not where they lie, on what they run or what they cost.
        parts = [
            repr(dataclasses.replace(tier, engine=EngineConfig(), memory_fraction=1.0, prices=None))
            + f"{self.engines[tier.name].system_fingerprint} {tier.has_probe}"
            if isinstance(tier, LocalTier)
            else f"{tier.name} {tier.url} {tier.model}"
            for tier in self.config.tiers
        ]
        bounds = (self.config.max_hops, self.config.skip_if_pik_below, self.config.confidence)
        return f"fp_{hashlib.blake2b(repr((parts, bounds)).encode(), digest_size=8).hexdigest()}"

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and output together, of the tier that takes most: smaller ones are passed over."""
        return max(engine.max_model_len for engine in self.engines.values())

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer of all tiers.

        Raises:
          TokenizerError: they have different ones.
        """
        return self.tokenizing_engine().get_tokenizer()

    def tokenizing_engine(self) -> AsyncLLM:
        """An engine that makes the same tokens of a text as all others do.

        Raises:
          NotServingError: that is known only when all have started.
          TokenizerError: there is none.
        """
        if self._one_tokenizer is None:
            raise NotServingError("the engines have not started yet")
        if not self._one_tokenizer:
            raise TokenizerError(
                f"the tiers of {self.config.name!r} have different tokenizers; name one of {', '.join(self.engines)}"
            )
        return next(iter(self.engines.values()))

    def tokenizer_of(self, tier: str) -> Tokenizer | None:
        """That of a tier; None if it has none, or is not here."""
        try:
            return self.engines[tier].get_tokenizer() if tier in self.engines else None
        except TokenizerError:
            return None

    def get_default_sampling_params(self) -> SamplingParams:
        """Parameters of requests that set none; each tier's own recommendations take their place in `submit`."""
        return SamplingParams()

    def startup_report(self) -> dict[str, Any]:
        """`AsyncLLM.startup_report` of all engines, shapes with their tier's name."""
        reports = {name: engine.startup_report() for name, engine in self.engines.items()}
        return {
            "model": self.config.name,
            "load_seconds": sum(report["load_seconds"] for report in reports.values()),
            "compile_seconds": sum(report["compile_seconds"] for report in reports.values()),
            "compile_seconds_by_shape": {
                f"{name}: {shape}": seconds
                for name, report in reports.items()
                for shape, seconds in report["compile_seconds_by_shape"].items()
            },
        }

    # Requests.

    @property
    def num_unfinished(self) -> int:
        """Requests that have not finished."""
        return len(self._under_way)

    async def tokenize(self, prompt: Prompt, *, add_special_tokens: bool = True) -> CascadePrompt:
        """The prompt as it is: each tier that is asked makes its own tokens of it."""
        return PlainPrompt(prompt, add_special_tokens)

    async def tokenize_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        add_special_tokens: bool = False,
        template_vars: Mapping[str, Any] | None = None,
    ) -> CascadePrompt:
        """Likewise a conversation."""
        return ChatPrompt(messages, add_generation_prompt, add_special_tokens, template_vars or {})

    def check_door(self, outputs: int = 1) -> None:
        """Raises what `submit` would raise now whatever the prompt.

        Raises:
          ValueError, QueueFullError, NotServingError: as every tier's `AsyncLLM.check_door`.
        """
        self._check_open()
        errors: list[Exception] = []
        for tier in self._tiers:
            try:
                return tier.check_door(outputs)
            except (ValueError, QueueFullError, NotServingError) as error:
                errors.append(error)
        raise told(errors)

    async def submit(
        self,
        prompt: Prompt | TokenizedPrompt | CascadePrompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        user: str | None = None,
        options: CascadeOptions | None = None,
        left_open: Collection[str] = (),
    ) -> CascadeStream:
        """Asks tiers until one answers. Whoever submits closes the stream in the end.

        Cancelling it ends the request in the tier that it is in.

        Args:
          prompt, sampling_params, request_id, priority, user: as for `AsyncLLM.submit`; every tier sees the prompt as
            it came. Token ids are taken where all tiers have the same tokenizer.
          options: what the request asks of the cascade.
          left_open: fields of the parameters for which each tier's model may recommend values.

        Returns:
          The answer's stream, with its first token there.

        Raises:
          ValueError: a prompt, parameter, option or id that can't be used.
          QueueFullError, NotServingError, EngineDeadError: no tier can answer.
        """
        await self.ready()
        if sampling_params is None:
            sampling_params, left_open = SamplingParams(), RECOMMENDED_SAMPLING
        if not isinstance(prompt, (PlainPrompt, ChatPrompt)):
            prompt = PlainPrompt(prompt)
        options = options or CascadeOptions()
        self.check(prompt, sampling_params)
        request_id = self._new_id(request_id)
        question = Question(prompt, sampling_params, left_open, request_id, priority, user)
        route = Route(
            self.tier_names,
            self._gates(options.confidence(self.config.confidence)),
            max_hops=_least(self.config.max_hops, options.max_hops),
            skip_if_pik_below=self.config.skip_if_pik_below,
        )
        under_way = self._under_way[request_id] = UnderWay(time.monotonic())
        self._idle.clear()
        try:
            return await ask(self._tiers, question, route, under_way, self._ended)
        except BaseException:
            self._forget(request_id)
            self._tell_decision(route.ended())
            raise

    def abort(self, request_id: str) -> bool:
        """Ends a request, whose output finishes with "abort"; returns whether one of this id was under way."""
        under_way = self._under_way.get(request_id)
        if under_way is None:
            return False
        under_way.abort()
        return True

    # The way of a request.

    def _ended(self, stream: CascadeStream) -> None:
        self._forget(stream.output.request_id)
        if stream.output.decision is not None:
            self._tell_decision(stream.output.decision)

    def _tell_decision(self, decision: Decision) -> None:
        for listener in self._decision_listeners:
            listener(decision)

    def _forget(self, request_id: str) -> None:
        self._under_way.pop(request_id, None)
        if not self._under_way:
            self._idle.set()

    def _new_id(self, request_id: str | None) -> str:
        if request_id is None:
            return f"{self.config.name}-{next(self._numbers)}"
        if request_id in self._under_way:
            raise ValueError(f"request_id={request_id!r} is in use")
        return request_id

    def check(self, prompt: CascadePrompt, params: SamplingParams) -> None:
        """Raises `ValueError` for what no cascade, or not this one, can do."""
        name = self.config.name
        if not isinstance(params, SamplingParams):
            raise ValueError(f"sampling parameters must be SamplingParams, not {type(params).__name__}")
        if params.n != 1:
            raise ValueError(f"n={params.n} must be 1 for {name!r}: one tier gives one answer")
        for field in ("dysco", "prompt_logprobs"):
            if getattr(params, field) is not None:
                raise ValueError(f"{field} is that of one model; {name!r} is a cascade: name one of its tiers")
        if isinstance(self.config.tiers[-1], ExternalTier):
            has_tools = isinstance(prompt, ChatPrompt) and bool(prompt.template_vars.get("tools"))
            for field, given in (("logprobs", params.logprobs is not None), ("tools", has_tools)):
                if given:
                    raise ValueError(f"{field}: the last tier of {name!r} is elsewhere and gives text only")
        if self._one_tokenizer:
            return
        if isinstance(prompt, PlainPrompt) and prompt.text is None:
            raise ValueError(f"a prompt of token ids needs tiers with one tokenizer, and those of {name!r} differ")
        for field in ("stop_token_ids", "logit_bias"):
            if getattr(params, field):
                raise ValueError(f"{field} needs tiers with one tokenizer, and those of {name!r} differ")

    def _check_open(self) -> None:
        if self._draining:
            raise NotServingError("shutting down: no new requests are taken")

    # Gates.

    def _gates(self, spec: ConfidenceSpec) -> list[Gate | None]:
        if spec == self.config.confidence and self._default_gates is not None:
            return self._default_gates
        try:
            return [*(tier.gate(spec) for tier in self._tiers[:-1]), None]
        except ValueError as error:
            raise CascadeRequestError(f"cascade: {error}") from None

    def _resolve(self) -> None:
        """Looks at the engines once, when they have started."""
        for name in (tier.name for tier in self.config.gated):
            refusal = self.engines[name].info.gate_refusal
            if refusal:
                raise ConfigError(f"tier {name!r} can't have a gate: {refusal}")
        try:
            self._default_gates = self._gates(self.config.confidence)
        except ValueError as error:
            raise ConfigError(str(error).removeprefix("cascade: ")) from None
        names = {_tokenizer_name(engine) for engine in self.engines.values()}
        self._one_tokenizer = len(names) == 1 and len(self.engines) == len(self._tiers)

    def _tell_state(self) -> None:
        for listener in self._state_listeners:
            listener(self.state)


async def _start(name: str, engine: AsyncLLM) -> None:
    try:
        await engine.start()
    except ValueError as error:
        raise type(error)(f"tier {name!r}: {error}") from None


def _engine_of(tier: LocalTier, max_queued_requests: int) -> AsyncLLM:
    # XLA takes three quarters of a device for the first process that comes, unless it is told how much.
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{tier.memory_fraction:.3f}"}
    return AsyncLLM.from_config(tier.engine, max_queued_requests=max_queued_requests, environment=environment)


def _tokenizer_name(engine: AsyncLLM) -> str:
    try:
        return engine.get_tokenizer().fingerprint
    except TokenizerError:
        return f"none, of {engine.info.vocab_size} tokens"


def _least(*values: int | None) -> int | None:
    given = [value for value in values if value is not None]
    return min(given) if given else None
