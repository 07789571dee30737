"""The end of an engine process of those that it serves: starts it, speaks to it, and notices its death."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from jaxdual.config import ClusterConfig, EngineConfig
from jaxdual.engine.cluster_part import ClusterPart
from jaxdual.engine.wire import Died, Start, Stop, ToFront
from jaxdual.frames import Frames, Message

_KILL_SECONDS = 5.0  # from asking an engine to stop until it is killed: it may be compiling,
_STORE_SECONDS = 12.0  # or storing what is full,
_OTHERS_SECONDS = 16.0  # or waiting for other engines, or further processes of its own, that are
_GONE_SECONDS = 10.0  # from the end of its connection until it is taken for gone, whatever its host says of it

_POLL_SECONDS = 0.01


class Child(Protocol):
    """A process that somebody started: a child of this one, or of another host."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None:
        """Its exit status, or less than 0 for the signal that ended it; None while it runs."""

    def kill(self) -> None:
        """Ends it at once."""


class EngineProcess(asyncio.Protocol):
    """One engine process. Made by `launch` or `connect`; everything is called on the loop that did.

    Args:
      process: it.
      on_message: called with each message but `Died`.
      on_death: called once, after the last message, with the reason.
      stop_seconds: that it has to end when it is asked to.
    """

    def __init__(
        self,
        process: Child,
        on_message: Callable[[Any], None],
        on_death: Callable[[str], None],
        stop_seconds: float = _KILL_SECONDS,
    ) -> None:
        self._process = process
        self._on_message = on_message
        self._on_death = on_death
        self._stop_seconds = stop_seconds
        self._frames = Frames(ToFront)
        self._transport: asyncio.WriteTransport | None = None
        self._last_words: str | None = None
        self._ended = asyncio.Event()
        self._reaping: asyncio.Task[None] | None = None

    @classmethod
    async def launch(
        cls,
        config: EngineConfig,
        on_message: Callable[[Any], None],
        on_death: Callable[[str], None],
        cluster: ClusterConfig | None = None,
        part: ClusterPart | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> EngineProcess:
        """Starts an engine on this machine; the first message is `Ready` or `StartFailed`.

        Args:
          config: of the engine.
          on_message, on_death: see the class.
          cluster: starts a cluster of such engines, which speaks as one engine does.
          part: what the engine is to a cluster.
          environment: what its environment has beside this process's.

        Raises:
          OSError: the process can't be started.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            # A group of its own: Ctrl-C is the front's to handle.
            module = "jaxdual.cluster.process" if cluster else "jaxdual.engine.process"
            process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                process_group=0,
                env={**os.environ, **(environment or {})},
            )
        try:
            return await cls.connect(
                process, ours, Start(config, cluster or ClusterConfig(), part), on_message, on_death
            )
        except BaseException:  # cancelled, most likely: nobody else knows the process
            process.kill()
            process.wait()
            raise

    @classmethod
    async def connect(
        cls,
        process: Child,
        ours: socket.socket,
        start: Start,
        on_message: Callable[[Any], None],
        on_death: Callable[[str], None],
    ) -> EngineProcess:
        """Takes up an engine that runs already, and waits for its `Start`.

        Args:
          process: it.
          ours: the other end of its socket; the engine's from now on.
          start: what it is told.
          on_message, on_death: see the class.
        """
        stores = _STORE_SECONDS if start.config.needs_kv_agent else _KILL_SECONDS
        has_others = start.cluster or start.config.num_processes > 1
        engine = cls(process, on_message, on_death, _OTHERS_SECONDS if has_others else stores)
        try:
            await asyncio.get_running_loop().create_connection(lambda: engine, sock=ours)
        except BaseException:
            ours.close()
            raise
        engine.send(start)
        return engine

    @property
    def is_connected(self) -> bool:
        """Whether messages reach it; False from the moment of its death on."""
        return self._transport is not None and not self._transport.is_closing()

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: Message) -> None:
        """Sends a message; to an engine that is gone, nothing happens: `on_death` says so."""
        if self._transport is not None and self.is_connected:
            self._transport.write(self._frames.encode(message))

    async def stop(self) -> None:
        """Ends the process; `on_death` is not called any more."""
        self._on_death = _ignore
        self.send(Stop())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), self._stop_seconds)
        self.kill()
        await self._ended.wait()

    def kill(self) -> None:
        """Ends the process at once."""
        if self._transport is not None:
            self._transport.abort()
        if self._process.poll() is None:
            self._process.kill()

    # Called by the loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if isinstance(transport, asyncio.WriteTransport):
            self._transport = transport

    def data_received(self, data: bytes) -> None:
        for message in self._frames.feed(data):
            if isinstance(message, Died):
                self._last_words = message.message
            else:
                self._on_message(message)

    def connection_lost(self, error: Exception | None) -> None:
        # The socket is gone, so the process is about to be, or is of no use.
        self._transport = None
        self._reaping = asyncio.get_running_loop().create_task(self._reap())

    async def _reap(self) -> None:
        began, killed = time.monotonic(), False
        while (status := self._process.poll()) is None and time.monotonic() < began + _GONE_SECONDS:
            if not killed and time.monotonic() > began + _KILL_SECONDS:
                self._process.kill()
                killed = True
            await asyncio.sleep(_POLL_SECONDS)
        self._ended.set()
        if status is None:
            ended = "its host does not say how"
        else:
            ended = f"signal {-status}" if status < 0 else f"exit status {status}"
        self._on_death(self._last_words or f"the engine process has ended ({ended})")


def _ignore(_: str) -> None:
    pass
