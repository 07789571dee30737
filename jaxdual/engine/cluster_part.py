"""What an engine is to the cluster that has started it."""

from __future__ import annotations

import msgspec

from jaxdual.agent.wire import CardPlaces
from jaxdual.config import ClusterConfig
from jaxdual.scheduling.loads import Role


class ClusterPart(msgspec.Struct, frozen=True):
    """Role and surroundings of an engine.

    Attributes:
      role: what it does.
      cluster: settings of all, with the path mode of the moment.
      cards: of its node; None where they are not counted.
      first_device: devices that the engines before it take.
    """

    role: Role
    cluster: ClusterConfig
    cards: CardPlaces | None
    first_device: int = 0
