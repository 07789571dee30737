"""The models of one server, by the names that requests give."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from jaxdual.async_api import AsyncLLM
from jaxdual.cascade.options import CascadeOptions, CascadeRequestError
from jaxdual.cascade.serving.prompt import CascadePrompt
from jaxdual.cascade.serving.service import CascadeLLM
from jaxdual.engine.supervisor import EngineState
from jaxdual.errors import UnknownModelError
from jaxdual.front import Prompt, TokenizedPrompt
from jaxdual.request_stream import AnswerStream
from jaxdual.sampling_params import SamplingParams

type Model = AsyncLLM | CascadeLLM


class ServedModels:
    """What a server serves: one engine; or a cascade, and each of its tiers that has an engine under its own name.

    Args:
      default: of requests that name no model.
    """

    def __init__(self, default: Model) -> None:
        self.default = default
        self._tiers = default.engines if isinstance(default, CascadeLLM) else {}

    @property
    def all(self) -> Sequence[Model]:
        """All models, the default one first."""
        return (self.default, *self._tiers.values())

    @property
    def engines(self) -> Sequence[AsyncLLM]:
        """Those that have an engine of their own."""
        return (self.default,) if not isinstance(self.default, CascadeLLM) else tuple(self._tiers.values())

    @property
    def names(self) -> Sequence[str]:
        """Names of all models, that of the default one first.

        Raises:
          NotServingError: that is known only when the engine has started.
        """
        return (self.default.served_model_name, *self._tiers)

    def get(self, name: str | None) -> Model:
        """The model of this name; the default one for None.

        Raises:
          UnknownModelError: there is none of this name.
          NotServingError: as for `names`.
        """
        if name is None or name == self.default.served_model_name:
            return self.default
        if name not in self._tiers:
            raise UnknownModelError(name, self.names)
        return self._tiers[name]

    def tokenizing(self, name: str | None) -> AsyncLLM:
        """An engine with the tokenizer of the model of this name.

        Raises:
          UnknownModelError, NotServingError: as for `get`.
          TokenizerError: a cascade whose tiers have different ones.
        """
        model = self.get(name)
        return model.tokenizing_engine() if isinstance(model, CascadeLLM) else model

    # Life.

    async def ready(self) -> None:
        """Waits until requests are taken.

        Raises:
          NotServingError: they never will be, or not any more.
        """
        await self.default.ready()

    @property
    def state(self) -> EngineState:
        """That of the default model."""
        return self.default.state

    def on_state(self, listener: Callable[[EngineState], None]) -> None:
        """Calls `listener` with `state` each time that an engine's has changed."""
        self.default.on_state(listener)

    @property
    def num_unfinished(self) -> int:
        """Requests that have not finished."""
        return sum(engine.num_unfinished for engine in self.engines)


async def submit(
    model: Model,
    prompt: Prompt | TokenizedPrompt | CascadePrompt,
    params: SamplingParams,
    request_id: str | None = None,
    *,
    priority: int = 0,
    user: str | None = None,
    options: CascadeOptions | None = None,
    left_open: Collection[str] = (),
) -> AnswerStream:
    """Asks a model, whatever it is.

    Args:
      model: what is asked.
      prompt: what its `tokenize` has made of one, or what both take as it is.
      params, request_id, priority, user: see `AsyncLLM.submit`.
      options, left_open: see `CascadeLLM.submit`.

    Raises:
      CascadeRequestError: options for what is no cascade.
      ValueError, QueueFullError, NotServingError, EngineDeadError: as for the model's own `submit`.
    """
    if isinstance(model, CascadeLLM):
        return await model.submit(
            prompt, params, request_id, priority=priority, user=user, options=options, left_open=left_open
        )
    if options is not None:
        raise CascadeRequestError(f"cascade: {model.served_model_name!r} is one model, and no cascade")
    return await model.submit(prompt, params, request_id, priority=priority, user=user)  # type: ignore[arg-type]
