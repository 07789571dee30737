"""Errors that callers tell apart from a wrong value."""

from collections.abc import Sequence


class EngineDeadError(RuntimeError):
    """The engine has failed or was shut down; its message says why."""


class NotServingError(RuntimeError):
    """New requests are refused: shutting down, or no engine can be started; its message says which."""


class PromptTooLongError(ValueError):
    """A prompt that leaves no room for an output token."""


class QueueFullError(RuntimeError):
    """As many requests as may wait are waiting; try again later."""


class UnknownModelError(ValueError):
    """A request for a model that is not served.

    Attributes:
      name: that it gives.
      served: "'a' and 'b' are served", of the models that are.
    """

    def __init__(self, name: str, names: Sequence[str]) -> None:
        self.name = name if len(name) <= 80 else f"{name[:77]}..."
        *others, last = (repr(known) for known in names)
        self.served = f"{', '.join(others)} and {last} are served" if others else f"{last} is served"
        super().__init__(f"the model {self.name!r} does not exist; {self.served}")
