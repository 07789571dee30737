"""`python -m jaxdual.agent.process FD SLAB_FD`: the KV agent of the engine at the other end of socket FD.

One asyncio loop speaks with the engine; the store's threads move bytes between its files and the slab. When the engine
is gone, what it wanted stored is stored, and the process ends.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Iterable, Sequence
from functools import partial
from typing import Any

from jaxdual.agent.cards import Cards
from jaxdual.agent.peers import Peers, open_transport
from jaxdual.agent.wire import (
    ALIVE_SECONDS,
    Alive,
    Attach,
    Attached,
    AttachFailed,
    AwaitGone,
    Disconnect,
    Done,
    Found,
    GroupSlots,
    Load,
    Lookup,
    PeerGone,
    Pull,
    Push,
    Save,
    ToAgent,
    ToDevice,
)
from jaxdual.frames import Frames, Message
from jaxdual.kv.store import BlockStore, Outcome, open_store
from jaxdual.transport import ShapedTransport
from jaxdual.transport.slab import SharedSlab

_FINISH_SECONDS = 30.0  # to store what the engine wanted stored

_log = logging.getLogger(__name__)


class KVAgent(asyncio.Protocol):
    """Serves one engine, as the protocol of the connection to it.

    Args:
      slab: memory that both have mapped.

    Attributes:
      engine_gone: set when the connection is lost, or this agent has failed.
    """

    def __init__(self, slab: SharedSlab) -> None:
        self.engine_gone = asyncio.Event()
        self._shared, self._slab = slab, slab.view()
        self._frames = Frames(ToAgent)
        self._transport: asyncio.WriteTransport | None = None
        self._tasks: set[asyncio.Task[None]] = set()  # a task that nobody refers to may vanish
        self._saving: set[asyncio.Task[None]] = set()
        self._attached = asyncio.Event()
        self._store: BlockStore | None = None
        self._peers: Peers | None = None
        self._cards: Cards | None = None
        self._groups: Sequence[GroupSlots] = ()

    async def finish(self) -> None:
        """Ends what goes to peers at once, waits for what goes to the store, and closes it."""
        if self._peers is not None:
            try:
                await self._peers.close()
            except TimeoutError as error:  # this process ends, and its mapping with it
                _log.warning("%s", error)
        if self._cards is not None:
            self._cards.release()
        if self._saving:
            await asyncio.wait(self._saving)
        if self._cards is not None:
            await asyncio.to_thread(self._cards.close)
        if self._store is not None:
            await asyncio.to_thread(self._store.close)

    # Called by the loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if isinstance(transport, asyncio.WriteTransport):
            self._transport = transport
            self._say_alive()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self.engine_gone.set()

    def data_received(self, data: bytes) -> None:
        for message in self._frames.feed(data):
            task = asyncio.get_running_loop().create_task(self._handle(message))
            self._tasks.add(task)
            task.add_done_callback(self._done)
            if isinstance(message, Save):
                self._saving.add(task)
                task.add_done_callback(self._saving.discard)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            # Nobody would ever be answered: the engine knows how to go on with another agent.
            _log.error("the KV agent has failed", exc_info=error)
            self.engine_gone.set()

    # What the engine asks for.

    async def _handle(self, message: Any) -> None:
        if isinstance(message, Attach):
            self._send(await self._attach(message))
            return
        await self._attached.wait()  # the engine does not wait before it asks for more
        match message:
            case Lookup() | Load() | Save():
                await self._use_store(message)
            case _:
                begin = time.monotonic()
                arrived = await self._use_network(message)
                self._send(Done(message.number, [arrived], time.monotonic() - begin))

    async def _use_network(self, message: Any) -> bool:
        """Whether all of it has arrived, where something is to."""
        peers, cards = self._peers, self._cards
        match message:
            case Push(_, address, descriptor, runs):
                return peers is not None and await peers.push(address, descriptor, runs)
            case Pull(_, address, descriptor, runs):
                return peers is not None and await peers.pull(address, descriptor, runs)
            case Disconnect(_, address) if peers is not None:
                await peers.disconnect(address)
            case AwaitGone(_, address) if peers is not None:
                await peers.gone(address)
            case ToDevice(_, nbytes) if cards is not None:
                await cards.past_device(nbytes)
        return True

    async def _use_store(self, message: Any) -> None:
        store = self._store
        if store is None:
            raise RuntimeError(f"{type(message).__name__} came to an agent without a store")
        match message:
            case Lookup(number, keys):
                (hits,) = await asyncio.to_thread(store.hits, [[_name(key, 0) for key in keys]])
                self._send(Found(number, hits))
            case Load(number, group, keys, slots):
                blocks = [self._block(group, slot) for slot in slots]
                names = [_name(key, group) for key in keys]
                await self._transfer(number, map(partial(self._load, store), names, blocks))
            case Save(number, group, keys, parents, slots):
                blocks = [self._block(group, slot) for slot in slots]
                names = [_name(key, group) for key in keys]
                before = [None if parent is None else _name(parent, group) for parent in parents]
                await self._transfer(number, map(partial(self._save, store), names, before, blocks))

    async def _attach(self, attach: Attach) -> Message:
        self._groups = attach.groups
        try:
            if attach.store:
                self._store = await asyncio.to_thread(open_store, attach.store, attach.capacity_bytes)
            if attach.cards is not None:
                self._cards = Cards(attach.cards)
            if attach.carrier:
                transport = open_transport(attach.carrier, self._shared, host=attach.host, secret=attach.secret)
                if self._cards is not None:
                    transport = ShapedTransport(transport, self._cards.compute, self._cards.of)
                    self._cards.publish(transport.address)
                self._peers = Peers(transport, self._shared, lambda address: self._send(PeerGone(address)))
        except (OSError, ValueError, NotImplementedError) as error:
            return AttachFailed(str(error))
        self._attached.set()
        if self._peers is None:
            return Attached("", b"")
        return Attached(self._peers.address, self._peers.descriptor)

    async def _load(self, store: BlockStore, key: bytes, into: memoryview) -> Outcome:
        if self._cards is not None:
            await self._cards.load(into.nbytes)
        return await asyncio.wrap_future(store.read(key, into))

    async def _save(self, store: BlockStore, key: bytes, parent: bytes | None, payload: memoryview) -> Outcome:
        if self._cards is not None:
            await self._cards.save(payload.nbytes)
        return await asyncio.wrap_future(store.write(key, parent, payload))

    async def _transfer(self, number: int, transfers: Iterable[Awaitable[Outcome]]) -> None:
        begin = time.monotonic()
        outcomes = await asyncio.gather(*transfers)
        self._send(Done(number, [outcome is Outcome.OK for outcome in outcomes], time.monotonic() - begin))

    def _block(self, group: int, slot: int) -> memoryview:
        place = self._groups[group]
        start = place.offset + slot * place.slot_bytes
        return self._slab[start : start + place.block_bytes]

    def _say_alive(self) -> None:
        if self._transport is not None:
            self._send(Alive())
            asyncio.get_running_loop().call_later(ALIVE_SECONDS, self._say_alive)

    def _send(self, message: Message) -> None:
        if self._transport is not None:
            self._transport.write(self._frames.encode(message))


def _name(key: bytes, group: int) -> bytes:
    """Key in the store of a block of a layer group: groups share their keys."""
    return key + bytes([group]) if group else key


async def serve(engine: socket.socket, slab: SharedSlab) -> None:
    """Serves the engine until it is gone."""
    agent = KVAgent(slab)
    await asyncio.get_running_loop().create_connection(lambda: agent, sock=engine)
    await agent.engine_gone.wait()
    # What others hold up, a peer's connection say, must not keep a process that nobody knows any more.
    late = threading.Timer(_FINISH_SECONDS, os._exit, (1,))
    late.daemon = True
    late.start()
    await agent.finish()


def main() -> int:
    """Runs the process; returns its exit status."""
    # Ctrl-C and a service manager's signal reach the whole group; the agent ends with its engine.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    asyncio.run(serve(socket.socket(fileno=int(sys.argv[1])), SharedSlab.attach(int(sys.argv[2]))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
