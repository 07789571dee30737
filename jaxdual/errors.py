"""What callers are told when a request can't be served now, though nothing is wrong with it."""


class EngineDeadError(RuntimeError):
    """The engine has failed or was shut down; its message says why."""


class NotServingError(RuntimeError):
    """New requests are refused: shutting down, or no engine can be started; its message says which."""


class QueueFullError(RuntimeError):
    """As many requests as may wait are waiting; try again later."""
