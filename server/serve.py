"""One server: engine, faces, and their common life from start to drain."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import uvicorn

from jaxdual.async_api import AsyncLLM
from jaxdual.cascade.config import CascadeConfig
from jaxdual.cascade.serving.service import CascadeLLM
from jaxdual.config import ClusterConfig, ConfigError, EngineConfig, ServerConfig
from jaxdual.engine.supervisor import EngineState
from jaxdual.served_models import Model, ServedModels
from server.grpc import GrpcServer, create_server
from server.http import create_app
from server.metrics import Metrics

_logger = logging.getLogger("server")

_GRACE_SECONDS = 2.0  # for faces to hand over the last bytes once all requests have ended
_BACKLOG = 2048


class Server:
    """Listens at once, and says that it serves when the engine has compiled all its shapes.

    Args:
      engine_config, server_config: what to serve, and how.
      cluster_config: by how many engines, if by more than one.
      cascade_config: the models that answer as one, in place of that of `engine_config`.
    """

    def __init__(
        self,
        engine_config: EngineConfig,
        server_config: ServerConfig,
        cluster_config: ClusterConfig | None = None,
        cascade_config: CascadeConfig | None = None,
    ) -> None:
        self._config = server_config
        most_queued = server_config.max_queued_requests
        self._llm: Model = (
            AsyncLLM.from_config(engine_config, cluster=cluster_config, max_queued_requests=most_queued)
            if cascade_config is None
            else CascadeLLM.from_config(cascade_config, most_queued)
        )
        self._models = ServedModels(self._llm)
        self._metrics = Metrics(self._models)
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()

    async def run(self) -> int:
        """Serves until a signal or the engine's end; returns the exit status.

        Raises:
          ConfigError, ModelError, TokenizerError: what is to be served can't be.
          OSError: an address can't be listened on.
        """
        began = time.monotonic()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, number)
        self._models.on_state(self._on_state)
        config = self._config
        self._check_certificate()
        with self._listen() as listener:
            grpc_server = self._grpc()
            http_server = self._http()
            await grpc_server.start()
            serving = asyncio.create_task(http_server.serve([listener]))
            scheme = "http" if config.ssl_certfile is None else "https"
            address = f"{scheme}://{config.host}:{listener.getsockname()[1]}"
            _logger.info("listening on %s and, for gRPC, on %s:%d", address, config.host, grpc_server.port)
            try:
                await self._serve(began, serving)
            finally:
                # Health says no, nothing new is taken, what runs may finish: then the faces close.
                await self._drain()
                await grpc_server.stop(_GRACE_SECONDS)
                http_server.should_exit = True
                try:
                    await serving
                finally:
                    await self._llm.shutdown()
        return 0 if self._stop.is_set() else 1

    async def _serve(self, began: float, http: asyncio.Task[None]) -> None:
        """Returns when there is a reason to end."""
        start = asyncio.create_task(self._llm.warmed_up())
        over = [asyncio.create_task(self._stop.wait()), asyncio.create_task(self._ended()), http]
        await asyncio.wait((start, *over), return_when=asyncio.FIRST_COMPLETED)
        if start.done():
            start.result()
            self._report(time.monotonic() - began)
        start.cancel()
        await asyncio.wait(over, return_when=asyncio.FIRST_COMPLETED)
        for task in over[:-1]:
            task.cancel()

    async def _ended(self) -> None:
        """Returns when no engine can be started any more."""
        changed = asyncio.Event()
        self._models.on_state(lambda _: changed.set())
        while self._models.state is not EngineState.STOPPED:
            changed.clear()
            await changed.wait()

    async def _drain(self) -> None:
        drained = asyncio.create_task(self._llm.drain(self._config.shutdown_timeout))
        hurry = asyncio.create_task(self._hurry.wait())
        await asyncio.wait((drained, hurry), return_when=asyncio.FIRST_COMPLETED)
        drained.cancel()
        hurry.cancel()
        if self._hurry.is_set():
            await self._llm.drain(0)

    def _on_signal(self, number: int) -> None:
        if self._stop.is_set():
            _logger.info("a second signal: ending at once")
            self._hurry.set()
        else:
            _logger.info(
                "%s: finishing %d requests, for at most %g s",
                signal.Signals(number).name,
                self._models.num_unfinished,
                self._config.shutdown_timeout,
            )
            self._stop.set()

    def _on_state(self, state: EngineState) -> None:
        _logger.info("the engine is %s", state.value)

    def _report(self, seconds: float) -> None:
        report = self._llm.startup_report()
        shapes = report["compile_seconds_by_shape"]
        lines = "".join(f"\n  {shape_seconds:7.2f} s  {name}" for name, shape_seconds in shapes.items())
        _logger.info(
            "serving %s after %.1f s: %.1f s loading, %.1f s compiling%s",
            report["model"],
            seconds,
            report["load_seconds"],
            report["compile_seconds"],
            lines,
        )

    # Faces.

    def _check_certificate(self) -> None:
        if self._config.ssl_certfile is None:
            return
        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
                self._config.ssl_certfile, self._config.ssl_keyfile
            )
        except OSError as error:
            raise ConfigError(
                f"ssl_certfile={self._config.ssl_certfile!r} with ssl_keyfile={self._config.ssl_keyfile!r} can't be "
                f"used: {error}"
            ) from None

    def _listen(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self._config.host else socket.AF_INET
        # The protocol is named because asyncio turns Nagle's algorithm off only for sockets that say they are TCP; with
        # it on, answers of two packets wait 40 ms for the client's acknowledgement.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((self._config.host, self._config.port))
        except OSError as error:
            listener.close()
            raise OSError(
                f"can't listen on {self._config.host}:{self._config.port}: {error.strerror or error}"
            ) from None
        listener.listen(_BACKLOG)
        return listener

    def _http(self) -> uvicorn.Server:
        config = uvicorn.Config(
            create_app(self._models, self._metrics, api_key=self._config.api_key),
            log_config=None,
            access_log=False,
            lifespan="off",
            backlog=_BACKLOG,
            timeout_graceful_shutdown=int(_GRACE_SECONDS),
            ssl_certfile=self._config.ssl_certfile,
            ssl_keyfile=self._config.ssl_keyfile,
        )
        return _HttpServer(config)

    def _grpc(self) -> GrpcServer:
        config = self._config
        credentials = None
        if config.ssl_certfile is not None and config.ssl_keyfile is not None:
            pair = (Path(config.ssl_keyfile).read_bytes(), Path(config.ssl_certfile).read_bytes())
            credentials = grpc.ssl_server_credentials([pair])
        host = f"[{config.host}]" if ":" in config.host else config.host
        return create_server(
            self._models, self._metrics, f"{host}:{config.grpc_port}", credentials=credentials, api_key=config.api_key
        )


class _HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers: this program has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
