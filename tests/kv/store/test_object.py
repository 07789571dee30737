"""Block objects: one form with block files, and a bucket that cannot be reached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jaxdual.kv.store import FileStore, ObjectStore, Outcome
from tests.kv.store.blocks import get, key, keys, put
from tests.kv.store.conftest import object_kind


def test_files_and_objects_have_the_same_bytes(tmp_path: Path, bucket: dict[str, Any]) -> None:
    kind = object_kind(bucket)
    with FileStore(tmp_path / "store", 1 << 20, write_threads=1) as files, kind.make() as objects:
        for block, parent, length in ((key(2) + b"\1", key(1) + b"\1", 8192), (key(1), None, 5000)):
            for store in (files, objects):
                assert put(store, block, length, parent) is Outcome.OK
            stored = (tmp_path / "store" / block.hex()[:2] / block.hex()).read_bytes()
            assert kind.load is not None
            assert kind.load(block) == stored
            assert len(stored) == 8192 + 4096
            assert not any(stored[length:8192])


def test_a_bucket_that_does_not_answer_is_a_failure_and_never_an_exception() -> None:
    options: dict[str, Any] = {
        "endpoint": "http://127.0.0.1:1",
        "region": "us-east-1",
        "access_key_id": "name",
        "secret_access_key": "secret",
        "client_options": {"allow_http": True},
        "retry_config": {"max_retries": 0},
    }
    with ObjectStore("s3://blocks/x", **options) as store:
        assert put(store, key(1), 4096) is Outcome.FAILED
        assert get(store, key(1), 4096) is Outcome.FAILED
        assert store.hits([keys(0, 3), [], keys(5, 1)]) == [0, 0, 0]
        assert store.stats().failures == 4


def test_a_bucket_that_does_not_exist_is_a_miss_and_takes_nothing(bucket: dict[str, Any]) -> None:
    with ObjectStore("s3://nobody", **bucket) as store:
        assert get(store, key(1), 4096) is Outcome.MISS
        assert put(store, key(1), 4096) is Outcome.FAILED


@pytest.mark.parametrize("url", ["blocks", "https://host/blocks", "s3://", "s3:///x"])
def test_other_addresses_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="s3://BUCKET"):
        ObjectStore(url)
