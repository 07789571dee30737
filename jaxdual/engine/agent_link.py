"""The KV agent as the parts of an engine see it: messages out, answers back by number, and its death."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import Any, Protocol

from jaxdual.config import ConfigError
from jaxdual.kv.lease import LeaseBook

_log = logging.getLogger(__name__)

_MAX_DEATHS = 5  # in a row, with no answer between them


class Agent(Protocol):
    """What is needed of `agent.client.AgentProcess`."""

    attached: Any

    @property
    def patience(self) -> float: ...
    def wait(self) -> None: ...
    def fileno(self) -> int: ...
    def send(self, message: Any) -> None: ...
    def receive(self, timeout: float = 0.0) -> list[Any]: ...
    def kill(self) -> None: ...
    def close(self, timeout: float) -> None: ...


class AgentLink:
    """One KV agent after another, as they die; none any more after too many deaths in a row.

    Args:
      start: starts an agent on the engine's staging pages; only the first one is waited for.
      leases: of those pages; an agent's operations are over when its process is gone.

    Attributes:
      era: number of the present agent, by which leases know who carries out their operations.
      restarts: agents that have died.

    Raises:
      ConfigError: the store can't be opened.
      OSError: there is no agent.
    """

    def __init__(self, start: Callable[[], Agent], leases: LeaseBook) -> None:
        self._start, self._leases = start, leases
        self._agent: Agent | None = start()
        self._agent.wait()
        self.era = 0
        self.restarts = 0
        self._deaths = 0
        self._numbers = itertools.count(1)
        self._waiting: dict[int, Callable[[Any], None]] = {}
        self._on_news: list[Callable[[Any], None]] = []
        self._told_address: str | None = None
        self._on_death: list[Callable[[], None]] = []

    @property
    def attached(self) -> Any:
        """What the present agent said of itself; None if there is none, or it has not yet."""
        return None if self._agent is None else self._agent.attached

    def new_address(self) -> str | None:
        """Where agents of other engines reach the present one, "" if they don't; None if the last call said so, too."""
        address = "" if self.attached is None else str(self.attached.address)
        if address == self._told_address:
            return None
        self._told_address = address
        return address

    @property
    def alive(self) -> bool:
        """Whether there is an agent; False is for good."""
        return self._agent is not None

    @property
    def patience(self) -> float | None:
        """Seconds after which `poll` is to be called though nothing has come; None for never."""
        return None if self._agent is None else self._agent.patience

    @property
    def descriptors(self) -> tuple[int, ...]:
        """Readable when `poll` has something to handle."""
        return () if self._agent is None else (self._agent.fileno(),)

    def on_death(self, tell: Callable[[], None]) -> None:
        """`tell` is called when an agent has died, in the order of these calls: answers that were due never come.

        The next one, if there is one, has been started already, and `era` is its number.
        """
        self._on_death.append(tell)

    def on_news(self, tell: Callable[[Any], None]) -> None:
        """`tell` is called with each message that comes unasked."""
        self._on_news.append(tell)

    def ask(self, message: Callable[[int], Any], answer: Callable[[Any], None]) -> int:
        """Sends `message(number)`; `answer` is called by a later `poll` with what comes back under that number.

        Returns:
          The number.
        """
        number = next(self._numbers)
        if self._agent is not None:
            self._waiting[number] = answer
            self._agent.send(message(number))
        return number

    def poll(self, timeout: float = 0.0) -> None:
        """Handles what has come; waits up to `timeout` seconds for the first of it."""
        if self._agent is None:
            return
        try:
            messages = self._agent.receive(timeout)
        except (ConnectionError, ConfigError) as error:
            self._next_agent(error)
            return
        for message in messages:
            self._deaths = 0
            number = getattr(message, "number", None)
            for tell in self._on_news if number is None else [self._waiting.pop(number)]:
                tell(message)

    def close(self, timeout: float) -> None:
        """Lets the agent finish what it was asked for, up to `timeout` seconds; there is none after that."""
        agent, self._agent = self._agent, None
        if agent is not None:
            agent.close(timeout)

    def _next_agent(self, why: Exception) -> None:
        if self._agent is not None:
            self._agent.kill()
        self._agent = None
        self._waiting.clear()
        self._leases.carrier_dead(self.era)
        self.era += 1
        self.restarts += 1
        self._deaths += 1
        try:
            if isinstance(why, ConfigError):
                raise why
            if self._deaths > _MAX_DEATHS:
                raise OSError(f"{self._deaths} KV agents in a row have died")
            self._agent = self._start()
            _log.warning("%s; another one is started", why)
        except (OSError, ConfigError) as error:
            _log.error("%s; there is no other: %s", why, error)
        for tell in self._on_death:
            tell()
