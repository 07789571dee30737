"""The network cards of a cluster's nodes, as files that all its agents share: each engine is a node of its own."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxdual.agent.wire import CardPlaces
from jaxdual.config import ClusterConfig
from jaxdual.transport.shaping import Nic

_MEMORY = Path("/dev/shm")
_NAME = "jaxdual-cards-"


class ClusterCards:
    """Made when the cluster starts; `close` removes it.

    Args:
      members: names of the engines.
      cluster: has the rates.
      parent: where the files lie.
    """

    def __init__(self, members: Sequence[str], cluster: ClusterConfig, parent: Path = _MEMORY) -> None:
        _remove_left_behind(parent)
        self._directory, self._lock = _make_directory(parent)
        self._places = {
            member: CardPlaces(str(self._directory), f"{member} storage", f"{member} compute") for member in members
        }
        self._cards = {}
        for places in self._places.values():
            for name, rate in (
                (places.storage, cluster.storage_nic_rate),
                (places.compute, cluster.compute_nic_rate),
            ):
                self._cards[name] = Nic.create(self._directory, name, read_rate=rate, write_rate=rate)

    def of(self, member: str) -> CardPlaces:
        """The cards of an engine's node."""
        return self._places[member]

    def nbytes(self) -> Mapping[str, int]:
        """Bytes that have passed, by member, card and direction, such as "prefill 0 storage write"."""
        return {
            f"{name} {direction.value}": sum(counts.values())
            for name, card in self._cards.items()
            for direction, counts in card.counters().items()
        }

    def close(self) -> None:
        """Removes the files."""
        for card in self._cards.values():
            card.close()
        shutil.rmtree(self._directory, ignore_errors=True)
        os.close(self._lock)


def _make_directory(parent: Path) -> tuple[Path, int]:
    """A new directory, and a lock by which others see that its owner lives."""
    while True:
        directory = Path(tempfile.mkdtemp(prefix=_NAME, dir=parent))
        lock = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if directory.exists():
            return directory, lock
        os.close(lock)  # somebody has taken it for left behind before it was locked


def _remove_left_behind(parent: Path) -> None:
    """Removes what clusters have left that were killed."""
    for directory in parent.glob(f"{_NAME}*"):
        with contextlib.suppress(OSError):  # somebody lives, or was quicker
            lock = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(directory)
            finally:
                os.close(lock)
