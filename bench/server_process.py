"""A server of this repository, in a process of its own, for measurements and tests."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from bench.http_client import HttpClient
from bench.workers import ROOT

_POLL_SECONDS = 0.1
_END_SECONDS = 45.0
_LOG_CHARACTERS = 2000


class ServerFailedError(RuntimeError):
    """The server ended or was not ready in time; the message holds the end of its log."""


@dataclass(frozen=True, slots=True)
class RunningServer:
    """Where a server listens, its process, and the seconds until it served."""

    url: str
    grpc: str
    pid: int
    ready_seconds: float


@contextlib.asynccontextmanager
async def run_server(arguments: Sequence[str], *, ready_within: float = 300.0) -> AsyncIterator[RunningServer]:
    """A server on free loopback ports, ready when entered and ended when left.

    Args:
      arguments: further ones of `python -m server`.
      ready_within: seconds until `/health` must answer 200.

    Raises:
      ServerFailedError: it ended, or was not ready in time.
    """
    port, grpc_port = _free_ports(2)
    command = [sys.executable, "-m", "server", "--port", str(port), "--grpc-port", str(grpc_port), *arguments]
    with tempfile.TemporaryFile() as log:
        start = time.monotonic()
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        url = f"http://127.0.0.1:{port}"
        try:
            while not await _healthy(url):
                if process.poll() is not None or time.monotonic() - start > ready_within:
                    log.seek(0)
                    text = log.read().decode(errors="replace")[-_LOG_CHARACTERS:]
                    raise ServerFailedError(f"{' '.join(command)}: not ready, status {process.poll()}:\n{text}")
                await asyncio.sleep(_POLL_SECONDS)
            yield RunningServer(url, f"127.0.0.1:{grpc_port}", process.pid, time.monotonic() - start)
        finally:
            process.terminate()
            try:
                process.wait(timeout=_END_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


async def _healthy(url: str) -> bool:
    client = HttpClient(url, "")
    try:
        async with asyncio.timeout(5):
            status, _ = await client.get("/health")
    except (OSError, TimeoutError):
        return False
    finally:
        await client.close()
    return status == 200


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
