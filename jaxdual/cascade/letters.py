"""Which tokens of a model's vocabulary stand for the letters of choices, and for the word that answers open with."""

from __future__ import annotations

from collections.abc import Sequence

from jaxdual.tokenizer import Tokenizer
from models.questions import OPENING


def letter_tokens(tokenizer: Tokenizer, letters: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Of each letter, the ids of the single tokens that stand for it: "A" and " A".

    Raises:
      ValueError: a letter that no single token stands for; the message names it.
    """
    return tuple(_single(tokenizer, letter) for letter in letters)


def opening_tokens(tokenizer: Tokenizer, opening: str = OPENING) -> tuple[tuple[int, ...], ...]:
    """Of each position of the word that answers open with, the ids that may stand there: the first one may have a
    blank before it, where the rest is the same."""
    plain, spaced = (tokenizer.encode(text, add_special_tokens=False) for text in (opening, f" {opening}"))
    first = dict.fromkeys((plain[0], *(spaced[:1] if spaced[1:] == plain[1:] else ())))
    return (tuple(first), *((token,) for token in plain[1:]))


def _single(tokenizer: Tokenizer, letter: str) -> tuple[int, ...]:
    variants = [tokenizer.encode(text, add_special_tokens=False) for text in (letter, f" {letter}")]
    found = dict.fromkeys(tokens[0] for tokens in variants if len(tokens) == 1)
    if not found:
        raise ValueError(
            f"the letter {letter!r} is no single token of this tokenizer, with a blank before it or without"
        )
    return tuple(found)
