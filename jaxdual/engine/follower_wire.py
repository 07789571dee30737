"""Messages between the processes that drive the devices of one engine.

First a follower asks to join; when all have, the leader says which engine it is. From `Begin` on, the leader sends the
calls of its runner in their order, and a follower makes the same ones.
"""

from __future__ import annotations

from jaxdual.config import EngineConfig
from jaxdual.engine.runner import ScoreTargets
from jaxdual.engine.slot_sampler import SlotBinding
from jaxdual.frames import Message
from jaxdual.kv.group import GroupPages
from jaxdual.scheduling.experts import Move
from jaxdual.scheduling.plan import StepPlan

# Both ways.


class Agreed(Message, frozen=True, tag=True):
    """A process has come to where all must have the same; the leader says so when all have.

    Attributes:
      identity: of what it has.
    """

    identity: bytes


# To the leader.


class Join(Message, frozen=True, tag=True):
    """The first message. Answered by `Welcome` or `Refused`.

    Attributes:
      versions: of what makes the programs, which must be the same in all processes.
    """

    process_id: int
    versions: dict[str, str]


class Alive(Message, frozen=True, tag=True):
    """A sign of life, every so often."""


class Failed(Message, frozen=True, tag=True):
    """The follower ends: its last words.

    Attributes:
      kind: of the error, by its class.
    """

    kind: str
    text: str


# To a follower.


class Welcome(Message, frozen=True, tag=True):
    """All have joined.

    Attributes:
      config: of the engine.
      coordinator: where JAX's coordination service is, "host:port".
      devices: numbers of the GPUs that are this process's, where several share a machine; None for all.
    """

    config: EngineConfig
    coordinator: str
    devices: list[int] | None


class Refused(Message, frozen=True, tag=True):
    """It can't join."""

    reason: str


class Begin(Message, frozen=True, tag=True):
    """Everybody has its weights. `memory` is that of the arenas."""

    memory: tuple[GroupPages, ...]


class Dispatch(Message, frozen=True, tag=True):
    """See `Runner.dispatch`."""

    plans: tuple[StepPlan, ...]
    bindings: tuple[SlotBinding, ...]
    targets: dict[int, ScoreTargets]


class Fetch(Message, frozen=True, tag=True):
    """See `Runner.fetch`: of the oldest step under way."""


class TakeRouterCounts(Message, frozen=True, tag=True):
    """See `Runner.take_router_counts`."""


class WarmUp(Message, frozen=True, tag=True):
    """See `Runner.warm_ups`.

    Attributes:
      name: of the program and its shape.
    """

    name: str


class MoveExperts(Message, frozen=True, tag=True):
    """See `Runner.move_experts`.

    Attributes:
      row: of the layer.
      moves: of it.
      experts: in its slots, afterwards.
    """

    row: int
    moves: tuple[Move, ...]
    experts: list[int]


class End(Message, frozen=True, tag=True):
    """The engine is closed."""


ToLeader = Join | Agreed | Alive | Failed
ToFollower = Welcome | Refused | Agreed | Begin | Dispatch | Fetch | TakeRouterCounts | WarmUp | MoveExperts | End
