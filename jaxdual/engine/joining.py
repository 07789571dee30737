"""How the processes that drive the devices of one engine find each other.

The leader listens at `coordinator_address`, where the followers join; JAX's own coordination service is at the port
after it. Without an address it starts followers on its own machine.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata

import jax

from jaxdual.config import ConfigError, EngineConfig, host_and_port
from jaxdual.engine.follower_wire import Join, Refused, ToFollower, ToLeader, Welcome
from jaxdual.engine.followers import Followers, Leader, end
from jaxdual.frames import MessageSocket

_HELLO_SECONDS = 5.0  # from a connection to its first message
_RETRY_SECONDS = 0.2  # between two attempts to reach a leader that is not there yet
_SEND_SECONDS = 60


def lead(config: EngineConfig) -> Followers:
    """Waits until all processes have joined, and starts the job that JAX knows.

    Raises:
      ConfigError: they have not in time, or JAX has been used in this process before.
    """
    host, port = ("127.0.0.1", 0) if config.coordinator_address is None else host_and_port(config.coordinator_address)
    deadline = time.monotonic() + config.join_timeout
    children: list[subprocess.Popen[bytes]] = []
    with _listening(host, port) as listener:
        port = listener.getsockname()[1]
        if config.coordinator_address is None:
            coordinator = _address(host, _free_port(host))
        else:
            coordinator = _address(host, port + 1)
            _listening(host, port + 1).close()  # JAX would not say which port it is that is in use
        if config.coordinator_address is None:
            children = [_start_here(_address(host, port), number) for number in range(1, config.num_processes)]
        door = _Door(listener, config, children, deadline)
        try:
            door.wait()
            for number, channel in door.joined.items():
                channel.send(Welcome(config, coordinator, _devices(config, number)))
            _start_jax(config, coordinator, 0, _devices(config, 0), deadline)
        except BaseException as error:
            for channel in door.joined.values():
                with contextlib.suppress(OSError):
                    channel.send(Refused(f"the engine can't start: {error}"))
            door.close()
            end(children)
            raise
    return Followers(door.joined, children)


def _listening(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=_family(host))
    except OSError as error:
        raise ConfigError(f"coordinator_address: {_address(host, port)}: {error.strerror}") from error


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
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{address}: what listens there is no leader of an engine, or has ended before all processes had joined"
        ) from error
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


class _Door:
    """Where followers knock.

    Args:
      listener: that they connect to.
      config: of the engine.
      children: processes that are expected, as far as this one has started them.
      deadline: on the monotonic clock.
    """

    def __init__(
        self,
        listener: socket.socket,
        config: EngineConfig,
        children: Sequence[subprocess.Popen[bytes]],
        deadline: float,
    ) -> None:
        self._listener, self._config, self._children, self._deadline = listener, config, children, deadline
        self._strangers: dict[int, tuple[MessageSocket, float]] = {}  # until when they may say who they are
        self.joined: dict[int, MessageSocket] = {}

    def wait(self) -> None:
        """Returns when all are there, who may leave again until then.

        Raises:
          ConfigError: they are not in time.
        """
        while len(self.joined) < self._config.num_processes - 1:
            poll = select.poll()
            by_descriptor = {channel.fileno(): number for number, channel in self.joined.items()}
            for descriptor in (self._listener.fileno(), *self._strangers, *by_descriptor):
                poll.register(descriptor, select.POLLIN)
            for descriptor, _ in poll.poll(_RETRY_SECONDS * 1000):
                if descriptor == self._listener.fileno():
                    self._open()
                elif descriptor in self._strangers:
                    self._hear(self._strangers.pop(descriptor)[0])
                else:  # it has nothing more to say: it has ended
                    self.joined.pop(by_descriptor[descriptor]).close()
            now = time.monotonic()
            for descriptor, (channel, until) in list(self._strangers.items()):
                if now > until:
                    del self._strangers[descriptor]
                    channel.close()
            self._check(now)
        self._send_strangers_away()

    def close(self) -> None:
        """Sends everybody away."""
        self._send_strangers_away()
        for channel in self.joined.values():
            channel.close()

    def _send_strangers_away(self) -> None:
        for channel, _ in self._strangers.values():
            channel.close()
        self._strangers.clear()

    def _open(self) -> None:
        connection, _ = self._listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # What can't be sent for so long never will be.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", _SEND_SECONDS, 0))
        channel = MessageSocket(connection, ToLeader, "a follower")
        self._strangers[channel.fileno()] = (channel, time.monotonic() + _HELLO_SECONDS)

    def _hear(self, channel: MessageSocket) -> None:
        try:
            message, *_ = channel.receive(0.0)
        except (ValueError, OSError):  # whoever that was, it speaks another language
            channel.close()
            return
        refusal = _refusal(message, self._config, self.joined)
        if refusal is None:
            self.joined[message.process_id] = channel
            return
        with contextlib.suppress(OSError):
            channel.send(Refused(refusal))
        channel.close()

    def _check(self, now: float) -> None:
        for number, child in enumerate(self._children, start=1):
            if child.poll() is not None:
                raise ConfigError(f"process {number} of the engine has ended with {child.returncode} before all joined")
        if now < self._deadline or len(self.joined) == self._config.num_processes - 1:
            return
        config = self._config
        missing = [number for number in range(1, config.num_processes) if number not in self.joined]
        raise ConfigError(
            f"{len(self.joined) + 1} of {config.num_processes} processes have joined within join_timeout="
            f"{config.join_timeout:g} seconds; missing: {', '.join(map(str, missing))}. Each is started by "
            f"`python -m jaxdual.follower --coordinator-address "
            f"{config.coordinator_address or _address(*self._listener.getsockname()[:2])} --process-id NUMBER`"
        )


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
        # Else it takes SIGTERM for itself, and nothing ends.
        jax.config.update("jax_enable_preemption_service", False)
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


def _connected(address: str, deadline: float) -> socket.socket:
    where = host_and_port(address)
    while True:
        try:
            connection = socket.create_connection(where, max(deadline - time.monotonic(), _RETRY_SECONDS))
        except OSError as error:
            if time.monotonic() >= deadline:
                raise ConfigError(f"nobody leads an engine at {address}: {error.strerror or error}") from error
            time.sleep(_RETRY_SECONDS)
            continue
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _free_port(host: str) -> int:
    with socket.create_server((host, 0), family=_family(host)) as probe:
        return int(probe.getsockname()[1])
