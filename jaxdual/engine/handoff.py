"""Prompts that one engine computes and another goes on from: the two ends of the way of their keys and values.

The decode engine's `Arrivals` reserves staging pages for the whole prompt and lets the prefill engine's agent write
them. The prefill engine's `Exports` takes the blocks off its device when the prompt is computed, and has its agent
write them. The cluster tells the one of the other: it brings the grant, and says that all is there or that no more will
come. Pages that are not wanted any more are in quarantine until it has said so, or until the writer's agent is known to
have ended. That a connection was lost is not enough: a writer that lives may connect again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxdual.agent.wire import AwaitGone, Disconnect, Done, GroupSlots, Load, PeerGone, Push
from jaxdual.engine.agent_link import AgentLink
from jaxdual.engine.departures import Departure, Departures
from jaxdual.engine.request import Target
from jaxdual.engine.wire import ArrivalLost, Granted, HandedOff, HitsRead
from jaxdual.kv.keys import BlockKey
from jaxdual.kv.layout import first_block
from jaxdual.kv.lease import Lease
from jaxdual.kv.manager import GroupPages
from jaxdual.kv.staging import StagedSequences, Staging


@dataclass(slots=True, eq=False)
class _Export:
    """A prompt whose blocks go to a target.

    Attributes:
      left: departures that are not over.
      failed: something of it has not arrived, or is not wanted any more.
      broken: a write of it has not ended well.
    """

    request_id: str
    target: Target
    left: int = 0
    failed: bool = False
    broken: bool = False


class Exports:
    """The prefill engine's end.

    Args:
      link: to the KV agent.
      departures: by which blocks leave.
      places: where the staging pages of each layer group lie in the slab.
    """

    def __init__(self, link: AgentLink, departures: Departures, places: Sequence[GroupSlots]) -> None:
        self._link, self._departures, self._places = link, departures, places
        self._wanted: dict[int, _Export] = {}  # by sequence: those that are not computed yet
        self._leaving: list[_Export] = []
        self._over: list[HandedOff] = []
        link.on_death(self._agent_died)

    def want(self, seq_id: int, request_id: str, target: Target) -> None:
        """The blocks of a sequence's prompt go to `target` when they are computed."""
        self._wanted[seq_id] = _Export(request_id, target)

    @property
    def any_wanted(self) -> bool:
        """Whether `computed` has anything to do for any sequence."""
        return bool(self._wanted)

    def computed(self, seq_id: int, held: Sequence[tuple[int, Sequence[int]]]) -> None:
        """The step that computes the end of a prompt was dispatched: its blocks leave, if they are wanted elsewhere.

        Args:
          held: in each layer group, number of the first block that the sequence holds, and its pages from there on.
        """
        export = self._wanted.pop(seq_id, None)
        if export is None:
            return
        attached = self._link.attached
        if attached is None or attached.address != export.target.peer:
            self._over.append(HandedOff(export.request_id, False))  # granted to an agent that has died
            return
        self._leaving.append(export)
        parts = []
        for group, (first, pages) in enumerate(held):
            most, offsets = self._departures.most_pages[group], export.target.offsets[group]
            wanted = pages[export.target.firsts[group] - first :]
            parts += [(group, wanted[i : i + most], offsets[i : i + most]) for i in range(0, len(wanted), most)]
        export.left = len(parts)
        for group, pages, offsets in parts:
            self._depart(export, group, pages, offsets)

    def drop(self, seq_id: int) -> None:
        """A sequence has ended before its prompt was computed."""
        export = self._wanted.pop(seq_id, None)
        if export is not None:
            self._over.append(HandedOff(export.request_id, False))

    def cancel(self, request_id: str) -> None:
        """What has left is not wanted any more; `take_messages` says when nothing of it is under way."""
        for export in self._leaving:
            if export.request_id == request_id:
                export.failed = True

    def take_messages(self) -> list[HandedOff]:
        """One for each request for which nothing will be written any more."""
        over, self._over = self._over, []
        return over

    @property
    def has_any(self) -> bool:
        return bool(self._leaving or self._over)

    def _depart(self, export: _Export, group: int, pages: Sequence[int], offsets: Sequence[int]) -> None:
        place, target = self._places[group], export.target

        def message(number: int, slots: list[int]) -> Push:
            runs = [
                (place.offset + slot * place.slot_bytes, offset, place.block_bytes)
                for slot, offset in zip(slots, offsets, strict=True)
            ]
            return Push(number, target.address, target.descriptor, runs)

        def done(arrived: Sequence[bool] | None) -> None:
            export.left -= 1
            export.failed |= arrived is None or not all(arrived)
            export.broken |= arrived is not None and not all(arrived)
            if not export.left:
                self._leaving.remove(export)
                self._over.append(HandedOff(export.request_id, not export.failed, export.broken))

        self._departures.add(
            Departure(group, len(pages), message, done, wanted=lambda: not export.failed, patient=True), pages
        )

    def _agent_died(self) -> None:
        for export in self._leaving:
            export.failed = export.broken = True


@dataclass(slots=True, eq=False)
class _Arrival:
    """A prompt that comes from elsewhere.

    Attributes:
      tokens: of the prompt.
      peer: agent that writes its blocks.
      firsts: in each layer group, number of the first block that is wanted.
      keys: of blocks that are read from the store, from number `first_read` on; of an only layer group.
      deadline: by which that must be over, in seconds; None before it begins, and after.
    """

    request_id: str
    tokens: int
    peer: str
    firsts: tuple[int, ...]
    keys: Sequence[BlockKey]
    first_read: int
    lease: Lease | None = None
    deadline: float | None = None


class Arrivals:
    """The decode engine's end.

    Args:
      link: to the KV agent.
      staging: pages that blocks arrive in.
      staged: where sequences go whose blocks have arrived.
      memory: of each layer group.
      places: where the staging pages of each lie in the slab.
      page_size: tokens a page.
      timeout: seconds after which a prompt is lost whose stored blocks have not come.
      clock: seconds, monotonic.

    Attributes:
      read, failed: blocks that were read from the store; gone or broken when they were to be read.
      timeouts: prompts that were lost for it.
    """

    def __init__(
        self,
        link: AgentLink,
        staging: Staging,
        staged: StagedSequences,
        *,
        memory: Sequence[GroupPages],
        places: Sequence[GroupSlots],
        page_size: int,
        timeout: float,
        clock: Callable[[], float],
    ) -> None:
        self.read = self.failed = self.timeouts = 0
        self._timeout, self._clock = timeout, clock
        self._link, self._staging, self._staged = link, staging, staged
        self._memory, self._places, self._page_size = memory, places, page_size
        self._queue: deque[_Arrival] = deque()
        self._arrivals: dict[str, _Arrival] = {}  # by request: those that are granted
        self._ended: dict[str, _Arrival] = {}  # those that are in quarantine
        self._messages: list[Granted | HitsRead | ArrivalLost] = []
        self._draining: list[_Arrival] = []  # settled, but for what may still be on its way
        self._dying: set[str] = set()
        link.on_death(self._agent_died)
        link.on_news(self._news)

    @property
    def leases(self) -> list[Lease]:
        """Those of prompts that are granted and wanted."""
        return [arrival.lease for arrival in self._arrivals.values() if arrival.lease is not None]

    def expect(
        self, request_id: str, tokens: int, peer: str, keys: Sequence[BlockKey] = (), first_read: int = 0
    ) -> None:
        """Reserves staging pages for a prompt, in the order of calls; `take_messages` says when they are there.

        Args:
          keys: of blocks of an only layer group, which are read from the store then; `take_messages` says when they are
            there.
          first_read: number of the first of these.
        """
        firsts = tuple(first_block(pages.window, tokens, self._page_size) for pages in self._memory)
        self._queue.append(_Arrival(request_id, tokens, peer, firsts, keys, first_read))

    @property
    def any_reading(self) -> bool:
        """Whether stored blocks are read that must come in time."""
        return any(arrival.deadline is not None for arrival in self._arrivals.values())

    def take_messages(self) -> list[Granted | HitsRead | ArrivalLost]:
        """What has become of prompts since the last call, in order; grants those for which there are pages now, and
        gives up those whose stored blocks are too late.
        """
        while self._queue and self._grant(self._queue[0]):
            self._queue.popleft()
        now = self._clock()
        for request_id, arrival in list(self._arrivals.items()):
            if arrival.deadline is not None and now > arrival.deadline:
                # What is still read would overwrite what is computed instead: these pages are of no use.
                self.timeouts += 1
                self.forget(request_id)
                self._messages.append(ArrivalLost(request_id, slow=True))
        messages, self._messages = self._messages, []
        return messages

    def adopt(self, request_id: str, seq_id: int, *, stored: int) -> bool:
        """All blocks of a prompt have been written, and none will be any more: a sequence goes on from them.

        False if they are lost.

        Args:
          seq_id: a sequence that holds nothing; to be queued then.
          stored: leading blocks that are in the store already.
        """
        arrival = self._arrivals.pop(request_id, None)
        if arrival is None or arrival.lease is None:
            self.settled(request_id)
            return False
        self._staging.leases.operation_over(arrival.lease.number, arrival.peer)
        blocks = -(-arrival.tokens // self._page_size)
        self._staged.put(seq_id, arrival.lease, arrival.firsts, blocks, arrival.tokens, stored=stored, handed_over=True)
        return True

    def forget(self, request_id: str) -> None:
        """A prompt is not wanted any more. Its pages come back when `settled` says so, or its writer is gone."""
        for arrival in self._queue:
            if arrival.request_id == request_id:
                self._queue.remove(arrival)
                return
        arrival_or_none = self._arrivals.pop(request_id, None)
        if arrival_or_none is not None:
            self._end(arrival_or_none)

    def settled(self, request_id: str, *, broken: bool = False) -> None:
        """Nothing of a prompt will be written any more, and it is not complete.

        Args:
          broken: a write has not ended well: its pages come back when nothing of the connection can land in them.
        """
        self.forget(request_id)
        arrival = self._ended.pop(request_id, None)
        if arrival is None:
            return
        if not broken:
            self._writer_over(arrival)
            return

        def answered(_: object) -> None:
            if arrival in self._draining:
                self._draining.remove(arrival)
                self._writer_over(arrival)

        self._draining.append(arrival)
        self._link.ask(lambda number: Disconnect(number, arrival.peer), answered)

    def _writer_over(self, arrival: _Arrival) -> None:
        if arrival.lease is not None:
            self._staging.leases.operation_over(arrival.lease.number, arrival.peer)

    def peer_died(self, peer: str) -> None:
        """The engine of a writer has died, so its agent is about to: what it was granted comes back when it has."""
        self._dying.add(peer)
        self._queue = deque(arrival for arrival in self._queue if arrival.peer != peer)
        for request_id, arrival in list(self._arrivals.items()):
            if arrival.peer == peer:
                self.forget(request_id)
        self._await_gone(peer)

    # Parts.

    def _grant(self, arrival: _Arrival) -> bool:
        """Reserves pages for a prompt; False if there are too few now."""
        blocks = -(-arrival.tokens // self._page_size)
        counts = [blocks - first for first in arrival.firsts]
        attached = self._link.attached
        if attached is None or any(
            count > capacity for count, capacity in zip(counts, self._staging.capacity, strict=True)
        ):
            self._messages.append(Granted(arrival.request_id, None))
            return True
        lease = self._staging.reserve(counts)
        if lease is None:
            return False
        arrival.lease = lease
        self._staging.leases.begin_load(lease, arrival.peer, 1)
        self._arrivals[arrival.request_id] = arrival
        offsets = tuple(
            tuple(place.offset + slot * place.slot_bytes for slot in slots)
            for place, slots in zip(self._places, lease.slots, strict=True)
        )
        target = Target(arrival.peer, attached.address, attached.descriptor, arrival.firsts, offsets)
        self._messages.append(Granted(arrival.request_id, target))
        if arrival.keys:
            self._load(arrival, lease)
        return True

    def _load(self, arrival: _Arrival, lease: Lease) -> None:
        """Reads stored blocks to where they belong, beside what the peer writes."""
        era, leases = self._link.era, self._staging.leases
        leases.begin_load(lease, era, 1)
        arrival.deadline = self._clock() + self._timeout
        slots = list(lease.slots[0][arrival.first_read :][: len(arrival.keys)])

        def answered(done: Done) -> None:
            self.read += sum(done.whole)
            self.failed += len(done.whole) - sum(done.whole)
            if leases.operation_over(lease.number, era) is not None:
                arrival.deadline = None
                self._messages.append(HitsRead(arrival.request_id, done.leading))

        self._link.ask(lambda number: Load(number, 0, list(arrival.keys), slots), answered)

    def _end(self, arrival: _Arrival) -> None:
        if arrival.lease is not None:
            self._staging.leases.end(arrival.lease)
            self._ended[arrival.request_id] = arrival

    def _await_gone(self, peer: str) -> None:
        def answered(_: object) -> None:
            self._dying.discard(peer)
            self._staging.leases.carrier_dead(peer)
            self._ended = {request: arrival for request, arrival in self._ended.items() if arrival.peer != peer}
            self._draining = [arrival for arrival in self._draining if arrival.peer != peer]

        self._link.ask(lambda number: AwaitGone(number, peer), answered)

    def _news(self, news: object) -> None:
        if isinstance(news, PeerGone):
            self._lose(news.address)

    def _lose(self, peer: str | None) -> None:
        """What a writer, or any, was granted can't become complete any more."""
        for request_id, arrival in list(self._arrivals.items()):
            if peer in (None, arrival.peer):
                self.forget(request_id)
                self._messages.append(ArrivalLost(request_id))

    def _agent_died(self) -> None:
        # Whoever wrote for another one has ended with it.
        draining, self._draining = self._draining, []
        for arrival in draining:
            self._writer_over(arrival)
        self._lose(None)
        for peer in self._dying:
            self._await_gone(peer)
