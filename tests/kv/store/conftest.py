"""Every kind of store, each on a place of its own."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.store import S3Store

from jaxdual.kv.store import FileStore, MemoryStore, ObjectStore
from tests.kv.store.blocks import KINDS, Kind

CAPACITY = 64 << 20


@pytest.fixture(scope="session")
def bucket() -> Iterator[dict[str, Any]]:
    """Options of a client for the bucket "blocks" of a server on this machine."""
    server = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    options = {
        "endpoint": f"http://{host}:{port}",
        "region": "us-east-1",
        "access_key_id": "name",
        "secret_access_key": "secret",
        "client_options": {"allow_http": True},
    }
    from boto3 import client

    client(
        "s3",
        endpoint_url=options["endpoint"],
        region_name="us-east-1",
        aws_access_key_id="name",
        aws_secret_access_key="secret",
    ).create_bucket(Bucket="blocks")
    yield options
    running.stop()


def file_kind(folder: Path, **options: Any) -> Kind:
    def place(key: bytes) -> Path:
        return folder / key.hex()[:2] / key.hex()

    def load(key: bytes) -> bytes | None:
        return place(key).read_bytes() if place(key).exists() else None

    def make(capacity_bytes: int = CAPACITY, **more: Any) -> FileStore:
        return FileStore(folder, capacity_bytes, **options, **more)

    return Kind("file", make, load, lambda key, stored: place(key).write_bytes(stored))


def object_kind(bucket: dict[str, Any]) -> Kind:
    prefix = uuid.uuid4().hex
    client = S3Store("blocks", prefix=prefix, **bucket)

    def load(key: bytes) -> bytes | None:
        try:
            return bytes(obstore.get(client, f"{key.hex()[:2]}/{key.hex()}").bytes())
        except FileNotFoundError:
            return None

    def save(key: bytes, stored: bytes) -> None:
        obstore.put(client, f"{key.hex()[:2]}/{key.hex()}", stored)

    return Kind("object", partial(ObjectStore, f"s3://blocks/{prefix}", **bucket), load, save)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> Kind:
    if request.param == "memory":
        return Kind("memory", lambda capacity_bytes=CAPACITY, **more: MemoryStore(capacity_bytes, **more))
    if request.param == "object":
        return object_kind(request.getfixturevalue("bucket"))
    return file_kind(tmp_path / "store", direct=request.param == "file")
