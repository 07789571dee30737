"""Messages between a front and an engine process."""

from __future__ import annotations

from jaxdual.config import ClusterConfig, EngineConfig
from jaxdual.engine.cluster_part import ClusterPart
from jaxdual.engine.request import Hits, Request, Target, TokenEvent
from jaxdual.frames import Message
from jaxdual.outputs import EngineInfo, EngineStats

# From the front.


class Start(Message, frozen=True, tag=True):
    """The first message: which engine to be, or which cluster. Answered by `Ready` or `StartFailed`.

    Attributes:
      cluster: of a cluster: which engines.
      part: of an engine: what it is to its cluster.
    """

    config: EngineConfig
    cluster: ClusterConfig = ClusterConfig()
    part: ClusterPart | None = None


class Add(Message, frozen=True, tag=True):
    """Queues a request. Answered by `Events`."""

    request: Request


class Prefill(Message, frozen=True, tag=True):
    """Queues a request, and has the keys and values of its prompt written to `target`. Answered by `HandedOff`, beside
    `Events`.

    Attributes:
      hits: what is read from the store; an engine that holds all layers looks for itself.
      moves: False reads and writes nothing, takes hits for read and gives tokens of no meaning: it shows how fast
        computing alone is.
    """

    request: Request
    target: Target
    hits: Hits = Hits()
    moves: bool = True


class Expect(Message, frozen=True, tag=True):
    """Reserves memory for the keys and values of a prompt of so many tokens, which `peer` will write. Answered by
    `Granted`, and by `HitsRead` where there are keys.

    Attributes:
      keys: of blocks that this engine reads from the store, neighbours.
      first: number of the first of them.
    """

    request_id: str
    tokens: int
    peer: str
    keys: tuple[bytes, ...] = ()
    first: int = 0


class HitsRead(Message, frozen=True, tag=True):
    """So many of the stored blocks of a prompt that an engine was to read are in its memory; the rest are not, and it
    reads no more for it. Comes from either engine; that of the decode engine is handed on to the prefill engine.
    """

    request_id: str
    blocks: int


class Adopt(Message, frozen=True, tag=True):
    """Queues a request whose prompt has been written.

    Attributes:
      stored: leading blocks of it that are in the store already.
      moved: see `Prefill.moves`.
    """

    request: Request
    stored: int
    moved: bool = True


class Forget(Message, frozen=True, tag=True):
    """What was expected is not wanted any more; unknown ids are ignored."""

    request_id: str


class Settled(Message, frozen=True, tag=True):
    """Nothing of what was expected will be written any more, and it is not complete; unknown ids are ignored. `broken`
    as of `HandedOff`.
    """

    request_id: str
    broken: bool = False


class PeerDied(Message, frozen=True, tag=True):
    """The engine whose KV agent has this address is dead."""

    peer: str


class Abort(Message, frozen=True, tag=True):
    """Ends a request, or one of its outputs; unknown ids are ignored."""

    request_id: str
    index: int | None = None


class UseMode(Message, frozen=True, tag=True):
    """Has a cluster, or its prefill engines, go on in another path mode; nothing may be under way. Answered by
    `Answer`, whose `error` says why it can't.
    """

    number: int
    mode: str


class Ask(Message, frozen=True, tag=True):
    """Asks for `EngineStats`, after a check of all accounting if `check_integrity`. Answered by `Answer`."""

    number: int
    check_integrity: bool = False


class Stop(Message, frozen=True, tag=True):
    """The last message: end the process."""


# From the engine.


class Ready(Message, frozen=True, tag=True):
    """Requests are served from now on; unless it is `warm`, shapes are compiled between them."""

    info: EngineInfo
    stats: EngineStats
    warm: bool


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


class AgentAt(Message, frozen=True, tag=True):
    """Where KV agents of other engines reach this engine's, "" for nowhere: after `Ready`, and when it has changed."""

    address: str


class Granted(Message, frozen=True, tag=True):
    """Where a prompt that was announced is to be written; None if it can't be taken."""

    request_id: str
    target: Target | None


class ArrivalLost(Message, frozen=True, tag=True):
    """A prompt that was granted will never be complete here; `slow` says that stored blocks of it came too late."""

    request_id: str
    slow: bool = False


class HandedOff(Message, frozen=True, tag=True):
    """Nothing of a prompt will be written any more; `complete` says whether all of it has been.

    Attributes:
      broken: a write of it has not ended well: bytes of it may still be on their way, though nobody sends any more.
    """

    request_id: str
    complete: bool
    broken: bool = False


class Answer(Message, frozen=True, tag=True):
    """The answer to `Ask`; `error` says what the check found."""

    number: int
    stats: EngineStats
    error: str | None


class Died(Message, frozen=True, tag=True):
    """The last message of an engine that has failed: why."""

    message: str


ToEngine = (
    Start | Add | Prefill | Expect | HitsRead | Adopt | Forget | Settled | PeerDied | Abort | UseMode | Ask | Stop
)
ToFront = (
    Ready | StartFailed | Compiled | Events | AgentAt | Granted | HitsRead | ArrivalLost | HandedOff | Answer | Died
)
