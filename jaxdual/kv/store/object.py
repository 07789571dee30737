"""Block store in a bucket of an S3-compatible object store."""

from __future__ import annotations

import re
from collections.abc import Buffer, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import numpy as np
import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from jaxdual.kv.keys import BlockKey
from jaxdual.kv.slots import IntegrityError
from jaxdual.kv.store.base import BlockStore, Outcome
from jaxdual.kv.store.format import PAGE_BYTES, Trailer, padding_bytes, stored_bytes

_NAME = re.compile(r"([0-9a-f]{2})/\1[0-9a-f]{62}(?:[0-9a-f]{2})?")
# Recomputing a block takes less than the minutes for which the client would go on asking a server that is down.
_RETRIES: dict[str, Any] = {"max_retries": 2, "retry_timeout": timedelta(seconds=10)}


class ObjectStore(BlockStore):
    """One object a block, of the same bytes and under the same name as in a file store.

    Nothing is evicted and no capacity is kept: that is what a bucket's lifecycle rules are for. Presence is a HEAD
    request a key; `hits` sends those of all chains side by side, about `2 log2(n)` one after another.

    Args:
      url: "s3://BUCKET" or "s3://BUCKET/PREFIX".
      threads: requests under way at a time, of each of reads, writes and `hits`.
      options: of `obstore.store.S3Store`, such as `endpoint="http://host:9000"`, `client_options={"allow_http": True}`
        or `retry_config`. What is not given comes from the environment: AWS_ENDPOINT_URL, AWS_ALLOW_HTTP, AWS_REGION,
        AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and so on.

    Raises:
      ValueError: the URL is not of that form.
    """

    def __init__(self, url: str, *, threads: int = 16, **options: Any) -> None:
        if not re.fullmatch(r"s3://[^/]+(/.*)?", url):
            raise ValueError(f"{url=} must be s3://BUCKET or s3://BUCKET/PREFIX")
        super().__init__(read_threads=threads, write_threads=threads, capacity_bytes=None)
        self._bucket = S3Store.from_url(url, **{"retry_config": _RETRIES, **options})
        self._heads = ThreadPoolExecutor(threads, "block-head")
        self._stats.blocks = self._stats.bytes = None  # the bucket is everybody's, and listing it costs requests

    def close(self) -> None:
        super().close()
        self._heads.shutdown()

    def _present(self, keys: Sequence[BlockKey]) -> list[bool]:
        return list(self._heads.map(self._has, keys))

    def _has(self, key: BlockKey) -> bool:
        try:
            return _asked(obstore.head, self._bucket, _name(key)) is not None
        except OSError:
            with self._lock:
                self._stats.failures += 1
            return False

    def _read(self, key: BlockKey, into: memoryview) -> Outcome:
        found = _asked(obstore.get, self._bucket, _name(key))
        if found is None:
            return Outcome.MISS
        if found.meta["size"] == stored_bytes(len(into)):
            body = _asked(found.bytes)
            if body is not None:
                stored = memoryview(body)
                trailer = Trailer.unpack(stored[-PAGE_BYTES:])
                np.copyto(np.frombuffer(into, np.uint8), np.frombuffer(stored[: len(into)], np.uint8))
                if trailer is not None and trailer.describes(key, into):
                    return Outcome.OK
        _asked(obstore.delete, self._bucket, _name(key))
        return Outcome.CORRUPT

    def _write(self, key: BlockKey, parent: BlockKey | None, payload: memoryview) -> Outcome:
        if _asked(obstore.head, self._bucket, _name(key)) is not None:
            return Outcome.OK
        trailer = Trailer.of(key, parent, payload).pack()
        body: list[Buffer] = [payload, bytes(padding_bytes(len(payload))) + trailer]
        # One request: a block is seen whole or not at all, and nothing is left over if this process dies.
        if _asked(obstore.put, self._bucket, _name(key), body, use_multipart=False) is None:
            raise OSError("there is no such bucket")
        with self._lock:
            self._stats.writes += 1
            self._stats.written_bytes += len(payload)
        return Outcome.OK

    def _check(self) -> None:
        for listed in obstore.list(self._bucket):
            for meta in listed:
                if _NAME.fullmatch(meta["path"]):
                    self._check_object(meta["path"], meta["size"])

    def _check_object(self, name: str, size: int) -> None:
        start = max(0, size - PAGE_BYTES)
        page = _asked(obstore.get_range, self._bucket, name, start=start, end=size) if size else b""
        if page is None:
            return  # removed meanwhile
        trailer = Trailer.unpack(memoryview(page))
        if trailer is None or _name(trailer.key) != name or stored_bytes(trailer.payload_bytes) != size:
            raise IntegrityError(f"object {name} is not a whole block of its name")


def _name(key: BlockKey) -> str:
    name = key.hex()
    return f"{name[:2]}/{name}"


def _asked[**P, Result](call: Callable[P, Result], *args: P.args, **options: P.kwargs) -> Result | None:
    """The answer to a request; None for an object that does not exist.

    Raises:
      OSError: whatever else went wrong; the client has its own exceptions for that.
    """
    try:
        return call(*args, **options)
    except FileNotFoundError:
        return None
    except BaseError as error:
        raise OSError(str(error)) from error
