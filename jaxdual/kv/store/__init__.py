"""Block stores: where Full Blocks outlive the pages of an engine."""

from __future__ import annotations

import re

from jaxdual.kv.store.base import BlockStore, Outcome, StoreClosedError, StoreStats
from jaxdual.kv.store.file import FileStore
from jaxdual.kv.store.memory import MemoryStore
from jaxdual.kv.store.object import ObjectStore

__all__ = [
    "BlockStore",
    "FileStore",
    "MemoryStore",
    "ObjectStore",
    "Outcome",
    "StoreClosedError",
    "StoreStats",
    "open_store",
]


def open_store(uri: str, capacity_bytes: int) -> BlockStore:
    """The block store that a setting names.

    Args:
      uri: "memory:", a folder as a path or "file:PATH", or "s3://BUCKET/PREFIX" with the endpoint and credentials of
        the environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and so on).
      capacity_bytes: what the store may take; a bucket does not keep to it.

    Raises:
      ValueError: `uri` is none of that, or the store can't be that small.
    """
    scheme, _, rest = uri.partition(":") if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", uri) else ("file", "", uri)
    if scheme == "memory" and not rest:
        return MemoryStore(capacity_bytes)
    if scheme == "file" and rest.removeprefix("//"):
        return FileStore(rest.removeprefix("//"), capacity_bytes)
    if scheme == "s3":
        return ObjectStore(uri)
    raise ValueError(f"{uri=} is no block store; accepted are memory:, PATH, file:PATH and s3://BUCKET/PREFIX")
