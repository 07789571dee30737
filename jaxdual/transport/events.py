"""What carriers keep books with: transfers under way, tickets not yet reported, and what is to be reported."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from jaxdual.kv.slots import IntegrityError
from jaxdual.transport.base import Channel, Completed, Event, Op, Received, Region, RemoteRegion, Status, Ticket

_MOST_RECEIVED = 1 << 16


@dataclass(frozen=True, slots=True)
class Transfer:
    """A posted transfer on its way through a channel's thread; `ops` are joined."""

    ticket: Ticket
    write: bool
    region: Region
    remote: RemoteRegion
    ops: list[Op]
    immediate: int | None


class EventQueue:
    """Events from the threads of a transport, for its `poll`, and a descriptor that is readable while there are any."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._lock = threading.Lock()
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def push(self, event: Event) -> None:
        """Adds an event."""
        with self._lock:
            self._events.append(event)
            if len(self._events) == 1 and self._fd >= 0:
                os.eventfd_write(self._fd, 1)

    def push_received(self, event: Received) -> bool:
        """Adds an immediate, unless so many events wait that nobody seems to poll: then False."""
        if len(self._events) >= _MOST_RECEIVED:
            return False
        self.push(event)
        return True

    def take(self) -> list[Event]:
        """All events, oldest first."""
        with self._lock:
            if not self._events:
                return []
            if self._fd >= 0:
                os.eventfd_read(self._fd)
            events = list(self._events)
            self._events.clear()
            return events

    def fileno(self) -> int:
        """The descriptor.

        Raises:
          ValueError: the queue is closed.
        """
        if self._fd < 0:
            raise ValueError("the transport is closed")
        return self._fd

    def close(self) -> None:
        """Closes the descriptor; events can still be added and taken."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1


class Ledger:
    """The outstanding tickets of one channel, each of which completes once, in the order in which they were posted.

    Args:
      channel: whose tickets they are.
      events: where completions go.
    """

    def __init__(self, channel: Channel, events: EventQueue) -> None:
        self._channel = channel
        self._events = events
        self._lock = threading.Lock()
        self._outstanding: deque[Ticket] = deque()
        self._bytes = 0
        self._posted = 0
        self._completed = 0
        self._end: Status | None = None

    @property
    def outstanding_bytes(self) -> int:
        return self._bytes

    def post(self, nbytes: int, start: Callable[[Ticket], Status | None]) -> Ticket:
        """A new ticket.

        Args:
          nbytes: that it stands for.
          start: called with it, in the order of tickets, unless the channel has ended. If it is the only one that is
            outstanding (`idle_but_for`), it may be done with it at once, and returns how it ended.

        Raises:
          ValueError: the channel was closed.
        """
        with self._lock:
            if self._end is Status.CANCELLED:
                raise ValueError("the channel is closed")
            ticket = Ticket(self._channel, self._posted, nbytes)
            self._posted += 1
            self._outstanding.append(ticket)
            self._bytes += nbytes
            status = self._end if self._end is not None else start(ticket)
            if status is not None:
                self._pop(status)
            return ticket

    def idle_but_for(self, ticket: Ticket) -> bool:
        """Whether no other ticket is outstanding than one that is being posted; called by its `start`."""
        return self._outstanding[0] is ticket

    def complete(self, number: int, status: Status) -> None:
        """Reports the oldest ticket.

        Raises:
          IntegrityError: it is not that one.
        """
        with self._lock:
            if not self._outstanding or self._outstanding[0].number != number:
                raise IntegrityError(f"ticket {number} completed out of order")
            self._pop(status)

    def fail(self, status: Status) -> None:
        """Reports all outstanding tickets, and those that will be posted."""
        with self._lock:
            self._end = status
            while self._outstanding:
                self._pop(status)

    def close(self) -> None:
        """Refuses further tickets; those that are outstanding are still to be reported."""
        with self._lock:
            self._end = Status.CANCELLED

    def check(self) -> None:
        """Raises `IntegrityError` unless each ticket is either outstanding or has been reported."""
        with self._lock:
            if self._posted != self._completed + len(self._outstanding):
                raise IntegrityError(
                    f"{self._posted} tickets posted, {self._completed} completed, {len(self._outstanding)} outstanding"
                )
            if self._bytes != sum(ticket.nbytes for ticket in self._outstanding):
                raise IntegrityError(f"{self._bytes} outstanding bytes are not those of the outstanding tickets")

    def _pop(self, status: Status) -> None:
        ticket = self._outstanding.popleft()
        self._bytes -= ticket.nbytes
        self._completed += 1
        self._events.push(Completed(ticket, status))
