"""Blocks on their way off the device: gathered, brought to staging pages, handed to the KV agent."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxdual.engine.agent_link import AgentLink
from jaxdual.kv.lease import Lease
from jaxdual.kv.staging import Staging

_MOST_BLOCKS = 64  # that have left the device and find no staging page; more are given up


@dataclass(frozen=True, slots=True, eq=False)
class Departure:
    """Some blocks of one layer group that leave together.

    Attributes:
      group: number of the layer group.
      blocks: their number.
      message: what the agent is asked for, given the message's number and the staging pages of the blocks.
      done: called once, in the end: with what the agent says has arrived, or with None if all of it is lost.
      wanted: asked before the blocks are handed to the agent.
      patient: it waits for staging pages however long the queue gets, and is lost with the agent that moves it; others
        are given up in a long queue, and handed to the next agent.
    """

    group: int
    blocks: int
    message: Callable[[int, list[int]], Any]
    done: Callable[[Sequence[bool] | None], None]
    wanted: Callable[[], bool] = lambda: True
    patient: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class _Leaving:
    departure: Departure
    contents: Any  # on the device, or on its way from there
    number: int


@dataclass(frozen=True, slots=True)
class _Sent:
    departure: Departure
    lease: Lease


class Departures:
    """Takes blocks off the device in order. Their pages may be used again at once: the device keeps the order.

    Args:
      link: to the KV agent.
      staging: pages that blocks go through.
      host: memory of each layer group, `[slots, *block]`.
      gather: starts a copy of some pages of a group off the device.
      most_pages: for one call of `gather`.

    Attributes:
      most_pages: of each layer group, in one departure.
    """

    def __init__(
        self,
        link: AgentLink,
        staging: Staging,
        *,
        host: Sequence[np.ndarray],
        gather: Callable[[int, Sequence[int]], Any],
        most_pages: int,
    ) -> None:
        # What never finds staging pages would wait for ever, and a little room for others makes it wait less.
        self.most_pages = [max(1, min(most_pages, capacity // 2)) for capacity in staging.capacity]
        self._link, self._staging, self._host, self._gather = link, staging, host, gather
        self._leaving: deque[_Leaving] = deque()
        self._num_gathered = self._num_settled = 0
        self._sent: dict[int, _Sent] = {}
        link.on_death(self._agent_died)

    @property
    def num_gathered(self) -> int:
        """Copies started so far, for `settle`."""
        return self._num_gathered

    @property
    def has_unsent(self) -> bool:
        """Whether blocks wait for staging pages."""
        return bool(self._leaving)

    @property
    def has_any(self) -> bool:
        return bool(self._leaving or self._sent)

    @property
    def leases(self) -> list[Lease]:
        """Those of the blocks that the agent has."""
        return [sent.lease for sent in self._sent.values()]

    def add(self, departure: Departure, pages: Sequence[int]) -> None:
        """Starts to take blocks off the device, as they are after what has been dispatched so far."""
        if not self._link.alive:
            departure.done(None)
            return
        self._leaving.append(_Leaving(departure, self._gather(departure.group, pages), self._num_gathered))
        self._num_gathered += 1
        impatient = [one for one in self._leaving if not one.departure.patient]
        while sum(one.departure.blocks for one in impatient) > _MOST_BLOCKS:
            lost = impatient.pop(0)
            self._leaving.remove(lost)
            lost.departure.done(None)

    def settle(self, num_gathered: int) -> None:
        """The device has finished so many copies: looking at them takes no waiting."""
        self._num_settled = max(self._num_settled, num_gathered)
        self.send()

    def send(self) -> None:
        """Brings blocks to staging pages and hands them to the agent, as far as there is room."""
        while self._leaving and self._leaving[0].number < self._num_settled:
            departure = self._leaving[0].departure
            if not departure.wanted():
                self._leaving.popleft()
                departure.done(None)
                continue
            groups = range(len(self._host))
            lease = self._staging.reserve([departure.blocks if group == departure.group else 0 for group in groups])
            if lease is None:
                return
            slots = list(lease.slots[departure.group])
            contents = np.asarray(self._leaving.popleft().contents)
            self._host[departure.group][slots] = contents[: departure.blocks]
            self._staging.leases.filled(lease)
            self._hand_over(_Sent(departure, lease))

    def _hand_over(self, sent: _Sent) -> None:
        departure, lease, leases = sent.departure, sent.lease, self._staging.leases
        era = self._link.era
        leases.begin_use(lease, era, 1)
        slots = list(lease.slots[departure.group])

        def answered(done: Any) -> None:
            del self._sent[done.number]
            leases.operation_over(lease.number, era)
            leases.end(lease)
            departure.done(done.whole)

        number = self._link.ask(lambda number: departure.message(number, slots), answered)
        self._sent[number] = sent

    def _agent_died(self) -> None:
        """What it was storing is in the staging pages still; the next one, if there is one, is asked again."""
        sent, self._sent = self._sent, {}
        for one in sent.values():
            if self._link.alive and not one.departure.patient:
                self._hand_over(one)
            else:
                self._staging.leases.end(one.lease)
                one.departure.done(None)
        while self._leaving and not self._link.alive:
            self._leaving.popleft().departure.done(None)
