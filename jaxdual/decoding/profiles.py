"""Profiles of DySCO: the retrieval heads of a model, and the limits that suit it, as JSON files.

Those in `profiles/` are the authors' (their code for heads and templates, the paper's tuning for limits).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

MAX_STRENGTH = 1000.0


@dataclass(frozen=True, slots=True)
class Limits:
    """Of prompts up to a length.

    Attributes:
      max_tokens: of the prompt; None for any.
      top_p, top_k, strength: see `DyscoParams`.
    """

    max_tokens: int | None = None
    top_p: float | None = 0.975
    top_k: int | None = 4096
    strength: float = 2.0

    def __post_init__(self) -> None:
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")
        if not 0 < self.strength <= MAX_STRENGTH:
            raise ValueError(f"strength={self.strength} must be above 0 and at most {MAX_STRENGTH:g}")


@dataclass(frozen=True, slots=True)
class DyscoProfile:
    """A model's.

    Attributes:
      models: names of the models that it is of, without their owners'.
      num_layers, num_heads: of the model; heads are query heads of a layer.
      heads: retrieval heads as (layer, head), best first.
      template_sequences: token sequences that its chat template puts into prompts.
      limits: of prompts of growing lengths.
      fingerprint: of the weights that heads were detected in; None where they are not from here.
    """

    models: tuple[str, ...]
    num_layers: int
    num_heads: int
    heads: tuple[tuple[int, int], ...]
    template_sequences: tuple[tuple[int, ...], ...]
    limits: tuple[Limits, ...]
    fingerprint: str | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        """Those with retrieval heads."""
        return tuple(sorted({layer for layer, _ in self.heads}))

    def limits_of(self, prompt_length: int) -> Limits:
        """Those of a prompt of so many tokens; beyond all lengths, the last ones."""
        fitting = (one for one in self.limits if one.max_tokens is None or prompt_length <= one.max_tokens)
        return next(fitting, self.limits[-1])


@functools.cache
def shipped_names() -> tuple[str, ...]:
    """Names of the profiles that ship with jaxdual."""
    folder = resources.files("jaxdual.decoding") / "profiles"
    return tuple(sorted(entry.name.removesuffix(".json") for entry in folder.iterdir()))


def is_file(name: str) -> bool:
    """Whether a profile's name means a file."""
    return name.endswith(".json") or "/" in name


def read_profile(name: str) -> DyscoProfile:
    """A profile by its name, or from a file (a name with a slash, or that ends with ".json").

    Raises:
      ValueError: there is none, or the file is none.
    """
    if not is_file(name):
        if name not in shipped_names():
            raise ValueError(f"dysco: profile={name!r} must be a file, or one of {', '.join(shipped_names())}")
        return _shipped(name)
    try:
        text = Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"dysco: profile={name!r} can't be read: {error}") from None
    try:
        return _profile(json.loads(text))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"dysco: profile={name!r} is not a profile: {type(error).__name__}: {error}") from None


def profile_of(model: str) -> DyscoProfile | None:
    """The shipped profile of a model, by the last part of its name; None if there is none."""
    wanted = model.rstrip("/").rpartition("/")[2].lower()
    for name in shipped_names():
        profile = _shipped(name)
        if wanted in (one.lower() for one in profile.models):
            return profile
    return None


@functools.cache
def _shipped(name: str) -> DyscoProfile:
    text = (resources.files("jaxdual.decoding") / "profiles" / f"{name}.json").read_text(encoding="utf-8")
    return _profile(json.loads(text))


def _profile(data: Mapping[str, Any]) -> DyscoProfile:
    layers, heads = _count(data["num_layers"]), _count(data["num_heads"])
    pairs = tuple((_place(layer, layers), _place(head, heads)) for layer, head in data["heads"])
    if not pairs or len(set(pairs)) < len(pairs):
        raise ValueError("heads must name at least one, and none twice")
    limits = tuple(
        Limits(
            None if one["max_tokens"] is None else _count(one["max_tokens"]),
            None if one["top_p"] is None else float(one["top_p"]),
            None if one["top_k"] is None else _count(one["top_k"]),
            float(one["strength"]),
        )
        for one in data["limits"]
    )
    if not limits:
        raise ValueError("limits must not be empty")
    sequences: Sequence[Sequence[int]] = data["template_sequences"]
    return DyscoProfile(
        tuple(str(model) for model in data["models"]),
        layers,
        heads,
        pairs,
        tuple(tuple(_whole(token) for token in sequence) for sequence in sequences),
        limits,
        None if data.get("fingerprint") is None else str(data["fingerprint"]),
    )


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} must be a whole number of at least 0")
    return value


def _count(value: object) -> int:
    if _whole(value) < 1:
        raise ValueError(f"{value!r} must be at least 1")
    return _whole(value)


def _place(value: object, end: int) -> int:
    if _whole(value) >= end:
        raise ValueError(f"{value!r} must be below {end}")
    return _whole(value)
