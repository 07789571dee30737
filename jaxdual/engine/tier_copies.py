"""Copies of blocks between the device and host memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import numpy as np

from jaxdual.engine.device import Device
from jaxdual.engine.direct_landing import DirectLanding
from jaxdual.kv.manager import GroupPages, PageCopy

# Pages moved by one program between tiers: a copy or two of waste at the end of a long move costs less than another
# program to compile.
COPY_PAGES = 8


class TierCopies:
    """Moves blocks as step plans say.

    Args:
      device: whose arenas.
      memory: of a rank, for each layer group.
      host: host memory of each layer group, `[ranks * (host_pages + staging_pages), *block]`.
      direct: writes blocks straight into the arenas; see `DirectLanding`.
    """

    def __init__(
        self, device: Device, memory: Sequence[GroupPages], host: Sequence[np.ndarray], *, direct: bool
    ) -> None:
        self._device, self._memory, self._host = device, tuple(memory), tuple(host)
        self._landing: deque[tuple[int, jax.Array, list[int]]] = deque()
        self._direct: DirectLanding | None = None
        if direct:
            self._direct = DirectLanding([one.shape[1:] for one in host], device.check_arena)

    def gather(self, group: int, pages: Sequence[int]) -> jax.Array:
        """Starts a copy of up to `COPY_PAGES` pages of a group off the device: the first blocks of the result.

        Args:
          pages: counted over all ranks.
        """
        blocks = self._device.gather(group, self._padded(group, pages))
        if self._direct is not None:
            self._direct.reads(blocks)
        return blocks

    def copy(self, rank: int, copies: Sequence[PageCopy]) -> None:
        """Starts copies of a rank, in their order."""
        for run in _runs(copies):
            group = run[0].group
            host, first_page = self._host[group], rank * self._memory[group].num_pages
            first_slot = rank * (len(host) // self._device.ranks)
            pages, slots = [first_page + copy.page for copy in run], [first_slot + copy.slot for copy in run]
            if run[0].direction == "out":
                self._landing.append((group, self.gather(group, pages), slots))
                continue
            self.land()
            if self._direct is not None:
                self._direct.land(self._device.arenas, group, pages, host, slots)
            else:
                blocks = np.zeros((COPY_PAGES, *host.shape[1:]), host.dtype)
                blocks[: len(run)] = host[slots]
                self._device.scatter(group, self._padded(group, pages), blocks)

    def _padded(self, group: int, pages: Sequence[int]) -> np.ndarray:
        """Pages of one program, and behind them one that the arena doesn't have: it is not moved."""
        padded = np.full(COPY_PAGES, self._device.ranks * self._memory[group].num_pages, np.int32)
        padded[: len(pages)] = pages
        return padded

    def land(self) -> None:
        """Brings blocks on their way out into their host slots, in the order in which they left."""
        while self._landing:
            group, blocks, slots = self._landing.popleft()
            self._host[group][slots] = np.asarray(blocks)[: len(slots)]

    def warm_ups(self) -> Iterator[tuple[str, Callable[[], object]]]:
        """Name and call of every program, each of which moves none."""

        def copy_out(group: int) -> object:
            return self.gather(group, ())

        def copy_in(group: int) -> object:
            blocks = np.zeros((COPY_PAGES, *self._host[group].shape[1:]), self._host[group].dtype)
            self._device.scatter(group, self._padded(group, ()), blocks)
            return self._device.arenas[group]

        for group, host in enumerate(self._host):
            if len(host):
                yield f"copy out group={group} pages={COPY_PAGES}", partial(copy_out, group)
                if self._direct is None:
                    yield f"copy in group={group} pages={COPY_PAGES}", partial(copy_in, group)


def _runs(copies: Sequence[PageCopy]) -> Iterator[list[PageCopy]]:
    """Neighbouring copies of one direction and group, at most as many as one program moves."""
    run: list[PageCopy] = []
    for copy in copies:
        if run and ((copy.direction, copy.group) != (run[0].direction, run[0].group) or len(run) == COPY_PAGES):
            yield run
            run = []
        run.append(copy)
    if run:
        yield run
