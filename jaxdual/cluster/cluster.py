"""The requests of a cluster and what becomes of them, as a state machine: messages in, messages out, no I/O.

A request gets a prefill and a decode engine. The decode engine reserves memory for the prompt's keys and values, the
prefill engine computes them, gives the first token and writes them there, and the decode engine goes on. Each such
attempt has an id of its own at the engines. When an engine of it is lost, or anything of it fails, the request is
placed anew with the tokens that it has, and goes on from these.

Where the engines share a store, it is asked first how much of a prompt it has. Of these blocks the prefill engine reads
some, the decode engine others, to where they belong, as the scheduler says; the prefill engine is told when they are
there.

Whatever was granted is settled: the prefill engine says of each prompt that it was given, once, that nothing of it is
under way any more, and this is handed on to the decode engine unless it takes the prompt over. A prefill engine that
dies can't say so; then the decode engines are told that it is dead, and find out when it can write no more.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from jaxdual.cluster.attempts import Attempt, Live, OutputState, Phase
from jaxdual.engine.request import Hits, Request, TokenEvent
from jaxdual.engine.wire import (
    Abort,
    Add,
    Adopt,
    AgentAt,
    ArrivalLost,
    Events,
    Expect,
    Forget,
    Granted,
    HandedOff,
    HitsRead,
    PeerDied,
    Prefill,
    Settled,
)
from jaxdual.frames import Message
from jaxdual.kv.keys import BlockKey, KeyChain
from jaxdual.kv.slots import IntegrityError
from jaxdual.outputs import EngineStats
from jaxdual.scheduling.loads import EngineReport, PathRequest, Role
from jaxdual.scheduling.paths import PathScheduler, Placement
from jaxdual.scheduling.read_side import ReadSide

MOST_FAILURES = 6  # of one request, before it is taken for the cause of what happens to its engines
_GROUPS = {Role.PREFILL: 0, Role.DECODE: 1}


@dataclass(slots=True)
class _Member:
    """An engine that takes requests, and the address of its KV agent; "" while that starts."""

    role: Role
    agent: str
    stats: EngineStats


class Cluster:
    """All requests and all engines that take some. One loop owns it.

    Args:
      scheduler: places requests on pairs of engines.
      send: hands a message to an engine, by number.
      deliver: takes what requests have given.
      page_size: tokens a page.
      clock: seconds, monotonic.
      key_chain: of a request's blocks in a store that all engines share, given the request's salt; None if there is
        none, or if engines read it by themselves.
      look: asks how many of the leading blocks of the request of some number are stored, for `found` to say.

    Attributes:
      prompt_tokens: of all requests so far.
      unwanted_tokens: that engines gave, or are to give, for the sake of what they compute before.
    """

    def __init__(
        self,
        scheduler: PathScheduler,
        *,
        send: Callable[[int, Message], None],
        deliver: Callable[[list[TokenEvent]], None],
        page_size: int,
        clock: Callable[[], float],
        key_chain: Callable[[bytes], KeyChain] | None = None,
        look: Callable[[int, Sequence[BlockKey]], None] = lambda number, keys: None,
    ) -> None:
        self._scheduler = scheduler
        self._send, self._deliver, self._clock = send, deliver, clock
        self._page_size = page_size
        self._key_chain, self._look = key_chain, look
        self._looking: set[int] = set()  # numbers of the requests for which the store is asked
        self._members: dict[int, _Member] = {}
        self._numbers = itertools.count()
        self._lives: dict[str, Live] = {}
        self._by_number: dict[int, Live] = {}
        self._attempts: dict[str, Attempt] = {}
        self._alone: list[Live] = []  # those that wait for a decode engine only
        self._outgoing: list[TokenEvent] = []  # to be delivered, in order
        self.prompt_tokens = 0
        self.unwanted_tokens = 0
        self._held = False

    def __len__(self) -> int:
        """Requests that have not ended."""
        return len(self._lives)

    @property
    def num_waiting(self) -> int:
        """Outputs that no engine has been given yet."""
        waiting = [live for live in self._lives.values() if live.current is None or live.current.phase is Phase.GRANT]
        return sum(not output.ended for live in waiting for output in live.outputs)

    # From the front.

    def add(self, request: Request) -> None:
        """Takes a request."""
        given = request.resumed or ((),) * request.params.n
        outputs = [OutputState(list(tokens or ()), tokens is None) for tokens in given]
        live = Live(request, next(self._numbers), outputs, self._clock())
        self._lives[request.request_id] = self._by_number[live.number] = live
        self.prompt_tokens += len(request.prompt_token_ids)
        self._place(live)
        self._fetch()

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Ends a request, or one of its outputs; unknown ids are ignored."""
        live = self._lives.get(request_id)
        if live is None:
            return
        for number, output in enumerate(live.outputs):
            output.ended |= index in (None, number)
        attempt = live.current
        if all(output.ended for output in live.outputs):
            self._forget(live)
        elif attempt is not None and attempt.phase is Phase.DECODE:
            self._send(attempt.decode, Abort(attempt.name, index))
        elif live.lead.ended and live not in self._alone:
            # What a prefill engine would give is of no use to the others.
            if attempt is not None:
                self._give_up(attempt)
                self._leave_scheduler(attempt)
                live.current = None
            self._scheduler.cancelled(live.number)
            self._looking.discard(live.number)
            self._place(live)
        self._fetch()

    # From the engines.

    def joined(self, number: int, role: Role, agent: str, stats: EngineStats) -> None:
        """An engine takes requests from now on; `agent` is the address of its KV agent."""
        self._members[number] = _Member(role, agent, stats)
        self._fetch()

    def died(self, number: int) -> None:
        """An engine is gone, with all that it had."""
        member = self._members.pop(number, None)
        if member is None:
            return
        self._scheduler.engine_lost(number)
        if member.role is Role.PREFILL:
            # Its KV agent may have had other addresses before.
            targets = [attempt.target for attempt in self._attempts.values() if attempt.prefill == number]
            addresses = {member.agent, *(target.peer for target in targets if target is not None)} - {""}
            for other, decode in self._members.items():
                if decode.role is Role.DECODE:
                    for address in sorted(addresses):
                        self._send(other, PeerDied(address))
        lost = []
        for attempt in list(self._attempts.values()):
            if attempt.prefill == number and attempt.phase is not Phase.DECODE:
                del self._attempts[attempt.name]
                lost.append(attempt)
            elif attempt.decode == number:
                if attempt.phase is Phase.PREFILL and attempt.prefill is not None:
                    self._send(attempt.prefill, Abort(attempt.name))
                    attempt.phase = Phase.VOID
                elif attempt.phase is not Phase.VOID:
                    del self._attempts[attempt.name]
                attempt.stores = False  # the next engine of that number knows nothing of it
                lost.append(attempt)
        for attempt in lost:
            self._redo(attempt, "an engine of it was lost again and again")
        self._fetch()
        self._deliver_outgoing()

    def message(self, number: int, message: object) -> None:
        """An engine has something to say."""
        match message:
            case Events(events, stats):
                if stats is not None and number in self._members:
                    self._members[number].stats = stats
                self._take(events)
            case AgentAt(address):
                if number in self._members:
                    self._members[number].agent = address
            case Granted(name):
                self._granted(self._attempts.get(name), message, number)
            case HitsRead(name):
                self._hits_read(self._attempts.get(name), message, number)
            case HandedOff(name, complete, broken):
                attempt = self._attempts.get(name)
                if attempt is not None:
                    attempt.handed, attempt.broken = complete, broken
                    self._hand_over(attempt)
            case ArrivalLost(name, slow):
                attempt = self._attempts.get(name)
                if attempt is not None and attempt.phase is Phase.PREFILL:
                    attempt.live.reads &= not slow
                    self._give_up(attempt)
                    self._redo(attempt, "its keys and values were lost again and again")
                elif attempt is not None:
                    attempt.stores = False
        self._fetch()
        self._deliver_outgoing()

    def found(self, number: int, blocks: int) -> None:
        """So many leading blocks of a request's prompt are stored."""
        if number in self._looking:
            self._looking.remove(number)
            self._submit(self._by_number[number], blocks * self._page_size)
            self._fetch()

    @property
    def num_unsettled(self) -> int:
        """Attempts of which something may be under way, wanted or not."""
        return len(self._attempts)

    def hold(self) -> None:
        """Gives engines nothing until `go_on`.

        Raises:
          ValueError: they have something.
        """
        if self._lives or self._attempts:
            raise ValueError(f"{max(len(self._lives), len(self._attempts))} requests are under way")
        self._held = True

    def go_on(self, scheduler: PathScheduler | None = None) -> None:
        """Ends `hold`, with another scheduler if one is given; requests that have come meanwhile are placed."""
        self._held = False
        if scheduler is not None:
            self._scheduler = scheduler
            self._looking.clear()
            for live in self._lives.values():
                if live not in self._alone:
                    self._place(live)
        self._fetch()

    def check_integrity(self) -> None:
        """Raises `IntegrityError` unless each request is in one place, and each attempt is a request's."""
        self._scheduler.check_integrity()
        for live in self._lives.values():
            attempt = live.current
            if attempt is not None and self._attempts.get(attempt.name) is not attempt:
                raise IntegrityError(f"request {live.request.request_id}: its attempt is not known")
            if self._by_number.get(live.number) is not live:
                raise IntegrityError(f"request {live.request.request_id}: its number is not known")
        for name, attempt in self._attempts.items():
            if (attempt.live.current is attempt) == (attempt.phase is Phase.VOID):
                raise IntegrityError(f"attempt {name} is {attempt.phase.name} and is or is not the present one")
        if len(self._by_number) != len(self._lives):
            raise IntegrityError(f"{len(self._by_number)} numbers for {len(self._lives)} requests")

    # Placing.

    def _place(self, live: Live) -> None:
        """Has a request wait for engines."""
        if live.goes_on_alone:
            self._alone.append(live)
            return
        blocks = (live.length - 1) // self._page_size
        if self._key_chain is None or not blocks or live.wants_scores or not live.reads:
            self._submit(live, 0)
            return
        live.keys = self._key_chain(self._salt(live)).upto(live.tokens, blocks)
        self._looking.add(live.number)
        self._look(live.number, live.keys)

    def _submit(self, live: Live, hit_tokens: int) -> None:
        self._scheduler.submit(PathRequest(live.number, live.length, hit_tokens, live.left, live.request.arrival))

    def _salt(self, live: Live) -> bytes:
        """What tokens have no meaning of must not be taken for what they would have."""
        return live.request.salt if self._scheduler.mode.transfers else live.request.salt + b"\0nothing moved"

    def _fetch(self) -> None:
        """Asks the scheduler for work, on behalf of the engines."""
        if self._held:
            return
        decoding = [number for number, member in self._members.items() if member.role is Role.DECODE]
        while self._alone and decoding:
            live = self._alone.pop(0)
            self._start_alone(live, min(decoding, key=self._load))
        for _ in range(2):
            if not self._scheduler.num_waiting or not self._fetch_once():
                break

    def _fetch_once(self) -> bool:
        """Whether a request has come back that others might do."""
        now, back = self._clock(), False
        for role, fetch in (
            (Role.PREFILL, self._scheduler.fetch_prefill),
            (Role.DECODE, self._scheduler.fetch_decode),
        ):
            reports = [
                self._report(number) for number, member in self._members.items() if member.role is role and member.agent
            ]
            if reports:
                for placement in fetch(_GROUPS[role], reports, now):
                    live = self._by_number[placement.request.request_id]
                    if self._members[placement.prefill_engine].agent and self._members[placement.decode_engine].agent:
                        self._start(live, placement)
                    else:  # it was chosen when the agent was there, before the other engine was
                        self._scheduler.finished(placement.number)
                        self._place(live)
                        back = True
        return back

    def _report(self, number: int) -> EngineReport:
        member = self._members[number]
        stats = member.stats
        return EngineReport(
            engine=number,
            node=number,
            group=_GROUPS[member.role],
            seq=stats.num_running + stats.num_waiting,
            tok=0,
            read_q=0,
            free_tokens=stats.kv_blocks_available * self._page_size,
        )

    def _load(self, number: int) -> int:
        return sum(attempt.decode == number for attempt in self._attempts.values())

    def _start(self, live: Live, placement: Placement) -> None:
        attempt = self._new_attempt(live, placement.decode_engine, Phase.GRANT, placement)
        hit_blocks = placement.request.hit_tokens // self._page_size
        if self._scheduler.mode.transfers:
            here = placement.read.prefill_tokens // self._page_size
            attempt.hits = Hits(here, hit_blocks - here)
        else:
            attempt.hits = Hits(hit_blocks)
        here = attempt.hits.here
        keys = tuple((live.keys or ())[here : here + attempt.hits.there])
        peer = self._members[placement.prefill_engine].agent
        self._send(attempt.decode, Expect(attempt.name, attempt.tokens, peer, keys, here))

    def _start_alone(self, live: Live, decode: int) -> None:
        attempt = self._new_attempt(live, decode, Phase.DECODE, None)
        self._send(decode, Add(attempt.request(live.resumed)))

    def _new_attempt(self, live: Live, decode: int, phase: Phase, placement: Placement | None) -> Attempt:
        live.attempts += 1
        live.queue_seconds = self._clock() - live.added - live.allocation_seconds
        attempt = Attempt(
            f"{live.request.request_id}#{live.attempts}",
            self._salt(live),
            live,
            None if placement is None else placement.number,
            None if placement is None else placement.prefill_engine,
            decode,
            live.length,
            self._clock(),
            phase,
        )
        live.current = self._attempts[attempt.name] = attempt
        return attempt

    # An attempt's way.

    def _granted(self, attempt: Attempt | None, granted: Granted, decode: int) -> None:
        if attempt is None or attempt.phase is not Phase.GRANT:
            # Forgotten meanwhile: nobody was told of the grant.
            self._send(decode, Forget(granted.request_id))
            self._send(decode, Settled(granted.request_id))
            return
        live = attempt.live
        live.allocation_seconds += self._clock() - attempt.began
        if granted.target is None or attempt.prefill is None:
            self._end_attempt(attempt)
            self._start_alone(live, decode)
            return
        attempt.target, attempt.phase = granted.target, Phase.PREFILL
        moves = self._scheduler.mode.transfers
        self._send(attempt.prefill, Prefill(attempt.prefill_request(), granted.target, attempt.hits, moves))

    def _hits_read(self, attempt: Attempt | None, message: HitsRead, engine: int) -> None:
        """An engine has read what it was to read of a prompt."""
        if attempt is None or attempt.placement is None:
            return
        if engine == attempt.decode:
            self._scheduler.read_progress(attempt.placement, ReadSide.DECODE, attempt.hits.there * self._page_size)
            if attempt.phase is Phase.PREFILL and attempt.prefill is not None:
                self._send(attempt.prefill, message)
        else:
            self._scheduler.read_progress(attempt.placement, ReadSide.PREFILL, attempt.hits.here * self._page_size)

    def _hand_over(self, attempt: Attempt) -> None:
        """The decode engine takes the prompt over when it is complete and what was wanted of its end is known."""
        if attempt.handed is None or attempt.phase is Phase.DECODE:
            return
        live = attempt.live
        if attempt.phase is Phase.VOID:
            if attempt.stores and attempt.handed and attempt.decode in self._members:
                del self._attempts[attempt.name]
                self._send(attempt.decode, Adopt(attempt.one_more(), self._stored(attempt)))
                self.unwanted_tokens += 1
            else:
                self._settle(attempt)
        elif not attempt.handed:
            self._settle(attempt)
            self._redo(attempt, "its keys and values could not be handed over, again and again")
        elif attempt.computed:
            attempt.phase = Phase.DECODE
            if attempt.placement is not None:
                self._scheduler.prefilled(attempt.placement)
                self._scheduler.decoding(attempt.placement)
            if live.lead.ended:
                # The others have no use for a lead that goes on.
                self._settle(attempt)
                self._end_attempt(attempt)
                self._start_alone(live, attempt.decode)
                return
            adopt = Adopt(attempt.request(live.resumed), self._stored(attempt), self._scheduler.mode.transfers)
            self._send(attempt.decode, adopt)

    def _stored(self, attempt: Attempt) -> int:
        """Leading blocks of an attempt's prompt that are in the store, as far as is known: an engine that looks for
        itself does not say what it has found there, and what in its own memory.
        """
        return 0 if self._key_chain is None else attempt.cached // self._page_size

    def _settle(self, attempt: Attempt) -> None:
        """Nothing of an attempt's prompt is under way any more, and the decode engine won't take it over."""
        del self._attempts[attempt.name]
        if attempt.decode in self._members:
            self._send(attempt.decode, Settled(attempt.name, attempt.broken))

    def _take(self, events: Iterable[TokenEvent]) -> None:
        """What engines have given, as their requests' own."""
        for event in events:
            attempt = self._attempts.get(event.request_id)
            if attempt is None or attempt.live.current is not attempt:
                continue
            live = attempt.live
            output = live.outputs[event.index]
            if event.finish_reason == "error":
                if attempt.phase is Phase.DECODE:
                    del self._attempts[attempt.name]
                else:
                    self._give_up(attempt)
                self._redo(attempt, event.error or "an engine has failed")
                continue
            if output.ended or event.finish_reason == "abort":
                continue
            reason = event.finish_reason
            if attempt.phase is Phase.PREFILL:
                attempt.computed, attempt.cached = True, event.cached_tokens
                live.cached = event.cached_tokens if live.cached is None else live.cached
                if live.request.dysco is not None:  # another token comes when those before it were watched
                    self.unwanted_tokens += event.token is not None
                    live.queue_seconds += event.queue_seconds or 0.0
                    live.read_seconds += event.read_seconds or 0.0
                    self._hand_over(attempt)
                    continue
                if reason == "length" and len(output.tokens) + 1 < (live.request.params.max_tokens or 0):
                    reason = None  # of its part
            if event.token is not None:
                output.tokens.append(event.token)
            output.ended = reason is not None
            own = dataclasses.replace(
                event,
                request_id=live.request.request_id,
                finish_reason=reason,
                cached_tokens=event.cached_tokens if live.cached is None else live.cached,
            )
            if own.queue_seconds is not None:
                own.queue_seconds += live.queue_seconds
                own.read_seconds = (own.read_seconds or 0.0) + live.read_seconds
                own.allocation_seconds = live.allocation_seconds
            self._outgoing.append(own)
            if all(one.ended for one in live.outputs):
                if attempt.phase is Phase.PREFILL and self._key_chain is not None and self._scheduler.mode.transfers:
                    self._leave_to_store(attempt)
                self._forget(live, told=attempt.phase is Phase.DECODE)
            elif attempt.phase is Phase.PREFILL:
                self._hand_over(attempt)

    def _deliver_outgoing(self) -> None:
        events, self._outgoing = self._outgoing, []
        if events:
            self._deliver(events)

    # Ends.

    def _give_up(self, attempt: Attempt) -> None:
        """An attempt is not wanted any more; what is under way of it comes to an end by itself."""
        if attempt.phase is Phase.GRANT:
            self._send(attempt.decode, Forget(attempt.name))
            del self._attempts[attempt.name]
        elif attempt.phase is Phase.PREFILL and attempt.prefill is not None:
            attempt.phase = Phase.VOID
            self._send(attempt.decode, Forget(attempt.name))
            if attempt.handed is None:
                self._send(attempt.prefill, Abort(attempt.name))
            else:
                self._settle(attempt)
        elif attempt.phase is Phase.DECODE:
            self._send(attempt.decode, Abort(attempt.name))
            del self._attempts[attempt.name]

    def _leave_to_store(self, attempt: Attempt) -> None:
        """The prompt's first token was its last: its blocks still go to the decode engine, which stores them."""
        attempt.live.current = None
        attempt.phase, attempt.stores = Phase.VOID, True
        self._leave_scheduler(attempt)
        self._hand_over(attempt)

    def _end_attempt(self, attempt: Attempt) -> None:
        """An attempt is over, and its engines know."""
        self._attempts.pop(attempt.name, None)
        attempt.live.current = None
        self._leave_scheduler(attempt)

    def _leave_scheduler(self, attempt: Attempt) -> None:
        if attempt.placement is not None:
            self._scheduler.finished(attempt.placement)

    def _redo(self, attempt: Attempt, why: str) -> None:
        """Places the request of an attempt that is lost anew, or ends it."""
        live = attempt.live
        if live.current is not attempt:
            return
        live.current = None
        self._leave_scheduler(attempt)
        self._scheduler.cancelled(live.number)
        live.failures += 1
        if live.failures < MOST_FAILURES:
            self._place(live)
            return
        self._outgoing += [
            TokenEvent(live.request.request_id, index, None, finish_reason="error", error=why)
            for index, output in enumerate(live.outputs)
            if not output.ended
        ]
        self._forget(live)

    def _forget(self, live: Live, *, told: bool = False) -> None:
        """A request is over.

        Args:
          told: its decode engine knows.
        """
        attempt = live.current
        live.current = None
        if attempt is not None:
            if told:
                self._attempts.pop(attempt.name, None)
            else:
                self._give_up(attempt)
            self._leave_scheduler(attempt)
        self._scheduler.cancelled(live.number)
        if live in self._alone:
            self._alone.remove(live)
        self._looking.discard(live.number)
        self._lives.pop(live.request.request_id, None)
        self._by_number.pop(live.number, None)
