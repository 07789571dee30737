"""The path scheduler: which prefill engine, which decode engine and which read side each request gets (DualPath 6).

A state machine over plain data. A submitted request waits in two queues, independently: one for a prefill engine, one
for a decode engine. Groups of engines fetch from these. Once it has both engines it is *placed*: the read side is
chosen with the queues as they are then, and the fetch that completed it returns it, to be told to both engines.

| where a request is | its prefill side | its decode side |
| --- | --- | --- |
| waits | in the one prefill queue | in the global queue, or in the private queue of a decode group |
| assigned | counts on an engine | counts on an engine |
| done | prefilled | (the request is over) |

A request that is not placed yet has engines of which nobody else knows. When an engine is lost all of these are taken
back, so that at no time a request holds an engine for which an older one waits. That is why two requests never wait
for each other's engine.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jaxdual.kv.slots import IntegrityError
from jaxdual.scheduling.decode_placement import DecodePlacement
from jaxdual.scheduling.loads import ClusterLoads, EngineReport, Holding, PathRequest, Role
from jaxdual.scheduling.path_modes import PathMode
from jaxdual.scheduling.prefill_placement import PrefillPlacement
from jaxdual.scheduling.read_side import ReadChooser, ReadPlan, ReadSide
from jaxdual.scheduling.round_robin import RoundRobin

# In order of submission. An ordinary dictionary passes over all that was removed before its first entry.
type _Queue = OrderedDict[int, PathRequest]


@dataclass(frozen=True, slots=True)
class Placement:
    """A request with both engines and its read side.

    Attributes:
      number: unique for ever: what comes late for a placement that is over finds nothing under its number.
      request: as submitted.
      prefill_engine, decode_engine: where it runs.
      read: who reads its hit tokens.
      waited: seconds from arrival to placement: the scheduler's part of the time to first token.
    """

    number: int
    request: PathRequest
    prefill_engine: int
    decode_engine: int
    read: ReadPlan
    waited: float


@dataclass(frozen=True, slots=True)
class Redo:
    """A placement that is void since one of its engines is lost; the request waits again, as it was submitted.

    Attributes:
      placement: what was.
      survivor: the other engine, which must drop what it has of it; None if it had done its part.
      prefilled: its prompt was computed, and output may be with the client already. A caller that wants to go on after
        that output cancels the request and submits a longer one.
    """

    placement: Placement
    survivor: int | None
    prefilled: bool


@dataclass(slots=True, eq=False)
class _Live:
    """A request that is not over.

    `group` has it in its private queue; `prefill` and `decode` say which engines it counts on, and for what;
    `unread_prefill` and `unread_decode` are the tokens that each side has yet to read.
    """

    request: PathRequest
    group: int | None = None
    prefill: Holding | None = None
    decode: Holding | None = None
    placement: Placement | None = None
    unread_prefill: int = 0
    unread_decode: int = 0
    prefilled: bool = False


class PathScheduler:
    """Places requests on engines, and gives back what they held when they are over.

    Events name a placement by its number and may come in any order, late or twice: those of two engines do. What is
    known already, or belongs to a placement that is over, is ignored.

    A request that needs more KV memory than a decode engine has may wait for ever, with all behind it: refuse it before
    it is submitted.

    Args:
      mode: see `path_modes.MODES`.
      prefill, decode: the choice of engines where `mode.by_load`.
      block_tokens: tokens of a stored block.
    """

    def __init__(
        self,
        mode: PathMode,
        prefill: PrefillPlacement,
        decode: DecodePlacement | None = None,
        block_tokens: int = 64,
    ) -> None:
        self.mode = mode
        self.loads = ClusterLoads()
        self._prefill = prefill
        self._decode = decode or DecodePlacement()
        self._prefill_ring = RoundRobin()
        self._decode_ring = RoundRobin()
        self._reader = ReadChooser(mode.read, block_tokens)
        self._numbers = itertools.count()
        self._live: dict[int, _Live] = {}  # in order of submission
        self._placed: dict[int, _Live] = {}  # by number of the placement
        self._prefill_queue: _Queue = OrderedDict()
        self._decode_queue: _Queue = OrderedDict()
        self._private: dict[int, _Queue] = {}
        self._private_tok: dict[int, int] = {}

    def __len__(self) -> int:
        """Requests that are not over."""
        return len(self._live)

    @property
    def num_waiting(self) -> int:
        """Requests that are not placed."""
        return len(self._live) - len(self._placed)

    def has_work(self, role: Role, group: int) -> bool:
        """Whether a request waits for a group of that role."""
        if role is Role.PREFILL:
            return bool(self._prefill_queue)
        return bool(self._decode_queue or self._private.get(group))

    def submit(self, request: PathRequest) -> None:
        """Queues a new request.

        Raises:
          ValueError: one of this number is not over yet.
        """
        if request.request_id in self._live:
            raise ValueError(f"request {request.request_id} was submitted already, and is not over")
        self._live[request.request_id] = _Live(request)
        self._prefill_queue[request.request_id] = request
        self._decode_queue[request.request_id] = request

    def report(self, role: Role, group: int, reports: Sequence[EngineReport]) -> None:
        """Takes a group's loads without assigning anything; a group is known from its first report or fetch on.

        Raises:
          ValueError: it is empty, has an engine twice, or contradicts an earlier one in an engine's place or role.
        """
        self.loads.report(role, group, reports)
        if role is Role.DECODE and group not in self._private:
            self._private[group] = OrderedDict()
            self._private_tok[group] = 0

    def fetch_prefill(self, group: int, reports: Sequence[EngineReport], now: float) -> list[Placement]:
        """A prefill group asks for work.

        Args:
          group: its number.
          reports: of its engines.
          now: seconds, on the clock of the requests' arrivals.

        Returns:
          Requests that are placed from now on, to be told to both engines of each, which may be of other groups.

        Raises:
          ValueError: as `report`.
        """
        self.report(Role.PREFILL, group, reports)
        queue = self._prefill_queue
        if not queue:
            return []
        if self.mode.by_load:
            chosen = self._prefill.place(queue.values(), self.loads.now(report.engine for report in reports))
        else:
            chosen = self._prefill_ring.place(queue.values(), self.loads.engines(Role.PREFILL))
        placed = []
        for request, engine in chosen:
            live = self._live[request.request_id]
            del queue[request.request_id]
            live.prefill = Holding(engine, request.request_id, request.prompt_tokens)
            self.loads.hold(live.prefill)
            if live.decode is not None:
                placed.append(self._join(live, live.prefill, live.decode, now))
        return placed

    def fetch_decode(self, group: int, reports: Sequence[EngineReport], now: float) -> list[Placement]:
        """A decode group asks for work; arguments, result and errors as of `fetch_prefill`."""
        self.report(Role.DECODE, group, reports)
        if self.mode.by_load:
            self._drain()
            queue = self._private[group]
            if not queue:
                return []
            chosen = self._decode.place(queue.values(), self.loads.now(report.engine for report in reports))
        else:
            engines = self.loads.engines(Role.DECODE)
            chosen = self._decode_ring.place(self._decode_queue.values(), engines, self.loads.free_tokens)
        placed = []
        for request, engine in chosen:
            live = self._live[request.request_id]
            self._leave_decode_queue(live)
            live.decode = Holding(engine, request.request_id, request.prompt_tokens, request.kv_tokens)
            self.loads.hold(live.decode)
            if live.prefill is not None:
                placed.append(self._join(live, live.prefill, live.decode, now))
        return placed

    def read_progress(self, number: int, side: ReadSide, tokens: int) -> None:
        """So many more hit tokens of a placement were read from the store on one side.

        Raises:
          ValueError: the number of tokens is negative.
        """
        if tokens < 0:
            raise ValueError(f"{tokens=} must be at least 0")
        live = self._placed.get(number)
        if live is not None and live.placement is not None:
            self._read(live, live.placement, side, tokens)

    def prefilled(self, number: int) -> None:
        """The prompt's KV is complete on the decode side, and the first token is there: the prefill engine is done."""
        live = self._placed.get(number)
        if live is not None and live.placement is not None and not live.prefilled:
            live.prefilled = True
            self._end_reads(live, live.placement)
            self._release(live.prefill)
            live.prefill = None

    def decoding(self, number: int) -> None:
        """The prompt's KV is in the decode engine's memory."""
        live = self._placed.get(number)
        if live is None or live.decode is None or live.decode.promised == live.request.output_tokens:
            return
        self.prefilled(number)
        live.decode = self.loads.keep_promise(live.decode, live.request.prompt_tokens)

    def finished(self, number: int) -> None:
        """A placed request is over, with whatever outcome."""
        live = self._placed.get(number)
        if live is not None:
            self._forget(live)

    def cancelled(self, request_id: int) -> Placement | None:
        """A request is not wanted any more, wherever it is.

        Returns:
          Its placement, to be told to the engines; None if it was not placed, or is over.
        """
        live = self._live.get(request_id)
        if live is None:
            return None
        placement = live.placement
        self._forget(live)
        return placement

    def engine_lost(self, engine: int) -> list[Redo]:
        """An engine is gone; it is known again when it reports again.

        Requests that it had not finished its part of wait again, in their old order.

        Returns:
          Placements that are void, in order of submission.
        """
        if not self.loads.knows(engine):
            return []
        on_engine = self.loads.requests_of(engine)
        redo = []
        for request_id, live in self._live.items():
            if live.placement is not None and request_id in on_engine:
                engines = {holding.engine for holding in (live.prefill, live.decode) if holding is not None}
                redo.append(Redo(live.placement, next(iter(engines - {engine}), None), live.prefilled))
                self._end_reads(live, live.placement)
                del self._placed[live.placement.number]
                live.placement = None
                live.prefilled = False
        self._take_all_back()
        if self.loads.lose(engine):
            groups = self.loads.group_totals(Role.DECODE)
            self._private = {group: OrderedDict() for group in groups}
            self._private_tok = dict.fromkeys(groups, 0)
        return redo

    def check_integrity(self) -> None:
        """Raises `IntegrityError` unless every request is in one place a side, and counts are sums over requests."""
        for request_id, live in self._live.items():
            self._check_request(request_id, live)
        placed = {live.placement.number: live for live in self._live.values() if live.placement is not None}
        if placed != self._placed:
            raise IntegrityError("placements are not those of the requests that are not over")
        order = {request_id: place for place, request_id in enumerate(self._live)}
        for queue in (self._prefill_queue, self._decode_queue, *self._private.values()):
            places = [order.get(request_id, -1) for request_id in queue]
            if places != sorted(places) or -1 in places:
                raise IntegrityError("a queue is out of order, or holds a request that is over")
        for group, queue in self._private.items():
            total = sum(request.prompt_tokens for request in queue.values())
            if self._private_tok[group] != total:
                raise IntegrityError(f"queue of group {group} counts {self._private_tok[group]} tokens, not {total}")
        if self._private.keys() != self.loads.group_totals(Role.DECODE).keys():
            raise IntegrityError("private queues are not those of the decode groups")
        lives = self._live.values()
        self.loads.check(
            (holding for live in lives for holding in (live.prefill, live.decode) if holding is not None),
            (read for live in lives for read in self._reads(live)),
        )

    # Placing.

    def _drain(self) -> None:
        """Phase 1, which leaves the global queue empty."""
        if not self._decode_queue:
            return
        totals = self.loads.group_totals(Role.DECODE)
        for group, tokens in self._private_tok.items():
            totals[group] += tokens
        for request, group in self._decode.drain(self._decode_queue.values(), totals):
            self._private[group][request.request_id] = request
            self._private_tok[group] += request.prompt_tokens
            self._live[request.request_id].group = group
        self._decode_queue.clear()

    def _join(self, live: _Live, prefill: Holding, decode: Holding, now: float) -> Placement:
        request = live.request
        prefill_node, decode_node = self.loads.node_of(prefill.engine), self.loads.node_of(decode.engine)
        read = self._reader.choose(
            request.hit_tokens,
            self.loads.read_q(prefill_node),
            self.loads.read_q(decode_node),
            (prefill_node, decode_node),
        )
        # At once, so that the next request of a burst sees it.
        self.loads.add_unread(prefill_node, read.prefill_tokens)
        self.loads.add_unread(decode_node, read.decode_tokens)
        live.unread_prefill, live.unread_decode = read.prefill_tokens, read.decode_tokens
        number = next(self._numbers)
        placement = Placement(number, request, prefill.engine, decode.engine, read, now - request.arrival)
        live.placement = placement
        self._placed[number] = live
        return placement

    # Giving back.

    def _read(self, live: _Live, placement: Placement, side: ReadSide, tokens: int) -> None:
        if side is ReadSide.PREFILL:
            engine, tokens = placement.prefill_engine, min(tokens, live.unread_prefill)
            live.unread_prefill -= tokens
        else:
            engine, tokens = placement.decode_engine, min(tokens, live.unread_decode)
            live.unread_decode -= tokens
        if tokens:  # else the engine may be gone, and its node
            self.loads.add_unread(self.loads.node_of(engine), -tokens)

    def _end_reads(self, live: _Live, placement: Placement) -> None:
        self._read(live, placement, ReadSide.PREFILL, live.unread_prefill)
        self._read(live, placement, ReadSide.DECODE, live.unread_decode)

    def _release(self, *holdings: Holding | None) -> None:
        for holding in holdings:
            if holding is not None:
                self.loads.release(holding)

    def _forget(self, live: _Live) -> None:
        if live.placement is not None:
            self._end_reads(live, live.placement)
            del self._placed[live.placement.number]
        if live.prefill is None and not live.prefilled:
            del self._prefill_queue[live.request.request_id]
        if live.decode is None:
            self._leave_decode_queue(live)
        self._release(live.prefill, live.decode)
        del self._live[live.request.request_id]

    def _leave_decode_queue(self, live: _Live) -> None:
        if live.group is None:
            del self._decode_queue[live.request.request_id]
        else:
            del self._private[live.group][live.request.request_id]
            self._private_tok[live.group] -= live.request.prompt_tokens
            live.group = None

    def _take_all_back(self) -> None:
        """Takes every request that is not placed from engines and private queues back to the common ones."""
        waiting = [live for live in self._live.values() if live.placement is None]
        for live in waiting:
            self._release(live.prefill, live.decode)
            live.prefill = live.decode = live.group = None
        self._prefill_queue = OrderedDict((live.request.request_id, live.request) for live in waiting)
        self._decode_queue = self._prefill_queue.copy()
        for group in self._private:
            self._private[group] = OrderedDict()
            self._private_tok[group] = 0

    # Checks.

    def _check_request(self, request_id: int, live: _Live) -> None:
        private = [group for group, queue in self._private.items() if request_id in queue]
        prefill = (request_id in self._prefill_queue, live.prefill is not None, live.prefilled)
        decode = (request_id in self._decode_queue, bool(private), live.decode is not None)
        group = [] if live.group is None else [live.group]
        if sum(prefill) != 1 or sum(decode) != 1 or private != group:
            raise IntegrityError(f"request {request_id} is not in one place a side: {prefill=}, {decode=}, {private=}")
        if (live.placement is not None) != (decode[2] and not prefill[0]):
            raise IntegrityError(f"request {request_id} has both engines and is not placed, or the other way round")
        if live.placement is None and (live.unread_prefill or live.unread_decode):
            raise IntegrityError(f"request {request_id} is read and not placed")

    def _reads(self, live: _Live) -> Iterator[tuple[int, int]]:
        if live.placement is not None and live.unread_prefill:
            yield self.loads.node_of(live.placement.prefill_engine), live.unread_prefill
        if live.placement is not None and live.unread_decode:
            yield self.loads.node_of(live.placement.decode_engine), live.unread_decode
