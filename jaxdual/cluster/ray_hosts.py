"""The hosts of a Ray cluster as those that engines run on.

Ray chooses the hosts and starts a process on each, and that is all: engines speak to the cluster's process over a
connection of their own, and to each other by their KV agents. An engine on a host that is lost is started again on
another one.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import logging
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Literal

import ray
from ray.exceptions import RayError
from ray.util import get_node_ip_address

from jaxdual.config import ClusterConfig, ConfigError, EngineConfig
from jaxdual.engine.client import EngineProcess
from jaxdual.engine.cluster_part import ClusterPart
from jaxdual.engine.wire import Start

_PLACE_SECONDS = 600.0  # for Ray to find a host: it may have to start one
_WORD_SECONDS = 15.0  # between two words about that
_CALL_SECONDS = 60.0  # for an engine's process to call back
_TOKEN_BYTES = 32
_SIGKILL = -9
# A host that is lost says nothing: after 5 s of silence it is asked every 2 s, and given up after 5 questions.
_KEEP_ALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 5, "TCP_USER_TIMEOUT": 15_000}

_logger = logging.getLogger(__name__)


class _Launcher:
    """Starts one engine on the host where Ray has put it. It ends with its driver, the engine with its connection."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def host(self) -> str:
        """Address of this host."""
        return str(get_node_ip_address())

    def start(self, host: str, port: int, token: bytes) -> int:
        """Starts the engine, connected to an address; returns its process id."""
        with socket.create_connection((host, port), _CALL_SECONDS) as sock:
            sock.settimeout(None)
            _keep_alive(sock)
            sock.sendall(token)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "jaxdual.engine.process", str(sock.fileno())],
                pass_fds=[sock.fileno()],
                stdin=subprocess.DEVNULL,
                process_group=0,
            )
        return self._process.pid

    def wait(self) -> int:
        """Its exit status, when it has ended."""
        return _SIGKILL if self._process is None else self._process.wait()

    def kill(self) -> None:
        """Ends the engine at once."""
        if self._process is not None:
            self._process.kill()


class _RemoteProcess:
    """An engine's process as `EngineProcess` knows it. The launcher goes when nobody holds this any more."""

    def __init__(self, launcher: Any, pid: int) -> None:
        self.pid = pid
        self._launcher = launcher
        self._exit = launcher.wait.remote()

    def poll(self) -> int | None:
        """Exit status; that of a process that was killed, where its host is gone."""
        try:
            return int(ray.get(self._exit)) if ray.wait([self._exit], timeout=0)[0] else None
        except RayError:
            return _SIGKILL

    def kill(self) -> None:
        """Ends it at once."""
        self._launcher.kill.remote()


class RayHosts:
    """See `hosts.Hosts`. Uses the Ray cluster of `RAY_ADDRESS`, or one that runs on this machine, or starts one here.

    Each engine takes a CPU of Ray's, and a GPU if the cluster has any; engines spread over the hosts. All hosts need
    jaxdual in the same version, and model and store under the same paths.
    """

    carrier: Literal["shm", "tcp"] = "tcp"

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._host = ""
        self._gpus = 0
        self._accepting: asyncio.Task[None] | None = None
        self._calls: dict[bytes, asyncio.Future[socket.socket]] = {}  # by token

    async def open(self, engines: int) -> None:
        """See `Hosts`."""
        try:
            await asyncio.to_thread(ray.init, configure_logging=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(f"cluster='ray': no Ray cluster can be reached: {error}") from error
        has = ray.cluster_resources()
        self._gpus = 1 if has.get("GPU", 0) else 0
        for resource, each in (("CPU", 1), ("GPU", self._gpus)):
            if has.get(resource, 0) < each * engines:
                raise ConfigError(
                    f"cluster='ray': {engines} engines need {each * engines} {resource}s of Ray's, which has "
                    f"{has.get(resource, 0):g}"
                )
        self._host = str(get_node_ip_address())
        self._socket = socket.create_server((self._host, 0))
        self._socket.setblocking(False)
        self._accepting = asyncio.get_running_loop().create_task(self._accept(self._socket))

    async def launch(
        self,
        number: int,
        config: EngineConfig,
        part: ClusterPart,
        on_message: Callable[[Any], None],
        on_death: Callable[[str], None],
    ) -> EngineProcess:
        """See `Hosts`."""
        actor = ray.remote(_Launcher).options(
            num_cpus=1,
            num_gpus=self._gpus,
            max_concurrency=2,  # `kill` beside `wait`
            scheduling_strategy="SPREAD",
        )
        engine = f"{part.role.value} {number}"
        token = secrets.token_bytes(_TOKEN_BYTES)
        call = self._calls[token] = asyncio.get_running_loop().create_future()
        try:
            launcher = await asyncio.to_thread(actor.remote)
            host = await self._host_of(launcher, engine)
            port = 0 if self._socket is None else self._socket.getsockname()[1]
            pid, sock = await asyncio.wait_for(
                asyncio.gather(_of(launcher.start.remote(self._host, port, token)), call), _CALL_SECONDS
            )
        except (RayError, TimeoutError) as error:
            raise OSError(f"Ray has not started it: {str(error) or 'it takes too long'}") from error
        finally:
            del self._calls[token]
        _logger.info("%s runs on %s", engine, host)
        _keep_alive(sock)
        if config.kv_host is None:
            config = dataclasses.replace(config, kv_host=host)
        process = _RemoteProcess(launcher, pid)
        start = Start(config, ClusterConfig(), part)
        return await EngineProcess.connect(process, sock, start, on_message, on_death)

    async def close(self) -> None:
        """See `Hosts`."""
        if self._accepting is not None:
            self._accepting.cancel()
        if self._socket is not None:
            self._socket.close()
        await asyncio.to_thread(ray.shutdown)

    async def _host_of(self, launcher: Any, engine: str) -> str:
        """Where Ray has put a launcher; says so while it has not."""
        asked = asyncio.ensure_future(_of(launcher.host.remote()))
        for _ in range(int(_PLACE_SECONDS / _WORD_SECONDS)):
            done, _ = await asyncio.wait([asked], timeout=_WORD_SECONDS)
            if done:
                return str(await asked)
            _logger.warning("Ray has no host for %s yet: all CPUs or GPUs may be in use", engine)
        asked.cancel()
        raise TimeoutError(f"it has found no host in {_PLACE_SECONDS:.0f} s")

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        greetings = set[asyncio.Task[None]]()
        while True:
            try:
                sock, _ = await loop.sock_accept(listening)
            except OSError:  # no descriptor free, or the stranger is gone again
                await asyncio.sleep(0.1)
                continue
            task = loop.create_task(self._greet(sock))
            greetings.add(task)
            task.add_done_callback(greetings.discard)

    async def _greet(self, sock: socket.socket) -> None:
        """Gives a connection to the launch whose token it knows; ends any other."""
        sock.setblocking(False)
        token = b""
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(_CALL_SECONDS):
                while len(token) < _TOKEN_BYTES:
                    more = await asyncio.get_running_loop().sock_recv(sock, _TOKEN_BYTES - len(token))
                    if not more:
                        break
                    token += more
        for known, call in self._calls.items():
            if hmac.compare_digest(known, token) and not call.done():
                call.set_result(sock)
                return
        sock.close()


async def _of(reference: Any) -> Any:
    """What a reference of Ray stands for."""
    return await reference


def _keep_alive(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEP_ALIVE.items():
        sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
