"""What an engine's KV memory has to do with the world outside, by way of the KV agent: block store and other engines.

Each block that becomes full is brought to a staging page as soon as it is shared, and stored from there; stored blocks
of a prompt are read before it is queued. Blocks of a prompt may go to another engine, or come from one.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxdual.agent.wire import GroupSlots, Save, ToDevice
from jaxdual.complaints import Complaints
from jaxdual.engine.agent_link import Agent, AgentLink
from jaxdual.engine.departures import Departure, Departures
from jaxdual.engine.handoff import Arrivals, Exports
from jaxdual.engine.store_reader import StoreReader
from jaxdual.engine.wire import AgentAt, Expect, Forget, PeerDied, Settled
from jaxdual.errors import EngineDeadError
from jaxdual.frames import Message
from jaxdual.kv.lease import Lease, LeaseState
from jaxdual.kv.manager import GroupPages, KVManager, PublishedBlock
from jaxdual.kv.slots import IntegrityError
from jaxdual.kv.staging import StagedSequences, Staging
from jaxdual.scheduling.plan import SequenceState

_complaints = Complaints(logging.getLogger(__name__))

_LOOK_SECONDS = 0.1  # between two looks at deadlines, while nothing comes


class Transfers:
    """The engine's side of all transfers. One thread owns it, the engine's.

    Args:
      start_agent: starts a KV agent on the staging pages.
      kv: accounting of the engine.
      memory: of each layer group.
      host: memory of each group, `[host_pages + staging_pages, *block]`.
      gather: starts a copy of some pages of a group off the device.
      most_pages: for one call of `gather`.
      places: where the staging pages of each group lie in the slab.
      reads: whether there is a block store to look into.
      load_timeout: seconds after which a sequence goes on without stored blocks that it waits for.
      required: whether the engine is of no use without an agent, as in a cluster.
      clock: seconds, monotonic.
    """

    def __init__(
        self,
        start_agent: Callable[[], Agent],
        kv: KVManager,
        *,
        memory: Sequence[GroupPages],
        host: Sequence[np.ndarray],
        gather: Callable[[int, Sequence[int]], Any],
        most_pages: int,
        places: Sequence[GroupSlots],
        reads: bool,
        load_timeout: float,
        required: bool,
        clock: Callable[[], float],
    ) -> None:
        self._clock = clock
        self._required = required
        self._reads = reads
        self._staging = Staging(memory)
        self._link = AgentLink(start_agent, self._staging.leases)
        self._staged = StagedSequences(kv, self._staging)
        self._reader = StoreReader(
            self._link, kv, self._staging, self._staged, memory=memory, timeout=load_timeout, clock=clock
        )
        self._departures = Departures(self._link, self._staging, host=host, gather=gather, most_pages=most_pages)
        self.exports = Exports(self._link, self._departures, places)
        self.arrivals = Arrivals(
            self._link,
            self._staging,
            self._staged,
            memory=memory,
            places=places,
            page_size=kv.page_size,
            timeout=load_timeout,
            clock=clock,
        )
        self._kv, self._places = kv, places
        # Outputs of prompts from elsewhere that are on their way to the device, each request's together, and those that
        # may go there.
        self._passing: list[list[SequenceState]] = []
        self._passed: list[SequenceState] = []
        self._link.on_death(self._agent_died)
        self._written = self._lost = 0

    # Sequences.

    @property
    def num_waiting(self) -> int:
        """Sequences that are held back."""
        return self._reader.num_waiting + len(self._passed) + sum(map(len, self._passing))

    def fetch(self, sequences: Sequence[SequenceState]) -> None:
        """Takes the outputs of a new request; `poll` gives them back when they are to be queued."""
        self._reader.fetch(sequences, look=self._reads)

    def adopt(self, request_id: str, sequences: Sequence[SequenceState], *, stored: int, moved: bool) -> bool:
        """Takes the outputs of a request whose prompt has come from another engine; `poll` gives them back. False if
        it is lost here.

        Args:
          stored: leading blocks that are in the store already.
          moved: whether its blocks pass the node's card on their way to the device.
        """
        if not self.arrivals.adopt(request_id, sequences[0].seq_id, stored=stored):
            return False
        if not moved:
            self._passed += sequences
            return True
        passing = list(sequences)
        self._passing.append(passing)

        def answered(_: object) -> None:
            self._passing.remove(passing)
            self._passed += passing

        nbytes = sum(
            place.block_bytes * len(slots)
            for place, slots in zip(self._places, self._staged.slots_of(sequences[0].seq_id), strict=True)
        )
        self._link.ask(lambda number: ToDevice(number, nbytes), answered)
        return True

    def drop(self, sequence: SequenceState) -> bool:
        """Forgets a sequence that has ended; False if it is not held back."""
        for held in (self._passed, *self._passing):
            if sequence in held:
                held.remove(sequence)
                self._kv.release(sequence.seq_id)
                return True
        return self._reader.drop(sequence)

    def poll(self, timeout: float = 0.0) -> list[tuple[SequenceState, float]]:
        """Sequences that are to be queued now, with the seconds that they have waited for stored blocks.

        Args:
          timeout: seconds to wait for news of the agent, at most.

        Raises:
          EngineDeadError: there is no agent any more, and it is required.
        """
        self._link.poll(timeout)
        if self._required and not self._link.alive:
            raise EngineDeadError("there is no KV agent any more")
        self._departures.send()
        passed, self._passed = self._passed, []
        return [*((sequence, 0.0) for sequence in passed), *self._reader.take_ready()]

    @property
    def patience(self) -> float | None:
        """Seconds after which `poll` and `take_messages` are to be called though nothing has come; None for never."""
        return _LOOK_SECONDS if self.arrivals.any_reading else self._link.patience

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What is readable when `poll` has something to do."""
        return self._link.descriptors

    # Steps.

    @property
    def has_unsent(self) -> bool:
        """Whether blocks that have left the device wait for staging pages."""
        return self._departures.has_unsent

    @property
    def num_gathered(self) -> int:
        """Copies off the device that have begun, for `settle`."""
        return self._departures.num_gathered

    def save(self, published: Sequence[PublishedBlock]) -> None:
        """Has blocks stored; to be called before the copies of the step that tells of them."""
        for group in sorted({block.group for block in published}):
            most = self._departures.most_pages[group]
            blocks = [block for block in published if block.group == group]
            for start in range(0, len(blocks), most):
                self._save(group, blocks[start : start + most])

    def unstaged(self, seq_ids: Sequence[int]) -> None:
        """The copies to the device of what these sequences had in staging pages are under way, or they have ended."""
        self._staged.release(seq_ids)

    def settle(self, num_gathered: int) -> None:
        """The device has finished so many copies."""
        self._departures.settle(num_gathered)

    def _save(self, group: int, blocks: Sequence[PublishedBlock]) -> None:
        keys, parents = [block.key for block in blocks], [block.parent for block in blocks]

        def done(stored: Sequence[bool] | None) -> None:
            count = 0 if stored is None else sum(stored)
            self._written += count
            self._lost += len(blocks) - count
            if stored is None:  # else the agent has said why
                _complaints.tell("a block can't be stored: blocks come faster, or there is no KV agent", len(blocks))

        departure = Departure(group, len(blocks), lambda number, slots: Save(number, group, keys, parents, slots), done)
        self._departures.add(departure, [block.page for block in blocks])

    # Other engines.

    def handle(self, message: Expect | Forget | Settled | PeerDied) -> None:
        """The cluster says something of a prompt that comes from another engine."""
        match message:
            case Expect(request_id, tokens, peer, keys, first):
                self.arrivals.expect(request_id, tokens, peer, keys, first)
            case Forget(request_id):
                self.arrivals.forget(request_id)
            case Settled(request_id, broken):
                self.arrivals.settled(request_id, broken=broken)
            case PeerDied(peer):
                self.arrivals.peer_died(peer)

    def take_messages(self) -> list[Message]:
        """What the cluster is to know, in order."""
        address = self._link.new_address()
        return [
            # Before what comes of it: else the next attempts would be made with the old one, too.
            *([] if address is None else [AgentAt(address)]),
            *self.arrivals.take_messages(),
            *self.exports.take_messages(),
        ]

    def _agent_died(self) -> None:
        # What they wait for is in memory of this engine: no agent is needed for the rest of its way.
        for passing in self._passing:
            self._passed += passing
        self._passing.clear()

    # Figures and the end.

    def stats(self) -> dict[str, Any]:
        """Counters since start, named as in `EngineStats`."""
        reads, arrivals = dataclasses.asdict(self._reader.stats), self.arrivals
        reads["store_blocks_read"] += arrivals.read
        reads["store_blocks_failed"] += arrivals.failed
        reads["store_timeouts"] += arrivals.timeouts
        return reads | {
            "store_blocks_written": self._written,
            "store_blocks_lost": self._lost,
            "kv_agent_restarts": self._link.restarts,
            "kv_staging_blocks_used": self._staging.num_used,
        }

    def close(self, timeout: float = 10.0) -> None:
        """Waits until all that is full is stored, up to `timeout` seconds, and ends the agent."""
        end = self._clock() + timeout
        self._departures.settle(self._departures.num_gathered)
        while self._link.alive and self._departures.has_any and self._clock() < end:
            self._link.poll(0.1)
            self._departures.send()
        self._link.close(max(1.0, end - self._clock()))

    def check_integrity(self) -> None:
        """Raises `IntegrityError` unless each lease has its transfer, and each transfer its lease."""
        self._staging.check_integrity()
        owned = sorted(lease.number for lease in self._owned_leases())
        held = sorted(
            lease.number for lease in self._staging.leases.leases if lease.state is not LeaseState.QUARANTINED
        )
        if owned != held:
            raise IntegrityError(f"leases {held} are held, and {owned} have a transfer")

    def _owned_leases(self) -> list[Lease]:
        return [*self._reader.leases, *self._staged.leases, *self._departures.leases, *self.arrivals.leases]
