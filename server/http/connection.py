"""The client's side of a request: its body, and whether it is still there."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import msgspec
from starlette.datastructures import Headers
from starlette.types import Receive, Scope

from jaxdual.openai_protocol import ProtocolError
from server.http.errors import BodyTooLargeError, UnsupportedEncodingError

_decode = msgspec.json.Decoder().decode


class DisconnectedError(Exception):
    """The client is gone: nobody is left to answer."""


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The body of a request.

    Args:
        scope, receive: of ASGI.
        limit: bytes that are accepted.

    Raises:
        BodyTooLargeError: there are more; a body that says so itself is not read at all.
        UnsupportedEncodingError: the body is compressed.
        DisconnectedError: the client went away before its end.
    """
    headers = Headers(scope=scope)
    encoding = headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise UnsupportedEncodingError(f"Content-Encoding {encoding!r} is not supported: send the body uncompressed")
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise _too_large(limit)
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise DisconnectedError
        body += message.get("body", b"")
        if len(body) > limit:
            raise _too_large(limit)
        if not message.get("more_body", False):
            return bytes(body)


def decode_json(body: bytes) -> Any:
    """The value that a body holds, whatever content type it was sent with.

    Raises:
        ProtocolError: it is not strict JSON in UTF-8.
        RecursionError: it is nested too deeply.
    """
    try:
        return _decode(body)
    except ValueError as error:  # of msgspec, or of the UTF-8 decoder
        raise ProtocolError(f"the request body is not valid JSON: {error}", None, "invalid_json") from None


async def unless_disconnected(work: Coroutine[Any, Any, None], receive: Receive) -> None:
    """Runs `work` to its end, or cancels it as soon as the client goes away.

    Args:
        work: what answers the client; its exceptions are passed on.
        receive: of ASGI, with the body read.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        working.cancel()
        watching.cancel()
        # Whatever the work holds is released when this returns.
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _too_large(limit: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"the request body has more than {limit} bytes, the most that is accepted")
