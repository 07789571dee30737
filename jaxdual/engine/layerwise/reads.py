"""The blocks of jobs that a layerwise prefill engine reads from the store itself, into staging pages."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from jaxdual.agent.wire import Done, GroupSlots, Load
from jaxdual.engine.agent_link import AgentLink
from jaxdual.engine.layerwise.job import Job, Place
from jaxdual.kv.slots import IntegrityError
from jaxdual.kv.staging import Staging


class JobReads:
    """Gives each job its pages when its read begins, in the order in which jobs came, and takes them back by `end`.

    Args:
      link: to the KV agent.
      staging: pages that reads go to.
      places: where these lie in the slab.
      timeout: seconds that a read may take.
      clock: seconds, monotonic.
      on_over: called with each job of which nothing more is read, and how many leading blocks of it were.

    Attributes:
      read, failed: blocks that were read; gone or broken when they were to be read.
      timeouts: jobs that went on without what they had waited for.
    """

    def __init__(
        self,
        link: AgentLink,
        staging: Staging,
        places: GroupSlots,
        *,
        timeout: float,
        clock: Callable[[], float],
        on_over: Callable[[Job, int], None],
    ) -> None:
        self.read = self.failed = self.timeouts = 0
        self._link, self._staging, self._places = link, staging, places
        self._timeout, self._clock, self._on_over = timeout, clock, on_over
        self._queue: deque[Job] = deque()  # those that wait for staging pages
        self._reading: list[Job] = []

    @property
    def most_blocks(self) -> int:
        """Of one job."""
        return min(self._staging.capacity)

    @property
    def num_used(self) -> int:
        """Staging pages that are lent out."""
        return self._staging.num_used

    def add(self, job: Job) -> None:
        """Has a job's blocks read, those of `Job.keys`."""
        self._queue.append(job)

    def go_on(self) -> None:
        """Begins reads, as far as there are staging pages, and gives up those that take too long."""
        now = self._clock()
        for job in list(self._reading):
            if job.read_deadline is not None and now > job.read_deadline:
                self.timeouts += 1
                self._over(job, 0)
        while self._queue:
            job = self._queue[0]
            if not job.failed:
                job.lease = self._staging.reserve([len(job.keys)])
                if job.lease is None:
                    return
                job.read_deadline = now + self._timeout
                self._load(job)
            self._queue.popleft()

    def blocks_of(self, job: Job) -> list[Place]:
        """Where the blocks lie that were read."""
        if job.lease is None:
            return []
        attached, places = self._link.attached, self._places
        return [
            Place(attached.address, attached.descriptor, places.offset + slot * places.slot_bytes)
            for slot in job.lease.slots[0][: job.read_here]
        ]

    def end(self, job: Job) -> None:
        """A job needs its pages no more."""
        if job in self._reading:
            self._reading.remove(job)
        if job.lease is not None:
            self._staging.leases.end(job.lease)
            job.lease = None

    def check_integrity(self, jobs: Iterable[Job]) -> None:
        """Raises `IntegrityError` unless each lease that has not ended is that of a job."""
        self._staging.check_integrity()
        leases = {job.lease.number for job in jobs if job.lease is not None}
        quarantined = self._staging.leases.num_quarantined
        if len(leases) + quarantined != len(self._staging.leases):
            raise IntegrityError(f"{len(self._staging.leases)} leases, {len(leases)} of jobs, {quarantined} ended")

    def _load(self, job: Job) -> None:
        lease, era, leases = job.lease, self._link.era, self._staging.leases
        if lease is None:
            return
        leases.begin_load(lease, era, 1)
        self._reading.append(job)

        def answered(done: Done) -> None:
            self.read += sum(done.whole)
            self.failed += len(done.whole) - sum(done.whole)
            if leases.operation_over(lease.number, era) is not None:
                self._over(job, done.leading)

        self._link.ask(lambda number: Load(number, 0, job.keys, list(lease.slots[0])), answered)

    def _over(self, job: Job, blocks: int) -> None:
        self._reading.remove(job)
        job.read_here, job.read_deadline = blocks, None
        if not blocks:
            self.end(job)
        self._on_over(job, blocks)
