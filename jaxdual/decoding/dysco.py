"""DySCO (arXiv 2602.22175): attention that is rescaled at every decoded token, after what retrieval heads look at.

A token is computed twice: first as always, through the layers that have retrieval heads, whose attention is blended
into a relevance of each token so far; then again and in full, with the attention to the most relevant tokens raised in
all heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import numpy as np

from jaxdual.decoding.profiles import (
    MAX_STRENGTH,
    DyscoProfile,
    Limits,
    is_file,
    profile_of,
    read_profile,
    shipped_names,
)

Preset = Literal["code", "rev89c", "paper"]
Mode = Literal["exact", "tail_chunk", "lag", "split", "lag_fresh", "refresh"]
# What is kept of the relevance before, at each blending: the authors' code, an earlier revision of it, their formula.
HISTORY: dict[Preset, float] = {"code": 0.75 / 1.75, "rev89c": 0.4, "paper": 0.75}
DEFAULT_OBSERVE = 8  # tokens
MAX_OBSERVE = MAX_TAIL_CHUNK = 64  # tokens: each is a row with a score for every token of the context
_MAX_WHOLE = 2**31 - 1
_MAX_SEQUENCES = 256  # of a template, and tokens of one
_PLAIN_TAIL = 2  # tokens, of a prompt that no template has made


class DyscoError(ValueError):
    """Parameters that a model can't be decoded by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DyscoParams:
    """How a request is decoded by DySCO.

    Attributes:
      heads: retrieval heads as (layer, query head), from 0; None for those of `profile`.
      profile: name of a profile that ships with jaxdual, or file of one; None for the engine's `dysco_profile`, or the
        one of the model's name, if `heads` is None.
      top_p: part of the relevance that selected tokens have at most, in (0, 1]; None for no such limit; "auto" for the
        profile's at the prompt's length, 0.975 without one.
      top_k: tokens that are selected at most; None for no such limit; "auto" likewise, 4096 without a profile.
      strength: factor on the attention weights of selected tokens before they are normalised, above 0; 1 changes none;
        "auto" likewise, 2 without a profile.
      decay: weight of the relevance before by that of the new attention, at least 0; None for that of `preset`.
      preset: "code" as the authors' code (0.75), "rev89c" as an earlier revision of it, "paper" as their formula.
      observe: tokens whose attention makes the first relevance, that of the last one being the first raised one; at
        most 64.
      tail: tokens at the end of the prompt that are decoded as if they were generated; "auto" for those that the chat
        template puts behind the last message, 2 without one.
      template_sequences: token sequences whose occurrences in the prompt are never raised; None for the profile's.
      static: selects once, by what was observed.
      mode: "exact" as the authors do; the others are cheaper and give other tokens. "tail_chunk" computes the tail all
        at once, less than 64 tokens, where the first pass sees of them what it would without raised attention. The
        rest passes each token once, and looks while attention is raised already: "lag" raises what was selected at the
        token before, "split" what this token selects, in the layers above its retrieval heads only, "lag_fresh" the one
        in the layers up to them and the other above; "refresh" is "exact" every `refresh_every` tokens and "lag"
        between.
      refresh_every: tokens, at least 2.
      return_selection: has outputs say what was selected at each step; see `CompletionOutput.selection`.

    Raises:
      ValueError: a value of the wrong type or out of its range, or two that exclude each other.
    """

    heads: Sequence[tuple[int, int]] | None = None
    profile: str | None = None
    top_p: float | Literal["auto"] | None = "auto"
    top_k: int | Literal["auto"] | None = "auto"
    strength: float | Literal["auto"] = "auto"
    decay: float | None = None
    preset: Preset | None = None
    observe: int = DEFAULT_OBSERVE
    tail: int | Literal["auto"] = "auto"
    template_sequences: Sequence[Sequence[int]] | None = None
    static: bool = False
    mode: Mode = "exact"
    refresh_every: int = 4
    return_selection: bool = False

    def __post_init__(self) -> None:
        if self.heads is not None:
            object.__setattr__(self, "heads", _heads(self.heads))
            if self.profile is not None:
                raise ValueError(f"dysco: heads and profile={self.profile!r} exclude each other")
        if self.profile is not None and (not isinstance(self.profile, str) or not self.profile):
            raise ValueError(f"dysco: profile={self.profile!r} must be a name or a file")
        if self.top_p is None and self.top_k is None:
            raise ValueError("dysco: top_p and top_k can't both be None: everything would be selected")
        if self.top_p is not None and self.top_p != "auto":
            _real("top_p", self.top_p, 0.0, 1.0, open_low=True)
        if self.top_k is not None and self.top_k != "auto":
            _whole("top_k", self.top_k, 1)
        if self.strength != "auto":
            _real("strength", self.strength, 0.0, MAX_STRENGTH, open_low=True)
        if self.decay is not None:
            _real("decay", self.decay, 0.0, math.inf)
            if self.preset is not None:
                raise ValueError(f"dysco: decay={self.decay} and preset={self.preset!r} exclude each other")
        if self.preset is not None and self.preset not in get_args(Preset):
            raise ValueError(f"dysco: preset={self.preset!r} must be one of {', '.join(get_args(Preset))}")
        _whole("observe", self.observe, 0, MAX_OBSERVE)
        if self.tail != "auto":
            _whole("tail", self.tail, 0)
        if self.template_sequences is not None:
            object.__setattr__(self, "template_sequences", _sequences(self.template_sequences))
        for name in ("static", "return_selection"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"dysco: {name}={getattr(self, name)!r} must be true or false")
        if self.mode not in get_args(Mode):
            raise ValueError(f"dysco: mode={self.mode!r} must be one of {', '.join(get_args(Mode))}")
        if self.static and self.mode != "exact":
            raise ValueError(f"dysco: static and mode={self.mode!r} exclude each other")
        _whole("refresh_every", self.refresh_every, 2)
        if self.static and self.observe < 2:
            raise ValueError(f"dysco: static selects by what was observed, and observe={self.observe} leaves nothing")

    @property
    def history(self) -> float:
        """Weight of the relevance before, that of the new attention being 1 less it."""
        if self.decay is not None:
            return self.decay / (1 + self.decay) if math.isfinite(self.decay) else 1.0
        return HISTORY[self.preset or "code"]


def params_from_json(value: Any) -> DyscoParams:
    """Parameters of a request that came over a network, by their names.

    Raises:
      ValueError: no object, an unknown name, a value that can't be used, or one that only Python callers may use.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"dysco={value!r} must be an object")
    known = [field.name for field in fields(DyscoParams) if field.name != "return_selection"]
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise ValueError(f"dysco: unknown field {unknown[0]!r}; known are {', '.join(known)}")
    params = DyscoParams(**value)
    if params.profile is not None and is_file(params.profile):
        raise ValueError(f"dysco: profile={params.profile!r} must be one of {', '.join(shipped_names())}")
    return params


@dataclass(frozen=True, slots=True, kw_only=True)
class Dysco:
    """How a request is decoded by DySCO: `DyscoParams` that leave nothing open."""

    heads: tuple[tuple[int, int], ...]
    top_p: float | None
    top_k: int | None
    strength: float
    history: float
    observe: int
    tail: int
    template_sequences: tuple[tuple[int, ...], ...]
    static: bool
    mode: Mode
    refresh_every: int
    return_selection: bool


@dataclass(frozen=True, slots=True)
class DyscoModel:
    """What requests can ask of an engine.

    Attributes:
      name: of its model.
      num_layers, num_heads: of it; heads are query heads of a layer.
      refusal: why none is decoded so; "" where they can be.
      profile: of requests that give neither heads nor a profile; None for the one of the model's name.
      fingerprint: of its weights and number type; "" where it is not known.
      only_compiled: whether requests may ask for nothing but what is compiled for `profile`.
    """

    name: str
    num_layers: int
    num_heads: int
    refusal: str = ""
    profile: DyscoProfile | None = None
    fingerprint: str = ""
    only_compiled: bool = False

    def resolved(self, params: DyscoParams, prompt_length: int, opening: int | None) -> Dysco:
        """What parameters mean for a prompt.

        Args:
          opening: tokens at the prompt's end that a template has put there for the answer to begin; None where none
            has made it.

        Raises:
          DyscoError: they can't be used here.
        """
        try:
            return self._resolved(params, prompt_length, opening)
        except ValueError as error:
            raise DyscoError(str(error)) from None

    def _resolved(self, params: DyscoParams, prompt_length: int, opening: int | None) -> Dysco:
        if self.refusal:
            raise ValueError(f"dysco: {self.refusal}")
        if self.only_compiled:
            _check_compiled(params)
        profile = self._profile(params)
        limits = Limits() if profile is None else profile.limits_of(prompt_length)
        heads = _heads(params.heads or ()) if profile is None else profile.heads
        sequences = params.template_sequences
        if sequences is None:
            sequences = () if profile is None else profile.template_sequences
        for layer, head in heads:
            if layer >= self.num_layers or head >= self.num_heads:
                raise ValueError(
                    f"dysco: heads={[layer, head]} must be below {[self.num_layers, self.num_heads]}, the model's "
                    "layers and the query heads of each"
                )
        top_p = limits.top_p if params.top_p == "auto" else params.top_p
        top_k = limits.top_k if params.top_k == "auto" else params.top_k
        if top_p is None and top_k is None:
            raise ValueError(
                "dysco: top_p and top_k can't both be None: everything would be selected; what is left at auto is the "
                "profile's"
            )
        tail = (_PLAIN_TAIL if opening is None else opening) if params.tail == "auto" else params.tail
        tail = min(tail, prompt_length)
        if params.mode == "tail_chunk" and tail >= MAX_TAIL_CHUNK:
            raise ValueError(f"dysco: tail={tail} must be below {MAX_TAIL_CHUNK} for mode='tail_chunk'")
        return Dysco(
            heads=heads,
            top_p=top_p,
            top_k=top_k,
            strength=limits.strength if params.strength == "auto" else params.strength,
            history=params.history,
            observe=params.observe,
            tail=tail,
            template_sequences=_sequences(sequences),
            static=params.static,
            mode=params.mode,
            refresh_every=params.refresh_every,
            return_selection=params.return_selection,
        )

    def check(self, profile: DyscoProfile, name: str) -> None:
        """Raises `ValueError` if a profile is of another model."""
        theirs, own = (profile.num_layers, profile.num_heads), (self.num_layers, self.num_heads)
        if theirs != own:
            raise ValueError(
                f"dysco: profile={name!r} is of a model of {theirs[0]} layers with {theirs[1]} heads each, and this "
                f"one has {own[0]} with {own[1]}"
            )
        if profile.fingerprint is not None and self.fingerprint and profile.fingerprint != self.fingerprint:
            raise ValueError(f"dysco: profile={name!r} was made of other weights, or of another number type")

    def _profile(self, params: DyscoParams) -> DyscoProfile | None:
        """That heads come from; None where they are given."""
        if params.heads is not None:
            return None
        if params.profile is not None:
            profile = read_profile(params.profile)
            self.check(profile, params.profile)
            return profile
        found = self.profile or profile_of(self.name)
        if found is None:
            raise ValueError(
                f"dysco: there is no profile for the model {self.name!r}: give heads, (layer, head) pairs of its "
                f"retrieval heads, or a profile: a file, or one of {', '.join(shipped_names())}"
            )
        return found


def _check_compiled(params: DyscoParams) -> None:
    """Raises `ValueError` if parameters need other programs than those that an engine compiles for its profile."""
    wanted = {"heads": None, "profile": None, "mode": "exact", "static": False}
    for name, value in wanted.items():
        if getattr(params, name) != value:
            raise ValueError(f"dysco: {name} can't be chosen here: only what is compiled for the engine's own profile")
    if params.observe > DEFAULT_OBSERVE + 1:
        raise ValueError(f"dysco: observe={params.observe} must be at most {DEFAULT_OBSERVE + 1} here")


def first_raised(prompt_length: int, tail: int, observe: int) -> int:
    """Position of the first token that is computed twice; what is computed of those before is that of any prompt.

    The authors' code begins one token before the tail, but with it where it observes nothing.
    """
    return max(prompt_length - tail - (observe > 0), 0)


def first_observed(prompt_length: int, tail: int, observe: int) -> int:
    """Position of the first token whose attention counts; all before it are those of any prompt."""
    return max(first_raised(prompt_length, tail, observe) - max(observe - 1, 0), 0)


def template_mask(tokens: Sequence[int], sequences: Sequence[Sequence[int]]) -> np.ndarray:
    """`[tokens]` bool: which of them lie in an occurrence of one of some sequences."""
    values = np.asarray(tokens)
    inside = np.zeros(len(values), bool)
    for sequence in sequences:
        width = len(sequence)
        if width > len(values):
            continue
        starts = (np.lib.stride_tricks.sliding_window_view(values, width) == np.asarray(sequence)).all(axis=1)
        for offset in range(width):
            inside[offset : offset + len(starts)] |= starts
    return inside


def _heads(heads: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    if isinstance(heads, str) or not isinstance(heads, Sequence) or not heads:
        raise ValueError(f"dysco: heads={heads!r} must be a list of (layer, head) pairs")
    pairs = []
    for pair in heads:
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise ValueError(f"dysco: heads={heads!r} must be a list of (layer, head) pairs")
        for value in pair:
            _whole("heads", value, 0)
        pairs.append((int(pair[0]), int(pair[1])))
    if len(set(pairs)) < len(pairs):
        raise ValueError(f"dysco: heads={heads!r} names a head twice")
    return tuple(pairs)


def _sequences(sequences: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    if isinstance(sequences, str) or not isinstance(sequences, Sequence):
        raise ValueError(f"dysco: template_sequences={sequences!r} must be a list of lists of token ids")
    if len(sequences) > _MAX_SEQUENCES:
        raise ValueError(f"dysco: {len(sequences)} template_sequences; at most {_MAX_SEQUENCES} are possible")
    for sequence in sequences:
        if isinstance(sequence, str) or not isinstance(sequence, Sequence) or not sequence:
            raise ValueError(f"dysco: template_sequences={sequences!r} must be a list of lists of token ids")
        if len(sequence) > _MAX_SEQUENCES:
            raise ValueError(f"dysco: a template sequence of {len(sequence)} tokens; at most {_MAX_SEQUENCES} are one")
        for token in sequence:
            _whole("template_sequences", token, 0)
    return tuple(tuple(int(token) for token in sequence) for sequence in sequences)


def _whole(name: str, value: object, low: int, high: int = _MAX_WHOLE) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        most = "" if high == _MAX_WHOLE else f" and at most {high}"
        raise ValueError(f"dysco: {name}={value!r} must be a whole number of at least {low}{most}")


def _real(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        raise ValueError(f"dysco: {name}={value!r} must be a number")
    if value < low or value > high or (open_low and value == low):
        bounds = f"{'above' if open_low else 'at least'} {low:g}"
        if math.isfinite(high):
            bounds += f" and at most {high:g}"
        raise ValueError(f"dysco: {name}={value!r} must be {bounds}")
