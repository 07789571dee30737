"""The engine's end of its KV agent: starts it, speaks to it, and notices its death."""

from __future__ import annotations

import contextlib
import select
import socket
import subprocess
import sys
from typing import Any

from jaxdual.agent.wire import Attach, Attached, AttachFailed, FromAgent
from jaxdual.config import ConfigError
from jaxdual.frames import Frames, Message
from jaxdual.transport.slab import SharedSlab

_READ_BYTES = 1 << 20
_START_SECONDS = 60.0


class AgentProcess:
    """One KV agent. It lives until `close` or its own death; the slab is its starter's and outlives it.

    Args:
      attach: which store it opens.
      slab: staging memory.

    Attributes:
      attached: its answer: where other agents reach it.

    Raises:
      ConfigError: the store can't be opened.
      OSError: the process can't be started, or ends at once.
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
        self.send(attach)
        try:
            (answer,) = self._first_messages()
        except BaseException:
            self.kill()
            raise
        if isinstance(answer, AttachFailed):
            self.kill()
            raise ConfigError(f"kv_store={attach.store!r}, kv_transport={attach.carrier!r}: {answer.message}")
        if not isinstance(answer, Attached):
            raise TypeError(f"the first answer of a KV agent is {type(answer).__name__}")
        self.attached = answer

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
        """Messages that have come; waits up to `timeout` seconds for the first.

        Raises:
          ConnectionError: the agent is gone.
        """
        self._flush()
        messages: list[Any] = []
        while not messages and select.select([self._socket], [], [], timeout)[0]:
            try:
                data = self._socket.recv(_READ_BYTES)
            except OSError as error:
                raise ConnectionError(f"the KV agent is gone: {error}") from error
            if not data:
                raise ConnectionError("the KV agent is gone")
            messages += self._frames.feed(data)
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

    def _first_messages(self) -> list[Any]:
        messages = self.receive(_START_SECONDS)
        if not messages:
            raise OSError(f"the KV agent has not answered within {_START_SECONDS:.0f} s")
        return messages
