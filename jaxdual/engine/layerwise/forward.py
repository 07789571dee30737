"""One forward pass, stage by stage: keys and values come, layers run, keys and values go, all at the same time.

While a stage is computed, the blocks of the next ones come and those of the ones before go (DualPath 2.1 and 4.1). The
KV agent brings blocks into pieces of a ring, from where they are copied onto the device; what goes is copied off the
device into pieces of another ring, which the agent writes to the decode engine's memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from jaxdual.agent.wire import Done, Pull, Push
from jaxdual.engine.agent_link import AgentLink
from jaxdual.engine.buckets import PrefillBatch
from jaxdual.engine.layerwise.job import Job, Place
from jaxdual.engine.layerwise.ring import Ring
from jaxdual.engine.layerwise.runner import MOVE_SIZES, LayerRunner, Stream, is_ready, move_size
from jaxdual.engine.slot_sampler import SampleBatch, Sampled
from jaxdual.scheduling.plan import Chunk

_LOOK_SECONDS = 0.0005  # between two looks at the device, at least


@dataclass(frozen=True, slots=True)
class Part:
    """A job's share of a pass.

    Attributes:
      job: whose.
      chunk: what is computed.
      pages: of the job's blocks up to the chunk's end.
      comes: blocks before the chunk, and where each is, in order.
      goes: numbers of the blocks that are written to the job's target.
    """

    job: Job
    chunk: Chunk
    pages: Sequence[int]
    comes: Sequence[tuple[int, Place]]
    goes: Sequence[int]


@dataclass(slots=True, eq=False)
class _Coming:
    """Some blocks of a stage on their way in.

    Attributes:
      piece: of the ring.
      arrived: what the agent said; None before.
    """

    stage: int
    job: Job
    pages: Sequence[int]
    piece: int
    arrived: bool | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Going:
    """Some blocks of a stage on their way out."""

    stage: int
    job: Job
    offsets: Sequence[int]
    blocks: jax.Array
    due: float  # when the stage is over


class Pace:
    """The time that layers take on the device, at least: for measurements, it plays a slower one.

    Args:
      layer_seconds: of a layer; 0 for as fast as the device is.
      clock: seconds.
    """

    def __init__(self, layer_seconds: float, clock: Callable[[], float]) -> None:
        self.layer_seconds = layer_seconds
        self.clock = clock
        self._busy_until = 0.0

    def run(self, layers: int) -> float:
        """Layers were given to the device; when they will be done at the earliest."""
        self._busy_until = max(self.clock(), self._busy_until) + layers * self.layer_seconds
        return self._busy_until


class Forward:
    """Goes on whenever `advance` is called, as far as it can without waiting.

    Args:
      parts: what it computes.
      batches: the same chunks, as they are padded.
      runner: the device side.
      link: to the KV agent.
      landing, leaving: memory that blocks pass through on their way in and out.
      pace: of the device.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        batches: Sequence[PrefillBatch],
        *,
        runner: LayerRunner,
        link: AgentLink,
        landing: Ring,
        leaving: Ring,
        pace: Pace,
    ) -> None:
        self.parts = parts
        self.streams: list[Stream] = []
        self._runner, self._link, self._landing, self._leaving, self._pace = runner, link, landing, leaving, pace
        self._batches = batches
        # What is moved is padded, and a piece holds the padding, too.
        self._most = max(size for size in MOVE_SIZES if size * runner.stages.nbytes <= landing.piece_bytes)
        self._unasked: deque[tuple[Job, str, bytes, Sequence[tuple[int, int]]]] = deque()
        self._asking = 0  # stage whose blocks are asked for
        self._coming: deque[_Coming] = deque()
        self._copying: deque[tuple[jax.Array, int]] = deque()
        self._computed = 0  # stages given to the device
        self._going: deque[_Going] = deque()
        self._sampled: list[SampleBatch] = []
        self._due = 0.0
        self._list_stage()

    @property
    def landed(self) -> bool:
        """All that it needs is on the device, or about to be."""
        return self._asking == self._runner.stages.count and not self._coming

    @property
    def computed(self) -> bool:
        """The device has all of its work: its pages may be used again."""
        return self._computed == self._runner.stages.count

    @property
    def sampled(self) -> bool:
        """Its tokens are there."""
        return (
            self.computed and self._pace.clock() >= self._due and all(is_ready(batch.tokens) for batch in self._sampled)
        )

    @property
    def over(self) -> bool:
        """Its tokens are there, and all that goes has left the device."""
        return self.sampled and not (self._copying or self._going)

    @property
    def patience(self) -> float | None:
        """Seconds after which the device may have brought it on; None if only news of the agent can."""
        due = None
        if self._going and not (is_ready(self._going[0].blocks) and self._pace.clock() >= self._going[0].due):
            due = self._going[0].due
        elif self.computed and not self.sampled:
            due = self._due
        if self._copying or due is not None:
            return max(_LOOK_SECONDS, (due or 0.0) - self._pace.clock())
        return None

    def advance(self, *, compute: bool) -> None:
        """Goes on.

        Args:
          compute: whether the device is free of passes before this one.
        """
        progress = True
        while progress:
            progress = self._ask() | self._land() | (compute and self._compute()) | self._leave()

    def fetch(self) -> list[Sampled]:
        """The tokens of the prompts that end in it, once they are there."""
        return [one for batch in self._sampled for one in batch.fetch()]

    def abandon(self) -> None:
        """The agent is gone, with all that it had under way: when this returns, nobody touches the rings for it."""
        for landed, _ in self._copying:
            jax.block_until_ready(landed)

    # Steps.

    def _list_stage(self) -> None:
        """Notes which blocks of the next stage come, in pieces of one job and one source."""
        if self._asking == self._runner.stages.count:
            return
        offset = self._runner.stages.offset(self._asking)
        for part in self.parts:
            groups: dict[tuple[str, bytes], list[tuple[int, int]]] = {}
            for block, place in part.comes:
                group = groups.setdefault((place.address, place.descriptor), [])
                group.append((part.pages[block], place.offset + offset))
            for (address, descriptor), blocks in groups.items():
                for start in range(0, len(blocks), self._most):
                    self._unasked.append((part.job, address, descriptor, blocks[start : start + self._most]))

    def _ask(self) -> bool:
        """Asks the agent for blocks, as far as the ring and the device's layer slots have room."""
        stages, progress = self._runner.stages, False
        while self._asking < min(stages.count, self._computed + stages.slots):
            while self._unasked:
                piece = self._landing.take()
                if piece is None:
                    return progress
                job, address, descriptor, blocks = self._unasked.popleft()
                self._ask_for(job, address, descriptor, blocks, piece)
            self._asking += 1
            progress = True
            self._list_stage()
        return progress

    def _ask_for(
        self, job: Job, address: str, descriptor: bytes, blocks: Sequence[tuple[int, int]], piece: int
    ) -> None:
        nbytes, begin = self._runner.stages.nbytes, self._landing.offset_of(piece)
        runs = [(begin + number * nbytes, offset, nbytes) for number, (_, offset) in enumerate(blocks)]
        coming = _Coming(self._asking, job, [page for page, _ in blocks], piece)
        self._coming.append(coming)
        if job.failed:
            coming.arrived = False
            return

        def answered(done: Done) -> None:
            coming.arrived = all(done.whole)

        self._link.ask(lambda number: Pull(number, address, descriptor, runs), answered)

    def _land(self) -> bool:
        """Copies what has arrived onto the device, in order."""
        progress = False
        while self._copying and is_ready(self._copying[0][0]):
            self._landing.give_back(self._copying.popleft()[1])
            progress = True
        while self._coming and self._coming[0].arrived is not None:
            coming = self._coming.popleft()
            # Of a job that is lost the device gets what happens to be there: nobody will see what comes of it.
            coming.job.failed |= not coming.arrived
            shape = (move_size(len(coming.pages)), *self._runner.block_shape)
            blocks = self._landing.blocks(coming.piece, shape, np.dtype(self._runner.layout.dtype))
            self._copying.append((self._runner.land(coming.stage, coming.pages, blocks), coming.piece))
            progress = True
        return progress

    def _compute(self) -> bool:
        """Gives the device the next stage once its blocks are there, and those that its layer slot held have left."""
        stages, stage = self._runner.stages, self._computed
        if stage == stages.count or self._asking <= stage or (self._coming and self._coming[0].stage <= stage):
            return False
        if self._going and self._going[0].stage <= stage - stages.slots:
            return False
        if stage == 0:
            pages = {part.job.number: part.pages for part in self.parts}
            self.streams = [self._runner.begin(batch, pages) for batch in self._batches]
        self._runner.run(stage, self.streams)
        self._due = self._pace.run(stages.layers)
        for part in self.parts:
            for start in range(0, len(part.goes), self._most):
                numbers = part.goes[start : start + self._most]
                blocks = self._runner.take(stage, [part.pages[number] for number in numbers])
                offsets = [part.job.target.offsets[0][number] + stages.offset(stage) for number in numbers]
                self._going.append(_Going(stage, part.job, offsets, blocks, self._due))
                part.job.pushes += 1
        self._computed += 1
        if self.computed:
            batches = [self._runner.sample(stream) for stream in self.streams]
            self._sampled = [batch for batch in batches if batch is not None]
        return True

    def _leave(self) -> bool:
        """Hands blocks that have left the device to the agent."""
        progress = False
        while self._going and is_ready(self._going[0].blocks) and self._pace.clock() >= self._going[0].due:
            going = self._going[0]
            if going.job.failed:
                going.job.pushes -= 1
            else:
                piece = self._leaving.take()
                if piece is None:
                    return progress
                self._push(going, piece)
            self._going.popleft()
            progress = True
        return progress

    def _push(self, going: _Going, piece: int) -> None:
        job, nbytes, begin = going.job, self._runner.stages.nbytes, self._leaving.offset_of(piece)
        contents = np.asarray(going.blocks)
        count = len(going.offsets)
        self._leaving.blocks(piece, (count, *contents.shape[1:]), contents.dtype)[:] = contents[:count]
        runs = [(begin + number * nbytes, offset, nbytes) for number, offset in enumerate(going.offsets)]

        def answered(done: Done) -> None:
            self._leaving.give_back(piece)
            job.pushes -= 1
            job.broken |= not all(done.whole)
            job.failed |= job.broken

        target = job.target
        self._link.ask(lambda number: Push(number, target.address, target.descriptor, runs), answered)
