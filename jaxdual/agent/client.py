"""The engine's end of its KV agent: starts it, speaks to it, and notices its death."""

from __future__ import annotations

import contextlib
import select
import socket
import subprocess
import sys
import time
from typing import Any

from jaxdual.agent.wire import Alive, Attach, Attached, AttachFailed, FromAgent
from jaxdual.config import ConfigError
from jaxdual.frames import Frames, Message
from jaxdual.transport.slab import SharedSlab

_READ_BYTES = 1 << 20
_START_SECONDS = 60.0
_SILENT_SECONDS = 20.0  # of an agent that is taken for dead: it says each second that it lives
_PAUSE_SECONDS = _SILENT_SECONDS / 4  # between two calls of `receive`, at most, to count as listening


class AgentProcess:
    """One KV agent. It lives until `close` or its own death; the slab is its starter's and outlives it.

    What it is asked for before it has answered `attach` it does afterwards.

    Args:
      attach: which store it opens.
      slab: staging memory.

    Attributes:
      attached: its answer: where other agents reach it; None before it has come.

    Raises:
      OSError: the process can't be started.
    """

    def __init__(self, attach: Attach, slab: SharedSlab) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            # A group of its own: Ctrl-C is the front's to handle.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "jaxdual.agent.process", str(theirs.fileno()), str(slab.fd)],
                pass_fds=[theirs.fileno(), slab.fd],
                stdin=subprocess.DEVNULL,
                process_group=0,
            )
        ours.setblocking(False)
        self._socket = ours
        self._frames = Frames(FromAgent)
        self._outbox = bytearray()
        self._attach = attach
        self.attached: Attached | None = None
        self._listened = time.monotonic()  # when `receive` was called last
        self._silent = 0.0  # seconds of listening in which nothing came
        self.send(attach)

    def wait(self) -> None:
        """Waits for its first answer.

        Raises:
          ConfigError: the store can't be opened.
          OSError: it ends at once, or does not answer.
        """
        try:
            while self.attached is None:
                self.receive(_PAUSE_SECONDS)
        except BaseException:
            self.kill()
            raise

    @property
    def patience(self) -> float:
        """Seconds after which `receive` is to be called though nothing has come."""
        return _PAUSE_SECONDS

    @property
    def pid(self) -> int:
        return self._process.pid

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """Sends a message, or keeps it for `receive` to send where the agent is far behind: the engine never waits."""
        self._outbox += self._frames.encode(message)
        self._flush()

    def receive(self, timeout: float = 0.0) -> list[Any]:
        """Messages that have come; waits up to `timeout` seconds for any.

        Raises:
          ConnectionError: the agent is gone, or silent although it was listened to.
          ConfigError: the store can't be opened.
        """
        self._flush()
        messages: list[Any] = []
        heard = False
        while not messages and select.select([self._socket], [], [], 0.0 if heard else timeout)[0]:
            try:
                data = self._socket.recv(_READ_BYTES)
            except OSError as error:
                raise ConnectionError(f"the KV agent is gone: {error}") from error
            if not data:
                raise ConnectionError("the KV agent is gone")
            heard = True
            messages += [message for message in self._frames.feed(data) if not self._keep(message)]
        self._watch(heard=heard)
        return messages

    def kill(self) -> None:
        """Ends the process; when this returns, nothing of it touches the slab any more."""
        self._socket.close()
        self._process.kill()
        self._process.wait()

    def close(self, timeout: float) -> None:
        """Lets the process store what it was given, for so many seconds, and ends it."""
        with contextlib.suppress(OSError):
            self._socket.setblocking(True)
            self._socket.settimeout(timeout)
            self._socket.sendall(self._outbox)
        self._socket.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)
        self.kill()

    def _flush(self) -> None:
        # A dead agent is noticed by `receive`.
        with contextlib.suppress(OSError):
            while self._outbox:
                del self._outbox[: self._socket.send(self._outbox)]

    def _keep(self, message: Any) -> bool:
        """Whether a message is for this object alone."""
        match message:
            case AttachFailed():
                attach = self._attach
                raise ConfigError(f"kv_store={attach.store!r}, kv_transport={attach.carrier!r}: {message.message}")
            case Attached():
                self.attached = message
        return isinstance(message, Attached | Alive)

    def _watch(self, *, heard: bool) -> None:
        # An engine that compiles, or was stopped together with its agent, has not listened: that time does not count.
        now = time.monotonic()
        self._silent = 0.0 if heard else self._silent + min(now - self._listened, _PAUSE_SECONDS)
        self._listened = now
        if self._silent > (_START_SECONDS if self.attached is None else _SILENT_SECONDS):
            raise ConnectionError(f"the KV agent has said nothing for {self._silent:.0f} s")
