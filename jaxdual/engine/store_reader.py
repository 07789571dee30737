"""Reads stored blocks of prompts before their sequences are queued.

Admission then copies them to the device like those of a preempted sequence. Whatever goes wrong costs time only: the
sequence is queued without the blocks, and they are computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from jaxdual.agent.wire import Done, Found, Load, Lookup
from jaxdual.engine.agent_link import AgentLink
from jaxdual.kv.keys import BlockKey
from jaxdual.kv.layout import first_block
from jaxdual.kv.lease import Lease
from jaxdual.kv.manager import GroupPages, KVManager
from jaxdual.kv.staging import StagedSequences, Staging
from jaxdual.scheduling.plan import Phase, SequenceState


@dataclass(slots=True)
class ReadStats:
    """Counters since start, named as in `EngineStats`; blocks of all groups."""

    store_blocks_read: int = 0
    store_blocks_failed: int = 0
    store_wait_seconds: float = 0.0
    store_timeouts: int = 0


@dataclass(slots=True, eq=False)
class _Fetch:
    """The outputs of a request that wait for blocks of their prompt.

    Attributes:
      keys: of the full blocks of the prompt but for its last token.
      hits: leading blocks that are cached or stored.
      deadline: of the answer that it waits for; None while it waits for staging pages.
      firsts: in each group, number of the first block that is read.
      whole: of each group, whether each block read is there; None while it is under way.
    """

    sequences: list[SequenceState]
    keys: list[BlockKey]
    since: float
    deadline: float | None
    hits: int = 0
    lease: Lease | None = None
    firsts: tuple[int, ...] = ()
    whole: list[Sequence[bool] | None] = field(default_factory=list)


class StoreReader:
    """Holds sequences back until what is stored of their prompts is in staging pages.

    Args:
      link: to the KV agent.
      kv: accounting of the engine.
      staging: pages that blocks are read into.
      staged: where sequences go whose blocks have arrived.
      memory: of each layer group.
      timeout: seconds after which a sequence goes on without what it waits for.
      clock: seconds, monotonic.
    """

    def __init__(
        self,
        link: AgentLink,
        kv: KVManager,
        staging: Staging,
        staged: StagedSequences,
        *,
        memory: Sequence[GroupPages],
        timeout: float,
        clock: Callable[[], float],
    ) -> None:
        self.stats = ReadStats()
        self._link, self._kv, self._staging, self._staged, self._memory = link, kv, staging, staged, memory
        self._timeout, self._clock = timeout, clock
        self._plain = all(pages.window is None for pages in memory)
        # A part of the staging pages is left to blocks on their way out.
        self._room = [max(1, capacity * 3 // 4) for capacity in staging.capacity]
        self._fetches: dict[int, _Fetch] = {}  # by the identity of the first sequence that asked
        self._queue: deque[_Fetch] = deque()  # those that wait for staging pages
        self._ready: list[tuple[SequenceState, float]] = []  # with the seconds that they have waited
        # Sequences that were given back with blocks that are not in the cache yet.
        self._bringing: list[tuple[SequenceState, list[BlockKey]]] = []
        link.on_death(self._agent_died)

    @property
    def num_waiting(self) -> int:
        """Sequences that are held back."""
        return len(self._ready) + sum(len(fetch.sequences) for fetch in self._fetches.values())

    @property
    def leases(self) -> list[Lease]:
        """Those of blocks that are being read."""
        return [fetch.lease for fetch in self._fetches.values() if fetch.lease is not None]

    def fetch(self, sequences: Sequence[SequenceState], *, look: bool) -> None:
        """Takes the outputs of a new request; `take_ready` gives them back.

        Args:
          look: whether the store is looked into; else they are ready.
        """
        first = sequences[0]
        length = (len(first.tokens) - 1) // self._kv.page_size
        keys = first.keys.upto(first.tokens, length) if look and first.use_cache and self._link.alive else []
        if self._kv.num_cached_blocks(keys) == len(keys):
            self._ready += [(sequence, 0.0) for sequence in sequences]
            return
        now = self._clock()
        fetch = _Fetch(list(sequences), keys, since=now, deadline=now + self._timeout)
        self._fetches[id(fetch)] = fetch
        self._link.ask(lambda number: Lookup(number, keys), lambda found: self._found(fetch, found))

    def drop(self, sequence: SequenceState) -> bool:
        """Forgets a sequence that has ended; False if it is not held back here."""
        for ready in self._ready:
            if ready[0] is sequence:
                self._ready.remove(ready)
                self._kv.release(sequence.seq_id)
                return True
        for fetch in self._fetches.values():
            if sequence in fetch.sequences:
                fetch.sequences.remove(sequence)
                if not fetch.sequences:
                    self._forget(fetch)
                return True
        return False

    def take_ready(self) -> list[tuple[SequenceState, float]]:
        """Sequences that are to be queued now, with the seconds that they have waited for blocks.

        Begins reads for others, as staging pages allow.
        """
        now = self._clock()
        for fetch in list(self._fetches.values()):
            if fetch.deadline is not None and now > fetch.deadline:
                self.stats.store_timeouts += 1
                self._go_on(fetch)
        self._start_loads()
        ready, self._ready = self._ready, []
        return ready

    # What becomes of a fetch.

    def _go_on(self, fetch: _Fetch) -> None:
        """Its sequences wait no longer, whatever came of it."""
        waited = self._clock() - fetch.since
        self.stats.store_wait_seconds += waited
        self._ready += [(sequence, waited) for sequence in fetch.sequences]
        self._forget(fetch)

    def _forget(self, fetch: _Fetch) -> None:
        """What is still under way for it comes to an end by itself, and nobody looks at it."""
        del self._fetches[id(fetch)]
        if fetch in self._queue:
            self._queue.remove(fetch)
        if fetch.lease is not None:
            self._staging.leases.end(fetch.lease)
            fetch.lease = None

    def _agent_died(self) -> None:
        for fetch in list(self._fetches.values()):
            if fetch.deadline is not None or not self._link.alive:
                self._go_on(fetch)

    def _found(self, fetch: _Fetch, found: Found) -> None:
        if id(fetch) not in self._fetches:
            return
        fetch.hits, fetch.deadline = found.hits, None
        if fetch.hits > self._kv.num_cached_blocks(fetch.keys):
            self._queue.append(fetch)
        else:
            self._go_on(fetch)

    def _start_loads(self) -> None:
        """Begins reads in the order in which requests came."""
        self._bringing = [
            (sequence, keys)
            for sequence, keys in self._bringing
            if sequence.phase is not Phase.FINISHED and self._kv.num_cached_blocks(keys) < len(keys)
        ]
        # Who needs blocks that another one brings waits for it: here while they are read, then in the scheduler.
        reading = {key for fetch in self._fetches.values() if fetch.lease for key in fetch.keys[: fetch.hits]}
        brought = {key for _, keys in self._bringing for key in keys}
        for fetch in list(self._queue):
            cached = self._kv.num_cached_blocks(fetch.keys)
            counts = self._pages_for(fetch, cached)
            if not any(counts) or fetch.keys[cached] in brought:
                self._go_on(fetch)
                continue
            if fetch.keys[cached] not in reading and self._load(fetch, counts):
                self._queue.remove(fetch)
            reading.update(fetch.keys[: fetch.hits])

    def _pages_for(self, fetch: _Fetch, cached: int) -> list[int]:
        """Staging pages of each group that a read of what is stored behind the `cached` blocks takes; none at all where
        it is of no use.
        """
        page_size = self._kv.page_size
        if self._plain:
            fetch.hits = min(fetch.hits, cached + min(self._room))
        fetch.firsts = tuple(
            max(cached, first_block(pages.window, fetch.hits * page_size, page_size)) for pages in self._memory
        )
        counts = [max(0, fetch.hits - first) for first in fetch.firsts]
        # A part of what a window shows is of no use.
        fits = all(count <= most for count, most in zip(counts, self._room, strict=True))
        return counts if fits and fetch.hits > cached else [0] * len(counts)

    def _load(self, fetch: _Fetch, counts: Sequence[int]) -> bool:
        """Begins a read; False if there are too few free staging pages now."""
        lease = self._staging.reserve(counts)
        if lease is None:
            return False
        fetch.lease, fetch.deadline = lease, self._clock() + self._timeout
        fetch.whole = [None if count else () for count in counts]
        self._staging.leases.begin_load(lease, self._link.era, sum(count > 0 for count in counts))
        for group, count in enumerate(counts):
            if count:
                self._load_group(fetch, lease, group)
        return True

    def _load_group(self, fetch: _Fetch, lease: Lease, group: int) -> None:
        era = self._link.era
        keys, slots = fetch.keys[fetch.firsts[group] : fetch.hits], list(lease.slots[group])

        def answered(done: Done) -> None:
            self.stats.store_blocks_read += sum(done.whole)
            self.stats.store_blocks_failed += len(done.whole) - sum(done.whole)
            if self._staging.leases.operation_over(lease.number, era) is not None:
                fetch.whole[group] = done.whole
                if None not in fetch.whole:
                    self._loaded(fetch, lease)

        self._link.ask(lambda number: Load(number, group, keys, slots), answered)

    def _loaded(self, fetch: _Fetch, lease: Lease) -> None:
        """All reads of a fetch are over."""
        whole = [list(one or ()) for one in fetch.whole]
        good = fetch.hits
        if not all(map(all, whole)):
            # Behind a window, blocks are of use only right up to the next token.
            good = fetch.firsts[0] + [*whole[0], False].index(False) if self._plain else 0
        # Blocks may have come to the cache meanwhile.
        if good > self._kv.num_cached_blocks(fetch.keys):
            seq_id, computed = fetch.sequences[0].seq_id, good * self._kv.page_size
            self._staged.put(seq_id, lease, fetch.firsts, good, computed, stored=good)
            fetch.lease = None
            self._bringing.append((fetch.sequences[0], fetch.keys[:good]))
        self._go_on(fetch)
