"""The processes that drive the devices of one engine, while it runs.

The leader is the engine's process, and number 0 of the job that JAX knows; whatever its runner does, the followers do
too (`engine.replay`). How they find each other: `engine.joining`.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

import jax

from jaxdual.config import ConfigError
from jaxdual.engine.follower_wire import Agreed, Alive, End, Failed
from jaxdual.errors import EngineDeadError
from jaxdual.frames import Message, MessageSocket
from models.errors import ModelError

_ALIVE_SECONDS = 5.0  # between two signs of life
_SILENT_SECONDS = 60.0  # without any until a follower is taken for lost
_STUCK_SECONDS = 15.0  # that a call goes on after one was lost, until this process ends: nothing else frees it
_LOOK_SECONDS = 0.5
_END_SECONDS = 10.0  # from the end of an engine until followers that are still there are killed
_WORDS_SECONDS = 2.0  # in which a process that has made something fail is noticed to have ended


class Followers:
    """The leader's view of the others, which a thread listens to: a lost one is noticed whatever this process does.

    Args:
      channels: to each, by its number.
      children: those of them that this process has started.
    """

    def __init__(self, channels: Mapping[int, MessageSocket], children: Sequence[subprocess.Popen[bytes]]) -> None:
        self._channels = dict(channels)
        self._children = tuple(children)
        self._changed = threading.Condition()
        self._agreed: dict[int, bytes] = {}
        self._heard = dict.fromkeys(channels, time.monotonic())
        self._gone: set[int] = set()
        self._lost: Exception | None = None
        self._call: float | None = None  # when the call under way began
        self._closing = False
        self._wake, self._woken = os.pipe()
        self._listener = threading.Thread(target=self._listen, name="followers", daemon=True)
        self._listener.start()
        atexit.register(self.close)

    @property
    def descriptors(self) -> tuple[int, ...]:
        """Readable when one of them is lost."""
        return (self._wake,)

    def agree(self, what: str, identity: bytes) -> None:
        """Waits until all have come to this point with the same in their hands.

        Args:
          what: they have, for errors.
          identity: of that, in this process.

        Raises:
          ConfigError, ModelError: one of them has not, or can't go on.
          EngineDeadError: one of them has ended.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._lost is not None or len(self._agreed) == len(self._channels))
            agreed, self._agreed = self._agreed, {}
        self.check()
        for number, other in sorted(agreed.items()):
            if other != identity:
                raise ModelError(f"process {number} has another {what} than process 0")
        self.send(Agreed(identity))

    def send(self, message: Message) -> None:
        """Tells all of them.

        Raises:
          EngineDeadError: one of them has ended.
        """
        frame: bytes | None = None
        for number, channel in self._channels.items():
            frame = frame or channel.encode(message)
            try:
                channel.send_frame(frame)
            except OSError as error:
                self.explain()
                raise EngineDeadError(f"process {number} of the engine can't be reached: {error}") from error

    @contextlib.contextmanager
    def calling(self, message: Message) -> Iterator[None]:
        """Has all of them make the call that this process makes meanwhile.

        Raises:
          ConfigError, ModelError, EngineDeadError: the call has failed, and one of them has ended.
        """
        self._call = time.monotonic()
        try:
            self.send(message)
            yield
        except Exception:
            self.explain()
            raise
        finally:
            self._call = None

    def explain(self) -> None:
        """Raises what a process has ended with, if one does so in these moments: after something has failed."""
        with self._changed:
            self._changed.wait_for(lambda: self._lost is not None, _WORDS_SECONDS)
        self.check()

    def check(self) -> None:
        """Raises what a process was lost with, if one was."""
        if self._lost is not None:
            raise self._lost

    def close(self) -> None:
        """Ends all of them."""
        if self._closing:
            return
        self._closing = True
        atexit.unregister(self.close)
        for number, channel in self._channels.items():
            with contextlib.suppress(OSError):
                if number not in self._gone:
                    channel.send(End())
        # Their last deed is to leave JAX's job, whose coordinator must be there until then: it is in this process.
        deadline = time.monotonic() + _END_SECONDS
        with self._changed:
            self._changed.wait_for(lambda: len(self._gone) == len(self._channels), _END_SECONDS)
        end(self._children, deadline)
        self._listener.join()
        for channel in self._channels.values():
            channel.close()
        os.close(self._wake)
        os.close(self._woken)
        jax.distributed.shutdown()

    # The thread that listens.

    def _listen(self) -> None:
        poll = select.poll()
        by_descriptor = {channel.fileno(): number for number, channel in self._channels.items()}
        for descriptor in by_descriptor:
            poll.register(descriptor, select.POLLIN)
        ends: float | None = None
        while len(self._gone) < len(self._channels) and (ends is None or time.monotonic() < ends):
            for descriptor, _ in poll.poll(_LOOK_SECONDS * 1000):
                number = by_descriptor[descriptor]
                try:
                    for message in self._channels[number].receive(0.0):
                        self._take(number, message)
                except (OSError, ValueError):
                    poll.unregister(descriptor)
                    self._ended(number)
            if self._closing:
                ends = ends or time.monotonic() + _END_SECONDS
            else:
                self._look()

    def _take(self, number: int, message: Message) -> None:
        self._heard[number] = time.monotonic()
        match message:
            case Agreed(identity):
                with self._changed:
                    self._agreed[number] = identity
                    self._changed.notify_all()
            case Failed(kind, text):
                kinds = {one.__name__: one for one in (ConfigError, ModelError)}
                self._lose(kinds.get(kind, EngineDeadError)(f"process {number}: {text}"))

    def _ended(self, number: int) -> None:
        self._lose(EngineDeadError(f"process {number} of the engine has ended"))
        with self._changed:
            self._gone.add(number)
            self._changed.notify_all()

    def _look(self) -> None:
        now = time.monotonic()
        for number, heard in self._heard.items():
            if number not in self._gone and now - heard > _SILENT_SECONDS:
                self._lose(
                    EngineDeadError(f"process {number} of the engine has given no sign of life for {now - heard:.0f} s")
                )
        if self._lost is not None and self._call is not None and now - self._call > _STUCK_SECONDS:
            # It waits for the lost one within a program of the devices, which can't be told to stop.
            print(f"jaxdual: {self._lost}; this process can't go on", file=sys.stderr, flush=True)
            os._exit(1)

    def _lose(self, reason: Exception) -> None:
        with self._changed:
            if self._lost is None and not self._closing:
                self._lost = reason
                os.write(self._woken, b"!")
            self._changed.notify_all()


class Leader:
    """A follower's view of process 0, which hears from it that it lives.

    Args:
      channel: to it.
    """

    def __init__(self, channel: MessageSocket) -> None:
        self._channel = channel
        self._messages: deque[Message] = deque()
        self._sending = threading.Lock()
        threading.Thread(target=self._live, name="signs of life", daemon=True).start()

    def agree(self, what: str, identity: bytes) -> None:
        """Says what this process has, and waits until all have the same.

        Raises:
          ConnectionError: the leader has ended, because one of them has not, or can't go on.
        """
        self._send(Agreed(identity))
        if not isinstance(self.next(), Agreed):
            raise ConnectionError("not all processes can serve the model; its own one has said why")

    def failed(self, error: BaseException) -> None:
        """Says why this process ends."""
        with contextlib.suppress(OSError):
            self._send(Failed(type(error).__name__, str(error) or type(error).__name__))

    def leave(self) -> None:
        """Ends this process's part in the job."""
        jax.distributed.shutdown()
        self._channel.close()

    def next(self) -> Message:
        """Waits for the next message.

        Raises:
          ConnectionError: it has ended.
        """
        while not self._messages:
            self._messages.extend(self._channel.receive(None))
        return self._messages.popleft()

    def _send(self, message: Message) -> None:
        with self._sending:
            self._channel.send(message)

    def _live(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # closed: nobody listens any more
            while True:
                self._send(Alive())
                time.sleep(_ALIVE_SECONDS)


def end(children: Sequence[subprocess.Popen[bytes]], deadline: float = 0.0) -> None:
    """Waits for processes until a moment of the monotonic clock, and then kills them."""
    for child in children:
        try:
            child.wait(max(deadline - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
