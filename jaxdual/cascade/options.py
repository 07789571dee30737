"""What a request may ask of a cascade: the field `cascade` of requests, and the `[confidence]` of a configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from jaxdual.cascade.gate import PtMode

LETTERS = ("A", "B", "C", "D")
OPENING = "Answer"
MAX_LETTERS = 32  # each may stand for two of the tokens that one request may watch
_MAX_LETTER_CHARS = 16
_MAX_OPENING_CHARS = 64
_MODES = get_args(PtMode)


class CascadeRequestError(ValueError):
    """What a request asks of a cascade can't be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfidenceSpec:
    """What P(T) is read from, in text: each tier's tokenizer makes tokens of it (`letters.py`).

    Attributes:
      kind: "choices" for the letters of a multiple choice, "opening" for the words that an answer is to begin with.
      letters: of choices.
      opening: of an answer.
      mode: of choices: see `Confidence.mode`.

    Raises:
      ValueError: values that can't be used.
    """

    kind: Literal["choices", "opening"] = "choices"
    letters: tuple[str, ...] = LETTERS
    opening: str = OPENING
    mode: PtMode = "full"

    def __post_init__(self) -> None:
        if self.kind not in ("choices", "opening"):
            raise ValueError(f"kind={self.kind!r} must be 'choices' or 'opening'")
        object.__setattr__(self, "letters", _letters(self.letters))
        _opening(self.opening)
        _mode(self.mode)


@dataclass(frozen=True, slots=True, kw_only=True)
class CascadeOptions:
    """What one request asks; None leaves it at what the cascade's configuration says.

    Attributes:
      letters: P(T) is that of these letters.
      opening: P(T) is that of an answer that begins so; not together with `letters`.
      mode: of letters.
      max_hops: escalations at most; never more than the configuration allows.

    Raises:
      CascadeRequestError: values that can't be used.
    """

    letters: tuple[str, ...] | None = None
    opening: str | None = None
    mode: PtMode | None = None
    max_hops: int | None = None

    def __post_init__(self) -> None:
        try:
            if self.letters is not None:
                object.__setattr__(self, "letters", _letters(self.letters))
            if self.opening is not None:
                _opening(self.opening)
            if self.mode is not None:
                _mode(self.mode)
            if self.max_hops is not None:
                check_max_hops(self.max_hops)
            if self.opening is not None and (self.letters is not None or self.mode is not None):
                raise ValueError("opening excludes letters and mode, which are those of a multiple choice")
        except ValueError as error:
            raise CascadeRequestError(f"cascade: {error}") from None

    def confidence(self, default: ConfidenceSpec) -> ConfidenceSpec:
        """What the request's P(T) is read from, by a cascade with this default."""
        if self.opening is not None:
            return ConfidenceSpec(kind="opening", opening=self.opening)
        if self.letters is None and self.mode is None:
            return default
        if self.letters is None and default.kind == "opening":
            raise CascadeRequestError("cascade: mode needs letters: P(T) is that of the answer's opening otherwise")
        return ConfidenceSpec(letters=self.letters or default.letters, mode=self.mode or default.mode)


def options_from_json(value: Any) -> CascadeOptions:
    """The options of a request from its JSON object.

    Raises:
      CascadeRequestError: it is none, or holds what can't be used.
    """
    known = tuple(CascadeOptions.__dataclass_fields__)
    if not isinstance(value, Mapping):
        raise CascadeRequestError(f"cascade={_short(value)} must be an object with {', '.join(known)}")
    unknown = sorted(str(name) for name in value if name not in known)
    if unknown:
        raise CascadeRequestError(f"cascade: unknown field {_short(unknown[0])}; known are {', '.join(known)}")
    return CascadeOptions(**value)


def check_max_hops(value: object) -> None:
    """Raises `ValueError` for what is no number of escalations."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"max_hops={_short(value)} must be a whole number of at least 0")


def _letters(value: object) -> tuple[str, ...]:
    wanted = f"a list of 2 to {MAX_LETTERS} different texts of 1 to {_MAX_LETTER_CHARS} characters"
    if isinstance(value, str) or not isinstance(value, Sequence) or not 2 <= len(value) <= MAX_LETTERS:
        raise ValueError(f"letters={_short(value)} must be {wanted}")
    for letter in value:
        if not isinstance(letter, str) or not 1 <= len(letter) <= _MAX_LETTER_CHARS or letter != letter.strip():
            raise ValueError(f"letters: {_short(letter)} is none; they must be {wanted}, without blanks around them")
    if len(set(value)) < len(value):
        raise ValueError(f"letters={_short(value)} must be {wanted}")
    return tuple(value)


def _opening(value: object) -> None:
    if not isinstance(value, str) or not value.strip() or len(value) > _MAX_OPENING_CHARS or value != value.strip():
        raise ValueError(
            f"opening={_short(value)} must be a text of 1 to {_MAX_OPENING_CHARS} characters without blanks around it"
        )


def _mode(value: object) -> None:
    if value not in _MODES:
        raise ValueError(f"mode={_short(value)} must be one of {', '.join(_MODES)}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
