"""Profiles in files: what is written is what is read, and what is no profile is refused."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxdual.config import ConfigError
from jaxdual.routers import RouterProfile, read_profile, write_profile
from jaxdual.scheduling.expert_policies import RouterWindow

SOURCES = np.arange(24, dtype=np.int32).reshape(3, 2, 4)
TRANSITIONS = np.arange(32).reshape(2, 4, 4)
GOOD: dict[str, Any] = {"version": 1, "fingerprint": "ab", "tokens": 50, "sources": SOURCES, "transitions": TRANSITIONS}


@pytest.mark.parametrize("transitions", [None, TRANSITIONS])
def test_what_is_written_is_read_again(transitions: np.ndarray | None, tmp_path: Path) -> None:
    path = tmp_path / "profile"
    for fingerprint in ("00ff", "ff00"):
        write_profile(path, RouterProfile(RouterWindow(50, SOURCES, transitions), fingerprint))
    assert [file.name for file in tmp_path.iterdir()] == ["profile"]
    found = read_profile(path)
    assert (found.fingerprint, found.window.tokens) == ("ff00", 50)
    np.testing.assert_array_equal(found.window.sources, SOURCES)
    if transitions is None:
        assert found.window.transitions is None
    else:
        np.testing.assert_array_equal(found.window.transitions, transitions)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "format version 2; 1 is supported"),
        ({"version": [1, 1]}, r"format version \[1 1\]"),
        ({"fingerprint": 5}, "fingerprint=5 must be text"),
        ({"tokens": 0}, "tokens=0 a number of at least 1"),
        ({"tokens": 50.0}, "tokens=50.0 a number"),
        ({"sources": SOURCES[0]}, r"sources of shape \(2, 4\) must be \[layers, devices, experts\]"),
        ({"sources": SOURCES[:, :0]}, r"sources of shape \(3, 0, 4\)"),
        ({"sources": SOURCES - 1}, "sources must be whole numbers from 0 to the 50 tokens"),
        ({"sources": SOURCES / 2}, "sources must be whole numbers"),
        ({"transitions": TRANSITIONS[:1]}, r"transitions of shape \(1, 4, 4\) must have \(2, 4, 4\)"),
        ({"transitions": TRANSITIONS * 2}, "transitions must be whole numbers from 0 to the 50 tokens"),
        ({"sources": None}, "not a router profile: it has no sources"),
        ({"sources": np.array([object()])}, "not a router profile: .*allow_pickle=False"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.npz"
    np.savez(path, **{name: value for name, value in (GOOD | changes).items() if value is not None})
    with pytest.raises(ConfigError, match=rf"profile\.npz: .*{message}"):
        read_profile(path)


def test_a_file_that_is_no_profile_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "profile.npz"
    with pytest.raises(ConfigError, match=r"profile\.npz: can't be read: No such file"):
        read_profile(path)
    with pytest.raises(ConfigError, match="can't be read: Is a directory"):
        read_profile(tmp_path)
    np.savez_compressed(path, **GOOD)
    whole = path.read_bytes()
    for content in (b"", b"text", whole[:100], whole[:-30], whole[:80] + bytes(40) + whole[120:]):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="not a router profile: "):
            read_profile(path)
    for begin in range(0, len(whole), 8):  # where nothing looks, as at times of files, it may still be read
        path.write_bytes(whole[:begin] + bytes([whole[begin] ^ 255]) + whole[begin + 1 :])
        with contextlib.suppress(ConfigError):
            np.testing.assert_array_equal(read_profile(path).window.sources, SOURCES)
    with path.open("wb") as file:
        np.save(file, SOURCES)
    with pytest.raises(ConfigError, match="not a router profile: no archive of arrays"):
        read_profile(path)
