"""A simulated cluster that serves agents: the scheduler is the engine's own, the rest is time and bytes.

A request's way: it waits for engines; its stored blocks wait for a storage card and for room in the buffers, and are
read; its engine computes it in one or more forwards, with its keys and values streamed in and out; the decode engine's
buffer goes to the decode engine, which gives the rest of its tokens; what is new is stored. DualPath 3 has the flows,
whose numbers are named here as in `scheduling.capacity`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxdual.offline.trace import Session
from jaxdual.scheduling.decode_placement import DecodePlacement
from jaxdual.scheduling.loads import PathRequest, Role
from jaxdual.scheduling.path_modes import MODES
from jaxdual.scheduling.paths import PathScheduler, Placement
from jaxdual.scheduling.prefill_placement import PrefillPlacement
from jaxdual.scheduling.read_side import ReadSide
from jaxdual.sim.config import SimConfig
from jaxdual.sim.events import Events
from jaxdual.sim.network import send_through
from jaxdual.sim.nodes import DecodeEngine, Node, PrefillEngine, Request, build_hardware
from jaxdual.sim.prefill import PrefillGroup, PrefillModel

_MOST_IDLE_SAMPLES = 100  # in a row: nothing is under way that could end the wait
_MOST_IDLE_FETCHES = 10


class ClusterSim:
    """One simulation; `run` once.

    Args:
      config: what is simulated.
      sessions: what agents do.
      starts: when each begins, in seconds.
      finished: called with each request that is over and the time.

    Attributes:
      samples: requests by where they are, once each `window_seconds`.
      promised_seconds: tokens of the decode engines' memory that are promised or used, times the seconds that they are.
    """

    def __init__(
        self,
        config: SimConfig,
        sessions: Sequence[Session],
        starts: Sequence[float],
        finished: Callable[[Request, float], None],
    ) -> None:
        self.config, self.events = config, Events()
        self.mode = MODES[config.mode]
        spec, model = config.cluster, config.model
        self._token_bytes = model.kv_token_bytes
        self._block = config.scheduler.block_tokens
        self._prefill = PrefillModel(config, self.mode)
        hardware = build_hardware(config)
        self.prefill_nodes, self.decode_nodes = hardware.prefill_nodes, hardware.decode_nodes
        self.prefill_groups, self.decode_groups = hardware.prefill_groups, hardware.decode_groups
        self.prefill_engines = [engine for group in self.prefill_groups for engine in group]
        self.decode_engines = [engine for group in self.decode_groups for engine in group]
        self._nodes = [*self.prefill_nodes, *self.decode_nodes]
        lockstep = self.prefill_groups if model.expert_parallel else [[one] for one in self.prefill_engines]
        self.forwards = [PrefillGroup(self, self._prefill, engines) for engines in lockstep]
        self._forward_of = {
            one.report.engine: group for group, engines in zip(self.forwards, lockstep, strict=True) for one in engines
        }
        self.scheduler = PathScheduler(
            self.mode,
            PrefillPlacement.from_rates(
                spec.snic / model.kv_token_bytes,
                self._prefill.rate(sessions),
                read_seconds=config.scheduler.read_seconds,
                compute_seconds=config.scheduler.compute_seconds,
            ),
            DecodePlacement(),
            self._block,
        )
        self._sessions, self._starts, self._finished = sessions, starts, finished
        self._context = [0] * len(sessions)  # tokens of each agent after its last turn
        self._stored = [0] * len(sessions)  # of them, those in the store
        self._known: set[int] = set()  # ids of a trace's blocks that are stored
        self._numbers = 0
        self._waiting: dict[int, Request] = {}  # that are not placed, by number
        self.promised_seconds = 0.0
        # Groups fetch one after another; each slot of the period has those of both roles whose turn it is then.
        slots = max(len(self.prefill_groups), len(self.decode_groups))
        self._slot_seconds = spec.fetch_seconds / slots
        self._slots = list(
            zip(_spread(len(self.prefill_groups), slots), _spread(len(self.decode_groups), slots), strict=True)
        )
        self._fetch_pending = False
        self._blocked: set[int] = set()  # nodes whose first read waits for a buffer, by their place in all nodes
        self._agents_left, self._last = len(sessions), 0.0
        self._idle_samples = 0  # in a row, in which nothing was under way
        self._promised, self._promised_since = 0, 0.0
        self.samples: dict[str, list[int]] = {
            name: [] for name in ("wait for engines", "wait for the store", "at prefill engines", "decode")
        }

    def run(self) -> float:
        """Runs until all agents are done; seconds."""
        for group in self.prefill_groups:
            reports = [engine.report for engine in group]
            self.scheduler.report(Role.PREFILL, reports[0].group, reports)
        for others in self.decode_groups:
            reports = [engine.report for engine in others]
            self.scheduler.report(Role.DECODE, reports[0].group, reports)
        for agent, start in enumerate(self._starts):
            self.events.at(start, self._next_turn, agent, 0)
        self._sample()
        self.events.run()
        return self._last

    def _sample(self) -> None:
        """Counts who waits where, until all agents are done."""
        self.samples["wait for engines"].append(self.scheduler.num_waiting)
        self.samples["wait for the store"].append(sum(len(node.queue) + node.reading for node in self._nodes))
        self.samples["at prefill engines"].append(sum(len(engine.ready) for engine in self.prefill_engines))
        self.samples["decode"].append(sum(len(engine.requests) for engine in self.decode_engines))
        # Groups that fetch, and get nothing, keep a simulation going for ever.
        self._idle_samples = self._idle_samples + 1 if len(self.events) <= self._fetch_pending else 0
        idle = self._idle_samples * self.config.window_seconds
        several = _MOST_IDLE_FETCHES * self.config.cluster.fetch_seconds
        if self._agents_left and self._idle_samples > _MOST_IDLE_SAMPLES and idle > several:
            raise RuntimeError(f"{self._agents_left} agents wait for what never comes: a defect of the simulator")
        if self._agents_left:
            self.events.at(self.events.now + self.config.window_seconds, self._sample)

    # Agents.

    def _next_turn(self, agent: int, number: int) -> None:
        turn = self._sessions[agent].turns[number]
        kept = self._context[agent] - turn.drop
        prompt = kept + turn.append
        if self.config.workload.stored and not number:
            kept = self._stored[agent] = prompt // self._block * self._block
        stored = min(kept, self._stored[agent])
        if turn.block_ids:  # other agents may have had the same blocks
            known = next((i for i, one in enumerate(turn.block_ids) if one not in self._known), len(turn.block_ids))
            stored = max(stored, min(prompt, int(known * self._sessions[agent].block_tokens)))
        hit = min(stored, prompt - 1) // self._block * self._block
        request = Request(agent, number, self._numbers, prompt, hit, turn.generate, self.events.now, cached=hit)
        self._numbers += 1
        self._context[agent] = prompt + turn.generate
        self._waiting[request.number] = request
        self.scheduler.submit(PathRequest(request.number, prompt, hit, turn.generate, request.arrival))
        self._fetch_soon()

    def _over(self, request: Request) -> None:
        """All tokens of a request are given."""
        now, plan = self.events.now, request.plan
        self.scheduler.finished(plan.number)
        self._promise(-request.prompt - request.output)
        self._fetch_soon()
        context = request.prompt + request.output
        stored = context // self._block * self._block
        if self.mode.transfers:
            engine = self._decode(plan)
            new = max(0, stored - request.prompt // self._block * self._block) * self._token_bytes
            end = send_through(now, new, (engine.nic.read, engine.nic.write, engine.node.dram))
            self.events.at(end, self._write, engine.node, new)
        self._stored[request.agent] = stored
        self._known.update(self._sessions[request.agent].turns[request.turn].block_ids)
        self._finished(request, now)
        turns = self._sessions[request.agent].turns
        if request.turn + 1 < len(turns):
            delay = turns[request.turn + 1].delay
            self.events.at(now + delay, self._next_turn, request.agent, request.turn + 1)
        else:
            self._agents_left -= 1
            self._last = now

    def _write(self, node: Node, nbytes: int) -> None:
        """Stores what is in a node's memory; nobody waits for it."""
        send_through(self.events.now, nbytes, (node.dram, node.snic.read))

    # Placing.

    def _fetch_soon(self) -> None:
        """Has groups fetch as their turns come, while anything waits for them."""
        if not self._fetch_pending and self.scheduler.num_waiting:
            self._fetch_pending = True
            slot = int(self.events.now / self._slot_seconds) + 1
            self.events.at(slot * self._slot_seconds, self._fetch, slot)

    def _fetch(self, slot: int) -> None:
        self._fetch_pending = False
        scheduler, now = self.scheduler, self.events.now
        prefill, decode = self._slots[slot % len(self._slots)]
        for number in prefill:
            reports = [engine.report for engine in self.prefill_groups[number]]
            if scheduler.has_work(Role.PREFILL, reports[0].group):
                for placement in scheduler.fetch_prefill(reports[0].group, reports, now):
                    self._place(placement)
        for number in decode:
            group = self.decode_groups[number]
            if scheduler.has_work(Role.DECODE, group[0].report.group):
                for engine in group:
                    engine.report.free_tokens = engine.capacity - engine.used
                reports = [engine.report for engine in group]
                for placement in scheduler.fetch_decode(reports[0].group, reports, now):
                    self._place(placement)
        if scheduler.num_waiting:
            self._fetch_pending = True
            self.events.at((slot + 1) * self._slot_seconds, self._fetch, slot + 1)

    def _place(self, placement: Placement) -> None:
        request = self._waiting.pop(placement.request.request_id)
        self._promise(request.prompt + request.output)
        request.placement, request.placed = placement, self.events.now
        if not self.mode.transfers:
            request.allocated = self.events.now
            self._ready(request)
            return
        read = placement.read
        sides = ((ReadSide.PREFILL, read.prefill_tokens), (ReadSide.DECODE, read.decode_tokens))
        parts = [part for part in sides if part[1]]
        request.reads = len(parts)
        if not parts:
            node = self._node_of(placement, ReadSide.DECODE)
            self._nodes[node].cold.append(request)
            self._read_next(node)
        for side, tokens in parts:
            node = self._node_of(placement, side)
            self._nodes[node].queue.append((request, side, tokens))
            self._read_next(node)

    def _promise(self, tokens: int) -> None:
        now = self.events.now
        self.promised_seconds += self._promised * (now - self._promised_since)
        self._promised, self._promised_since = self._promised + tokens, now

    def _node_of(self, placement: Placement, side: ReadSide) -> int:
        if side is ReadSide.PREFILL:
            return self.prefill_engines[placement.prefill_engine].report.node
        return self._decode(placement).report.node

    def _decode(self, placement: Placement) -> DecodeEngine:
        return self.decode_engines[placement.decode_engine - len(self.prefill_engines)]

    # Reading.

    def _read_next(self, number: int) -> None:
        """Begins the next read of a node if its card is free and the buffers have room: not before, since what waits
        with a buffer keeps others from reading.
        """
        node = self._nodes[number]
        while node.cold and self._allocate(node.cold[0], ReadSide.DECODE, 0):
            self._ready(node.cold.popleft())
        if node.cold:
            self._blocked.add(number)
            for request in node.cold:
                request.blocked = self.events.now if request.blocked is None else request.blocked
        if node.reading:
            return
        # Of a read on both sides the prefill side's part begins first: whoever holds a part of a decode side's buffer
        # is being read then, and gives it back.
        place = next((i for i, (request, side, _) in enumerate(node.queue) if self._may_begin(request, side)), None)
        if place is not None:
            request, side, tokens = node.queue[place]
            if not self._allocate(request, side, tokens):
                self._blocked.add(number)
                request.blocked = self.events.now if request.blocked is None else request.blocked
                return
            del node.queue[place]
            node.reading = True
            end = send_through(self.events.now, tokens * self._token_bytes, (node.snic.write, node.dram))
            self.events.at(end, self._read_done, number, request, side, tokens)
            if side is ReadSide.PREFILL:
                request.prefill_part_began = True
                self._read_next(self._node_of(request.plan, ReadSide.DECODE))

    @staticmethod
    def _may_begin(request: Request, side: ReadSide) -> bool:
        return side is ReadSide.PREFILL or request.prefill_part_began or not request.plan.read.prefill_tokens

    def _allocate(self, request: Request, side: ReadSide, tokens: int) -> bool:
        """Takes what a read fills, all of it or nothing. Of a read on both sides each takes its own: else the one would
        hold what those before the other wait for.
        """
        read = request.plan.read
        decode = None if side is ReadSide.PREFILL and read.decode_tokens else self._decode(request.plan).node.buffer
        own = self._nodes[self._node_of(request.plan, side)].buffer if side is ReadSide.PREFILL else None
        # Without layerwise prefill nothing is read for an engine that has no memory for all of it.
        memory = None if self.mode.layerwise else self.prefill_engines[request.plan.prefill_engine].memory
        whole, part = request.prompt * self._token_bytes, tokens * self._token_bytes
        if decode is not None and not decode.fits(whole):
            return False
        if own is not None and not own.fits(part):
            return False
        if memory is not None and not memory.fits(whole):
            return False
        if memory is not None:
            memory.take(whole)
        if decode is not None:
            decode.take(whole)
            request.allocated = self.events.now
        if own is not None:
            own.take(part)
        return True

    def _freed(self) -> None:
        """A buffer has room again."""
        blocked, self._blocked = self._blocked, set()
        for number in sorted(blocked):
            self._read_next(number)

    def _read_done(self, number: int, request: Request, side: ReadSide, tokens: int) -> None:
        self._nodes[number].reading = False
        self.scheduler.read_progress(request.plan.number, side, tokens)
        request.reads -= 1
        if not request.reads:
            self._ready(request)
        self._read_next(number)

    def _ready(self, request: Request) -> None:
        request.ready = self.events.now
        engine = self.prefill_engines[request.plan.prefill_engine]
        engine.ready.append(request)
        self._forward_of[engine.report.engine].start()

    # Computing.

    def bring(self, engine: PrefillEngine, request: Request, count: int) -> tuple[float, float]:
        """Sends what is known of a prompt to its prefill engine; seconds until it has passed, and to submit it."""
        now, decode = self.events.now, self._decode(request.plan)
        by_prefill = request.plan.read.prefill_tokens
        again = request.pushed and not self.mode.layerwise  # all of it is still there
        from_prefill = 0 if again else min(request.cached, by_prefill) * self._token_bytes
        from_decode = 0 if again else max(0, request.cached - by_prefill) * self._token_bytes
        come = max(
            send_through(now, from_prefill, (engine.node.dram, engine.nic.read, engine.nic.write)),  # PE3, PE4
            send_through(now, from_decode, (decode.node.dram, decode.nic.read, engine.nic.write)),  # DE3 to DE5
        )
        return come - now, self._submit_seconds(from_prefill + from_decode)

    def take_away(self, engine: PrefillEngine, request: Request, count: int) -> tuple[float, float]:
        """Sends what a forward makes of a prompt to the decode side; likewise."""
        now, decode = self.events.now, self._decode(request.plan)
        out = (count + (0 if request.pushed else request.plan.read.prefill_tokens)) * self._token_bytes
        request.pushed = True
        go = send_through(now, out, (engine.nic.read, decode.nic.write, decode.node.dram))  # PE5 to PE7
        return go - now, self._submit_seconds(out)

    def _submit_seconds(self, nbytes: float) -> float:
        """To submit the copies of the Layer Blocks of so many bytes."""
        return nbytes / (self._token_bytes * self._block) * self._prefill.layers * self.config.cluster.copy_seconds

    def prefilled(self, request: Request) -> None:
        """A prompt is computed, and its first token is there."""
        now, plan = self.events.now, request.plan
        request.first = now
        self.scheduler.prefilled(plan.number)
        self._fetch_soon()
        if not self.mode.transfers:
            self._in_memory(request)
            return
        if not self.mode.layerwise:
            self.prefill_engines[plan.prefill_engine].memory.give_back(request.prompt * self._token_bytes)
        if plan.read.prefill_tokens:
            buffer = self._nodes[self._node_of(plan, ReadSide.PREFILL)].buffer
            buffer.give_back(plan.read.prefill_tokens * self._token_bytes)
        decode = self._decode(plan)
        whole = request.prompt * self._token_bytes
        end = send_through(now, whole, (decode.node.dram, decode.nic.read, decode.nic.write))  # PE8, PE9 or DE6, DE7
        new = (request.prompt // self._block * self._block - request.hit) * self._token_bytes
        self._write(decode.node, max(0, new))  # its full blocks are stored from the buffer
        self.events.at(end, self._in_memory, request)
        self._freed()

    def _in_memory(self, request: Request) -> None:
        """A prompt is in its decode engine's memory."""
        now, engine = self.events.now, self._decode(request.plan)
        if self.mode.transfers:
            engine.node.buffer.give_back(request.prompt * self._token_bytes)
            self._freed()
        self.scheduler.decoding(request.plan.number)
        if request.output == 1:
            self._over(request)
            return
        engine.used += request.prompt
        engine.requests[request.number] = request
        engine.joined.append(request.number)
        engine.batch.join(now, request.number, request.prompt + 1, request.output - 1)
        self._wake(engine)

    # Decoding.

    def _wake(self, engine: DecodeEngine) -> None:
        time = engine.batch.next_time
        if time is not None and (engine.wakes is None or time < engine.wakes):
            engine.wakes = time
            self.events.at(time, self._advance, engine, time)

    def _advance(self, engine: DecodeEngine, time: float) -> None:
        if engine.wakes != time:
            return  # something nearer has come between
        engine.wakes = None
        done = engine.batch.advance(time)
        if engine.joined and engine.batch.all_run:
            second = time + engine.batch.step_seconds
            for number in engine.joined:
                engine.requests[number].second = second
            engine.joined.clear()
        for one in done:
            request = engine.requests.pop(one.sequence)
            engine.used -= request.prompt
            self._over(request)
        self._wake(engine)


def _spread(groups: int, slots: int) -> list[list[int]]:
    """Numbers of groups, as evenly over the slots as they go."""
    spread: list[list[int]] = [[] for _ in range(slots)]
    for group in range(groups):
        spread[group * slots // groups].append(group)
    return spread
