"""Streams completions over HTTP with as little work as possible, so that the server is what is measured."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import httptools

from bench.load import LoadRequest, Record


class HttpClient:
    """OpenAI's `/v1/completions` with server-sent events, over kept-alive connections.

    Args:
      url: of the server, such as "http://127.0.0.1:8000".
      model: name to ask for.
      api_key: sent as bearer token if given.
    """

    def __init__(self, url: str, model: str, api_key: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or parts.hostname is None:
            raise ValueError(f"{url=} must be http://HOST:PORT")
        self._host, self._port = parts.hostname, parts.port or 80
        self._model = model
        self._api_key = api_key
        self._idle: list[_Connection] = []

    async def send(self, request: LoadRequest) -> Record:
        """Streams one request to its end; failures are in the record."""
        body = {
            "model": self._model,
            "prompt": request.prompt,
            "max_tokens": request.output,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        payload = self._request("POST", "/v1/completions", json.dumps(body).encode())
        record = Record(time.monotonic())
        try:
            connection = await self._connection()
            await connection.exchange(payload)
        except OSError as error:
            record.detail, record.ended = f"{type(error).__name__}: {error}", time.monotonic()
            return record
        record.ended = time.monotonic()
        if connection.reusable:
            self._idle.append(connection)
        _fill(record, connection)
        return record

    async def get(self, path: str) -> tuple[int, bytes]:
        """Status and body of a GET.

        Raises:
          OSError: no connection, or it broke.
        """
        connection = await self._connection()
        await connection.exchange(self._request("GET", path, b""))
        if connection.reusable:
            self._idle.append(connection)
        return connection.status, b"".join(part for _, part in connection.parts)

    async def close(self) -> None:
        """Closes its connections."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable:
                return connection
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, self._host, self._port)
        return connection

    def _request(self, method: str, path: str, body: bytes) -> bytes:
        key = f"Authorization: Bearer {self._api_key}\r\n" if self._api_key else ""
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\n{key}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


class _Connection(asyncio.Protocol):
    """One connection: sends a request and keeps each part of the answer's body with its time."""

    def __init__(self) -> None:
        self.status = 0
        self.parts: list[tuple[float, bytes]] = []
        self.reusable = True
        self._now = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not isinstance(transport, asyncio.Transport):
            raise TypeError(f"{transport!r} can't be written to")
        self._transport = transport
        self._done: asyncio.Future[None] | None = None

    async def exchange(self, payload: bytes) -> None:
        """Sends a request and returns when the answer is complete.

        Raises:
          ConnectionError: the connection broke before.
        """
        self.parts = []
        self._parser = httptools.HttpResponseParser(self)
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(payload)
        try:
            await self._done
        except asyncio.CancelledError:
            self.close()
            raise

    def close(self) -> None:
        self.reusable = False
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        self._now = time.monotonic()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(ConnectionError(f"no HTTP: {error}"))
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.reusable = False
        self._end(ConnectionError("the connection ended before the answer"))

    # Called by the parser.

    def on_body(self, body: bytes) -> None:
        self.parts.append((self._now, body))

    def on_message_complete(self) -> None:
        self.status = self._parser.get_status_code()
        if not self._parser.should_keep_alive():
            self.close()
        self._end(None)

    def _end(self, error: Exception | None) -> None:
        if self._done is None or self._done.done():
            return
        if error is None:
            self._done.set_result(None)
        else:
            self._done.set_exception(error)


def _fill(record: Record, connection: _Connection) -> None:
    if connection.status != 200:
        text = b"".join(part for _, part in connection.parts).decode(errors="replace")[:200]
        record.status = "refused" if connection.status == 429 else "error"
        record.detail = f"{connection.status}: {text}"
        return
    complete = False
    for moment, data in _events(connection.parts):
        if data == b"[DONE]":
            complete = True
            continue
        event = json.loads(data)
        if "error" in event:
            record.detail = f"in the stream: {json.dumps(event['error'])[:200]}"
            return
        if event.get("choices"):
            record.outputs.append(moment)
        if event.get("usage"):
            record.tokens = event["usage"]["completion_tokens"]
    if complete and record.outputs and record.tokens:
        record.status = "ok"
    else:
        record.detail = f"the stream ended early, after {len(record.outputs)} outputs"


def _events(parts: list[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """Data of each server-sent event, with the time at which it was complete."""
    rest = b""
    for moment, part in parts:
        *whole, rest = (rest + part).split(b"\n\n")
        for event in whole:
            for line in event.split(b"\n"):
                if line.startswith(b"data:"):
                    yield moment, line[5:].strip()
