"""Messages between a front and an engine process."""

from __future__ import annotations

from jaxdual.config import EngineConfig
from jaxdual.engine.request import Request, TokenEvent
from jaxdual.frames import Message
from jaxdual.outputs import EngineInfo, EngineStats

# From the front.


class Start(Message, frozen=True, tag=True):
    """The first message: which engine to be. Answered by `Ready` or `StartFailed`."""

    config: EngineConfig


class Add(Message, frozen=True, tag=True):
    """Queues a request. Answered by `Events`."""

    request: Request


class Abort(Message, frozen=True, tag=True):
    """Ends a request, or one of its outputs; unknown ids are ignored."""

    request_id: str
    index: int | None = None


class Ask(Message, frozen=True, tag=True):
    """Asks for `EngineStats`, after a check of all accounting if `check_integrity`. Answered by `Answer`."""

    number: int
    check_integrity: bool = False


class Stop(Message, frozen=True, tag=True):
    """The last message: end the process."""


# From the engine.


class Ready(Message, frozen=True, tag=True):
    """Requests are served from now on; shapes that are not compiled yet are compiled between them."""

    info: EngineInfo
    stats: EngineStats


class StartFailed(Message, frozen=True, tag=True):
    """No engine can be made. `kind` is the name of the error: `ConfigError`, `ModelError`, or another."""

    kind: str
    message: str


class Compiled(Message, frozen=True, tag=True):
    """A program's shape is compiled, and the seconds that it took; `last` once all are."""

    name: str
    seconds: float
    last: bool


class Events(Message, frozen=True, tag=True):
    """What a step gave; figures come along about ten times a second."""

    events: list[TokenEvent]
    stats: EngineStats | None


class Answer(Message, frozen=True, tag=True):
    """The answer to `Ask`; `error` says what the check found."""

    number: int
    stats: EngineStats
    error: str | None


class Died(Message, frozen=True, tag=True):
    """The last message of an engine that has failed: why."""

    message: str


ToEngine = Start | Add | Abort | Ask | Stop
ToFront = Ready | StartFailed | Compiled | Events | Answer | Died
