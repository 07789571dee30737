"""The network cards of an agent's node: bytes are counted on their way, and held back where a card has a rate."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jaxdual.agent.wire import CardPlaces
from jaxdual.transport import TrafficClass
from jaxdual.transport.shaping import Direction, Nic

_LINK = "address "  # before the address in the name of a file that holds the name of a card


class Cards:
    """Belongs to one asyncio loop. Bytes of one card and direction pass in the order of the calls.

    Args:
      places: where the cards are.

    Attributes:
      compute: the card that the device and other nodes are reached through.

    Raises:
      OSError, ValueError: there are no such cards.
    """

    def __init__(self, places: CardPlaces) -> None:
        self._places = places
        self._storage = Nic(places.directory, places.storage)
        self.compute = Nic(places.directory, places.compute)
        self._others: dict[str, Nic] = {}  # by name: opened once, however often their agents die
        self._stop = threading.Event()
        # What comes from a store and what goes there don't wait for each other, nor what passes the device.
        self._threads = {name: ThreadPoolExecutor(1, f"card-{name}") for name in ("loads", "saves", "device")}

    def publish(self, address: str) -> None:
        """Lets other agents know the compute card of this agent's address."""
        Path(self._places.directory, _LINK + address).write_text(self._places.compute)

    def of(self, address: str) -> Nic | None:
        """The compute card of an agent's address; None if that has none."""
        with contextlib.suppress(OSError, ValueError):
            name = Path(self._places.directory, _LINK + address).read_text()
            if name == self._places.compute:
                return self.compute
            if name not in self._others:
                self._others[name] = Nic(self._places.directory, name)
            return self._others[name]
        return None

    async def load(self, nbytes: int) -> None:
        """Stored bytes come into memory."""
        await self._pass("loads", nbytes, (self._storage, Direction.WRITE))

    async def save(self, nbytes: int) -> None:
        """Bytes leave the device for memory, and memory for the store."""
        await self.past_device(nbytes)
        await self._pass("saves", nbytes, (self._storage, Direction.READ))

    async def past_device(self, nbytes: int) -> None:
        """Bytes go from memory to the device, or the other way: out of one, and into the other."""
        card = self.compute
        await self._pass("device", nbytes, (card, Direction.READ), (card, Direction.WRITE))

    def release(self) -> None:
        """Holds nothing back any more."""
        self._stop.set()

    def close(self) -> None:
        """Waits for what passes; nothing comes after that."""
        self.release()
        for threads in self._threads.values():
            threads.shutdown()
        for card in (self._storage, self.compute, *self._others.values()):
            card.close()

    async def _pass(self, thread: str, nbytes: int, *ways: tuple[Nic, Direction]) -> None:
        def charge() -> None:
            for card, direction in ways:
                card.charge(direction, nbytes, TrafficClass.KV, self._stop)

        await asyncio.get_running_loop().run_in_executor(self._threads[thread], charge)
