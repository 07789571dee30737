"""The models of one server, by the names that requests give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from jaxdual.async_api import AsyncLLM
from jaxdual.engine.supervisor import EngineState
from jaxdual.errors import UnknownModelError

type Model = AsyncLLM

# Of several engines' states, the first of these is that of all together.
_WORST_FIRST = (EngineState.STARTING, EngineState.RESTARTING, EngineState.WARMING, EngineState.DRAINING)


class ServedModels:
    """What a server serves: one engine; or a default model and others, each under its name.

    Args:
      default: of requests that name no model.
      others: further ones by name, engines all of them.
    """

    def __init__(self, default: Model, others: Mapping[str, AsyncLLM] | None = None) -> None:
        self.default = default
        self._others = dict(others or {})

    @property
    def all(self) -> Sequence[Model]:
        """All models, the default one first."""
        return (self.default, *self._others.values())

    @property
    def engines(self) -> Sequence[AsyncLLM]:
        """Those that have an engine of their own."""
        return (self.default,) if not self._others else tuple(self._others.values())

    @property
    def names(self) -> Sequence[str]:
        """Names of all models, that of the default one first.

        Raises:
          NotServingError: that is known only when the engine has started.
        """
        return (self.default.served_model_name, *self._others)

    def get(self, name: str | None) -> Model:
        """The model of this name; the default one for None.

        Raises:
          UnknownModelError: there is none of this name.
          NotServingError: as for `names`.
        """
        if name is None or name == self.default.served_model_name:
            return self.default
        if name not in self._others:
            raise UnknownModelError(name, self.names)
        return self._others[name]

    # Life.

    async def ready(self) -> None:
        """Waits until requests are taken.

        Raises:
          NotServingError: they never will be, or not any more.
        """
        await self.default.ready()

    @property
    def state(self) -> EngineState:
        """That of the engine. Of several, those that have stopped for good don't count as long as others serve."""
        states = {engine.state for engine in self.engines} - {EngineState.STOPPED}
        if not states:
            return EngineState.STOPPED
        return next((state for state in _WORST_FIRST if state in states), EngineState.SERVING)

    def on_state(self, listener: Callable[[EngineState], None]) -> None:
        """Calls `listener` with `state` each time that an engine's has changed."""
        for engine in self.engines:
            engine.on_state(lambda _: listener(self.state))

    @property
    def num_unfinished(self) -> int:
        """Requests that have not finished."""
        return sum(engine.num_unfinished for engine in self.engines)
