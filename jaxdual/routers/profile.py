"""What a model's routers chose, as a file: an .npz archive of counts."""

from __future__ import annotations

import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxdual.config import ConfigError
from jaxdual.scheduling.expert_policies import RouterWindow

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class RouterProfile:
    """What the routers of one model chose.

    Attributes:
      window: their choices.
      fingerprint: of the model's weights and number type, hexadecimal.
    """

    window: RouterWindow
    fingerprint: str


def write_profile(path: Path, profile: RouterProfile) -> None:
    """Writes a profile, whole or not at all.

    The archive has `version` and `tokens` (numbers), `fingerprint` (text), `sources` `[layers, devices, experts]` and,
    where they were counted, `steps` (a number) and `transitions` `[layers - 1, experts, experts]`; see `RouterWindow`.

    Raises:
      OSError: the file can't be written.
    """
    window = profile.window
    arrays: dict[str, Any] = {
        "version": np.int64(FORMAT_VERSION),
        "fingerprint": np.str_(profile.fingerprint),
        "tokens": np.int64(window.tokens),
        "sources": window.sources.astype(np.int64),
    }
    if window.steps is not None:
        arrays["steps"] = np.int64(window.steps)
    if window.transitions is not None:
        arrays["transitions"] = window.transitions.astype(np.int64)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)
    temporary.replace(path)


def read_profile(path: Path) -> RouterProfile:
    """Reads a profile.

    Raises:
      ConfigError: the file can't be read, is no profile, or its arrays don't go together.
    """
    try:
        arrays = _arrays(path)
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror or error}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{path}: not a router profile: {error}") from error
    version, fingerprint, tokens = (arrays[name] for name in ("version", "fingerprint", "tokens"))
    if version.shape or version != FORMAT_VERSION:
        raise ConfigError(f"{path}: a profile of format version {version}; {FORMAT_VERSION} is supported")
    if fingerprint.shape or fingerprint.dtype.kind != "U" or tokens.shape or tokens.dtype.kind != "i" or tokens < 1:
        raise ConfigError(f"{path}: fingerprint={fingerprint} must be text, and tokens={tokens} a number of at least 1")
    sources, transitions = arrays["sources"], arrays.get("transitions")
    if sources.ndim != 3 or not sources.size:
        raise ConfigError(f"{path}: sources of shape {sources.shape} must be [layers, devices, experts]")
    layers, _, experts = sources.shape
    wanted = (layers - 1, experts, experts)
    if transitions is not None and transitions.shape != wanted:
        raise ConfigError(f"{path}: transitions of shape {transitions.shape} must have {wanted}")
    for name in ("sources", "transitions"):
        if name in arrays and not _are_counts(arrays[name], int(tokens)):
            raise ConfigError(f"{path}: {name} must be whole numbers from 0 to the {tokens} tokens")
    steps = arrays.get("steps")
    if steps is not None and (steps.shape or steps.dtype.kind != "i" or steps < 1):
        raise ConfigError(f"{path}: steps={steps} must be a whole number of at least 1")
    window = RouterWindow(int(tokens), sources, transitions, None if steps is None else int(steps))
    return RouterProfile(window, str(fingerprint))


def _are_counts(counts: np.ndarray, most: int) -> bool:
    return counts.dtype.kind == "i" and (not counts.size or bool(counts.min() >= 0 and counts.max() <= most))


def _arrays(path: Path) -> dict[str, np.ndarray]:
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError("no archive of arrays")
        file.seek(0)
        archive = np.load(file, allow_pickle=False)
        found = dict(archive)
    missing = {"version", "fingerprint", "tokens", "sources"} - found.keys()
    if missing:
        raise ValueError(f"it has no {', '.join(sorted(missing))}")
    return found
