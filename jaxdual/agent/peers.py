"""The agent's connections to agents of other engines: writes into their slabs, and the ends of theirs into ours."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from jaxdual.transport import (
    Channel,
    Completed,
    Op,
    Peer,
    PeerLost,
    SharedSlab,
    ShmTransport,
    Status,
    TcpTransport,
    Ticket,
    TrafficClass,
    Transport,
)

_GONE_SECONDS = 0.02  # between two looks


def open_transport(carrier: str, slab: SharedSlab, *, host: str, secret: bytes) -> Transport:
    """The transport of an agent.

    Args:
      carrier: "shm", "tcp" or "verbs".
      slab: which peers may write.
      host: address that the others than "shm" listen on.
      secret: what their peers must know.

    Raises:
      ValueError: another carrier, or a secret that is too short.
      NotImplementedError: "verbs" without pyverbs or a device.
      OSError: the address can't be listened on.
    """
    if carrier == "shm":
        return ShmTransport(slab)
    if carrier == "tcp":
        return TcpTransport(secret, host)
    if carrier == "verbs":
        from jaxdual.transport.verbs import VerbsTransport

        return VerbsTransport(secret, host)
    raise ValueError(f"{carrier=} must be shm, tcp or verbs")


class Peers:
    """Belongs to one asyncio loop.

    Args:
      transport: which this object polls and closes.
      slab: registered with it.
      on_gone: called with the address of a peer that has no connection to here left.
    """

    def __init__(self, transport: Transport, slab: SharedSlab, on_gone: Callable[[str], None]) -> None:
        self._transport = transport
        self._region = transport.register(slab.view())
        self._on_gone = on_gone
        self._channels: dict[str, asyncio.Task[Channel]] = {}
        self._tickets: dict[Ticket, asyncio.Future[Status]] = {}
        asyncio.get_running_loop().add_reader(transport.fileno(), self._poll)

    @property
    def address(self) -> str:
        return self._transport.address

    @property
    def descriptor(self) -> bytes:
        """Of the slab, for peers."""
        return self._region.descriptor

    async def push(self, address: str, descriptor: bytes, runs: Sequence[tuple[int, int, int]]) -> bool:
        """Writes runs of bytes into a peer's slab; whether they are there. If not, some may still come to be, until the
        peer has seen the end of the connection; then `disconnect` there knows.

        Args:
          runs: offset here, offset there, bytes.
        """
        return await self._move(address, descriptor, runs, write=True)

    async def pull(self, address: str, descriptor: bytes, runs: Sequence[tuple[int, int, int]]) -> bool:
        """Reads runs of bytes of a peer's slab, or of the own one; see `push`."""
        return await self._move(address, descriptor, runs, write=False)

    async def _move(
        self, address: str, descriptor: bytes, runs: Sequence[tuple[int, int, int]], *, write: bool
    ) -> bool:
        try:
            channel = await self._channel(address)
            post = channel.write if write else channel.read
            ticket = post(self._region, self._transport.remote(descriptor), [Op(*run) for run in runs])
        except (OSError, ValueError):
            return False
        status: asyncio.Future[Status] = asyncio.get_running_loop().create_future()
        self._tickets[ticket] = status
        return await status is Status.OK

    async def disconnect(self, address: str) -> None:
        """Ends the connections that a peer has to here; returns when nothing can be written by them any more."""
        ending = set(self._of(address))
        for peer in ending:
            self._transport.disconnect(peer)
        while ending & set(self._transport.peers()):
            await asyncio.sleep(_GONE_SECONDS)

    async def gone(self, address: str) -> None:
        """Ends for good what a peer has here whose process has died, or is about to; see `disconnect`.

        Its host may be gone with it, and need not answer. Over shared memory, a process that is stopped keeps its
        memory here for as long as it is.
        """
        self._transport.refuse(address)
        await self.disconnect(address)

    async def close(self) -> None:
        """Ends all connections, and answers nobody any more: from then on nothing is written to peers."""
        asyncio.get_running_loop().remove_reader(self._transport.fileno())
        await asyncio.to_thread(self._transport.close)

    async def _channel(self, address: str) -> Channel:
        task = self._channels.get(address)
        if task is None:
            connecting = asyncio.to_thread(self._transport.connect, address, TrafficClass.KV)
            task = self._channels[address] = asyncio.get_running_loop().create_task(connecting)
        try:
            return await asyncio.shield(task)
        except Exception:
            self._channels.pop(address, None)
            raise

    def _poll(self) -> None:
        for event in self._transport.poll():
            match event:
                case Completed(ticket, status):
                    self._tickets.pop(ticket).set_result(status)
                case PeerLost(Channel() as channel, _):
                    self._channels.pop(channel.peer_address, None)
                case PeerLost(Peer(address=address), _):
                    if not self._of(address):
                        self._on_gone(address)

    def _of(self, address: str) -> list[Peer]:
        return [peer for peer in self._transport.peers() if peer.address == address]
