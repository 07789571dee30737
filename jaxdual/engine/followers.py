"""The processes that drive the devices of one engine: how they find each other, and how they end.

The leader is the engine's process, and number 0 of the job that JAX knows; whatever its runner does, the followers do
too (`engine.replay`). It listens at `coordinator_address`, where they join; JAX's own coordination service is at the
port after it. Without an address it starts followers on its own machine.
"""

from __future__ import annotations

import atexit
import contextlib
import select
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from importlib import metadata

import jax

from jaxdual.config import ConfigError, EngineConfig
from jaxdual.engine.follower_wire import Agreed, End, Failed, Join, Refused, ToFollower, ToLeader, Welcome
from jaxdual.errors import EngineDeadError
from jaxdual.frames import Message, MessageSocket
from models.errors import ModelError

_HELLO_SECONDS = 5.0  # from a connection to its first message
_RETRY_SECONDS = 0.2  # between two attempts to reach a leader that is not there yet
_END_SECONDS = 10.0  # from the end of an engine until followers that are still there are killed
_WORDS_SECONDS = 2.0  # in which a process that has made something fail is noticed to have ended


class Followers:
    """The leader's view of the others. Made by `lead`.

    Args:
      channels: to each, by its number.
      children: those of them that this process has started.
    """

    def __init__(self, channels: Mapping[int, MessageSocket], children: Sequence[subprocess.Popen[bytes]]) -> None:
        self._channels = dict(channels)
        self._children = tuple(children)
        self._closed = False
        atexit.register(self.close)

    @property
    def descriptors(self) -> tuple[int, ...]:
        """Readable when one of them has ended."""
        return tuple(channel.fileno() for channel in self._channels.values())

    def agree(self, what: str, identity: bytes) -> None:
        """Waits until all have come to this point with the same in their hands.

        Args:
          what: they have, for errors.
          identity: of that, in this process.

        Raises:
          ConfigError, ModelError: one of them has not, or can't go on.
          EngineDeadError: one of them has ended.
        """
        for number, channel in self._channels.items():
            for message in self._receive(number, channel, None):
                # A follower says no more before it has its answer.
                if isinstance(message, Agreed) and message.identity != identity:
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

    def explain(self) -> None:
        """Raises what a process has ended with, if one does so in these moments: after something has failed."""
        self.check(_WORDS_SECONDS)

    def check(self, timeout: float = 0.0) -> None:
        """Raises what a process has ended with, if one has.

        Args:
          timeout: seconds to wait for it.
        """
        by_descriptor = {channel.fileno(): number for number, channel in self._channels.items()}
        for descriptor in select.select(list(by_descriptor), [], [], timeout)[0]:
            number = by_descriptor[descriptor]
            self._receive(number, self._channels[number], 0.0)

    def close(self) -> None:
        """Ends all of them."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        for channel in self._channels.values():
            with contextlib.suppress(OSError):
                channel.send(End())
        # Their last deed is to leave JAX's job, whose coordinator must be there until then: it is in this process.
        deadline = time.monotonic() + _END_SECONDS
        for channel in self._channels.values():
            with contextlib.suppress(ConnectionError):
                while channel.receive(left := max(deadline - time.monotonic(), 0.0)) or left:
                    pass
            channel.close()
        _end(self._children, deadline)
        jax.distributed.shutdown()

    def _receive(self, number: int, channel: MessageSocket, timeout: float | None) -> list[Message]:
        try:
            messages: list[Message] = channel.receive(timeout)
        except ConnectionError as error:
            raise EngineDeadError(f"process {number} of the engine has ended") from error
        for message in messages:
            if isinstance(message, Failed):
                text = f"process {number}: {message.text}"
                kinds = {kind.__name__: kind for kind in (ConfigError, ModelError)}
                raise kinds.get(message.kind, EngineDeadError)(text)
        return messages


class Leader:
    """A follower's view of process 0. Made by `join`.

    Args:
      channel: to it.
    """

    def __init__(self, channel: MessageSocket) -> None:
        self._channel = channel
        self._messages: deque[Message] = deque()

    def agree(self, what: str, identity: bytes) -> None:
        """Says what this process has, and waits until all have the same.

        Raises:
          ConnectionError: the leader has ended, because one of them has not, or can't go on.
        """
        self._channel.send(Agreed(identity))
        if not isinstance(self.next(), Agreed):
            raise ConnectionError("not all processes can serve the model; its own one has said why")

    def failed(self, error: Exception) -> None:
        """Says why this process ends."""
        with contextlib.suppress(OSError):
            self._channel.send(Failed(type(error).__name__, str(error)))

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


def lead(config: EngineConfig) -> Followers:
    """Waits until all processes have joined, and starts the job that JAX knows.

    Raises:
      ConfigError: they have not in time, or JAX has been used in this process before.
    """
    host, port = _host_and_port(config.coordinator_address or "127.0.0.1:0")
    deadline = time.monotonic() + config.join_timeout
    try:
        listener = socket.create_server((host, port), family=_family(host))
    except OSError as error:
        raise ConfigError(f"coordinator_address={config.coordinator_address!r}: {error.strerror}") from error
    children: list[subprocess.Popen[bytes]] = []
    channels: dict[int, MessageSocket] = {}
    with listener:
        port = listener.getsockname()[1]
        coordinator = _address(host, port + 1 if config.coordinator_address else _free_port(host))
        try:
            if config.coordinator_address is None:
                children = [_start_here(_address(host, port), number) for number in range(1, config.num_processes)]
            while len(channels) < config.num_processes - 1:
                _take_next(listener, config, channels, children, deadline)
            for number, channel in channels.items():
                channel.send(Welcome(config, coordinator, _devices(config, number)))
            _start_jax(config, coordinator, 0, _devices(config, 0), deadline)
        except BaseException:
            for channel in channels.values():
                channel.close()
            _end(children)
            raise
    return Followers(channels, children)


def join(address: str, process_id: int, timeout: float) -> tuple[Leader, EngineConfig]:
    """Joins the engine whose leader listens at an address, as soon as it does.

    Args:
      process_id: of this process, from 1.
      timeout: seconds in which the leader is there, and all others have joined.

    Raises:
      ConfigError: nobody is there in time, or the leader refuses.
    """
    deadline = time.monotonic() + timeout
    channel = MessageSocket(_connected(address, deadline), ToFollower, "the leader")
    try:
        channel.send(Join(process_id, _versions()))
        (answer,) = channel.receive(max(deadline - time.monotonic(), 0.0)) or (None,)
    except OSError as error:
        raise ConfigError(f"the leader at {address} has ended before all processes had joined") from error
    if isinstance(answer, Refused):
        raise ConfigError(answer.reason)
    if not isinstance(answer, Welcome):
        raise ConfigError(f"{address}: not all processes of the engine have joined within {timeout:g} seconds")
    leader = Leader(channel)
    try:
        _start_jax(answer.config, answer.coordinator, process_id, answer.devices, deadline)
    except ConfigError as error:
        leader.failed(error)
        raise
    return leader, answer.config


def _take_next(
    listener: socket.socket,
    config: EngineConfig,
    channels: dict[int, MessageSocket],
    children: Sequence[subprocess.Popen[bytes]],
    deadline: float,
) -> None:
    """Waits for one more process to join."""
    while not select.select([listener], [], [], min(_RETRY_SECONDS, max(deadline - time.monotonic(), 0.0)))[0]:
        for number, child in enumerate(children, start=1):
            if child.poll() is not None and number not in channels:
                raise ConfigError(f"process {number} of the engine has ended with {child.returncode} before it joined")
        if time.monotonic() >= deadline:
            missing = [number for number in range(1, config.num_processes) if number not in channels]
            raise ConfigError(
                f"{len(channels) + 1} of {config.num_processes} processes have joined within join_timeout="
                f"{config.join_timeout:g} seconds; missing: {', '.join(map(str, missing))}. Each is started by "
                f"`python -m jaxdual.follower --coordinator-address "
                f"{config.coordinator_address or _address(*listener.getsockname()[:2])} --process-id NUMBER`"
            )
    connection, _ = listener.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    channel = MessageSocket(connection, ToLeader, "a follower")
    try:
        (message,) = channel.receive(min(_HELLO_SECONDS, max(deadline - time.monotonic(), 0.0)))
    except (ValueError, OSError):  # whoever that was, it speaks another language
        channel.close()
        return
    refusal = _refusal(message, config, channels)
    if refusal is None:
        channels[message.process_id] = channel
        return
    with contextlib.suppress(OSError):
        channel.send(Refused(refusal))
    channel.close()


def _refusal(message: object, config: EngineConfig, channels: Mapping[int, MessageSocket]) -> str | None:
    if not isinstance(message, Join):
        return f"the first message is {type(message).__name__}, not Join"
    if not 1 <= message.process_id < config.num_processes:
        return f"process_id={message.process_id} must be from 1 to {config.num_processes - 1}, num_processes less 1"
    if message.process_id in channels:
        return f"process_id={message.process_id} has joined already"
    if message.versions != _versions():
        return f"process {message.process_id} has {message.versions}, and process 0 has {_versions()}"
    return None


def _versions() -> dict[str, str]:
    python = ".".join(map(str, sys.version_info[:3]))
    return {"python": python} | {name: metadata.version(name) for name in ("jaxdual", "jax", "jaxlib")}


def _devices(config: EngineConfig, process_id: int) -> list[int] | None:
    """GPUs of a process, where all share this machine."""
    if config.coordinator_address is not None:
        return None
    count = config.devices_per_process
    return list(range(process_id * count, (process_id + 1) * count))


def _start_here(address: str, process_id: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "jaxdual.follower", "--coordinator-address", address]
    # A group of its own: Ctrl-C is for the leader. Signals that this process ignores, the new one does, too.
    return subprocess.Popen([*command, "--process-id", str(process_id)], stdin=subprocess.DEVNULL, process_group=0)


def _start_jax(
    config: EngineConfig, coordinator: str, process_id: int, devices: list[int] | None, deadline: float
) -> None:
    try:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        # Else one that dies takes all others with it at once, without a word of which and why.
        jax.config.update("jax_enable_recoverability", True)
        jax.distributed.initialize(
            coordinator,
            config.num_processes,
            process_id,
            local_device_ids=devices,
            cluster_detection_method="deactivate",
            initialization_timeout=max(round(deadline - time.monotonic()), 1),
            coordinator_bind_address=coordinator,
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"num_processes={config.num_processes}: process {process_id} can't start: {error}") from error


def _end(children: Sequence[subprocess.Popen[bytes]], deadline: float = 0.0) -> None:
    for child in children:
        try:
            child.wait(max(deadline - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _connected(address: str, deadline: float) -> socket.socket:
    host_and_port = _host_and_port(address)
    while True:
        try:
            connection = socket.create_connection(host_and_port, max(deadline - time.monotonic(), _RETRY_SECONDS))
        except OSError as error:
            if time.monotonic() >= deadline:
                raise ConfigError(f"nobody leads an engine at {address}: {error.strerror or error}") from error
            time.sleep(_RETRY_SECONDS)
            continue
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection


def _host_and_port(address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65534:
        raise ConfigError(f"coordinator_address={address!r} must be HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _free_port(host: str) -> int:
    with socket.create_server((host, 0), family=_family(host)) as probe:
        return int(probe.getsockname()[1])
