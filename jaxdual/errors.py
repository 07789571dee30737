"""Errors that callers tell apart from a wrong value."""


class EngineDeadError(RuntimeError):
    """The engine has failed or was shut down; its message says why."""


class NotServingError(RuntimeError):
    """New requests are refused: shutting down, or no engine can be started; its message says which."""


class PromptTooLongError(ValueError):
    """A prompt that leaves no room for an output token."""


class QueueFullError(RuntimeError):
    """As many requests as may wait are waiting; try again later."""
