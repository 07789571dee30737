"""Which tokens of a model's vocabulary stand for the letters of choices, and for the word that answers open with."""

from __future__ import annotations

from collections.abc import Sequence

from jaxdual.tokenizer import Tokenizer
from models.questions import OPENING

# What letters stand behind: tokenizers write a letter with the space before it, without it, or differently at the
# beginning of a text.
_BEFORE = ("", " ", "\n", ":", ": ")


def letter_tokens(tokenizer: Tokenizer, letters: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Of each letter, the ids of the single tokens that stand for it: "A" and " A".

    Raises:
      ValueError: a letter that no single token stands for; the message names it.
    """
    return tuple(_single(tokenizer, letter) for letter in letters)


def opening_tokens(tokenizer: Tokenizer, opening: str = OPENING) -> tuple[tuple[int, ...], ...]:
    """Of each position of the word that answers open with, the ids that may stand there."""
    first, *rest = tokenizer.encode(opening, add_special_tokens=False)
    if rest:
        return ((first,), *((token,) for token in rest))
    return (_single(tokenizer, opening),)


def _single(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    lasts = [tokenizer.encode(before + text, add_special_tokens=False)[-1] for before in _BEFORE]
    found = [token for token in dict.fromkeys(lasts) if tokenizer.token_bytes(token).strip(b" ") == text.encode()]
    if not found:
        raise ValueError(f"{text!r} is no single token of this tokenizer, with a space before it or without")
    return tuple(found)
