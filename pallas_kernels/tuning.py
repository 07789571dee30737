"""Forms of the kernels that were measured to be the fastest, by device.

`pallas_kernels/<operation>/tuning/<device>.json` maps workloads, as `choose` describes them, to fields of the kernel's
`Config`; `python -m bench.tune` writes it. What was not measured runs in the kernel's own default form.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

from pallas_kernels.target import Target

_ROOT = Path(__file__).parent


class Form(Protocol):
    """A dataclass, which is all that is asked of a kernel's `Config`."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


@dataclasses.dataclass(frozen=True, slots=True)
class Trial:
    """A form that is tried.

    Attributes:
      config: a `Config`; None for the default form.
      chosen_for: operation and workload of each kernel that was traced meanwhile.
    """

    config: Any
    chosen_for: set[tuple[str, str]]


_trial: contextvars.ContextVar[Trial | None] = contextvars.ContextVar("trial", default=None)


def choose[C: Form](operation: str, default: C, device: Target, **workload: object) -> C:
    """The form of a kernel.

    Args:
      operation: its folder.
      default: a frozen dataclass, used where nothing was measured.
      workload: what the best form depends on, for example `head_dim=128`.
    """
    name = ",".join(f"{key}={value}" for key, value in workload.items())
    trial = _trial.get()
    if trial is not None:
        trial.chosen_for.add((operation, name))
        return default if trial.config is None else trial.config
    return dataclasses.replace(default, **_measured(operation, device.kind).get(name, {}))


@contextlib.contextmanager
def trying(config: Any) -> Iterator[set[tuple[str, str]]]:
    """Kernels traced within take this form, or their default if it is None; gives what `Trial.chosen_for` says."""
    chosen_for: set[tuple[str, str]] = set()
    token = _trial.set(Trial(config, chosen_for))
    try:
        yield chosen_for
    finally:
        _trial.reset(token)


def file_of(operation: str, kind: str) -> Path:
    """Where the forms for a kind of device, as JAX names it, are kept."""
    return _ROOT / operation / "tuning" / f"{re.sub(r'[^a-z0-9]+', '_', kind.lower())}.json"


@functools.lru_cache
def _measured(operation: str, kind: str) -> Mapping[str, Mapping[str, Any]]:
    file = file_of(operation, kind)
    forms: dict[str, Mapping[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
    return forms
