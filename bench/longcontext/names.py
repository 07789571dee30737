"""Invented names and words."""

from __future__ import annotations

import numpy as np

from bench.longcontext.items import Form
from models.training.retrieval import WORDS

_ONSETS = (
    "b",
    "br",
    "d",
    "dr",
    "f",
    "g",
    "gr",
    "h",
    "k",
    "kr",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "st",
    "t",
    "tr",
    "v",
    "z",
)
_VOWELS = ("a", "e", "i", "o", "u")
_CODAS = ("", "", "l", "n", "r", "s")
_SECOND_WORD = 0.25


def syllable(rng: np.random.Generator) -> str:
    """Onset, vowel and perhaps a consonant behind it."""
    return "".join(str(part[rng.integers(len(part))]) for part in (_ONSETS, _VOWELS, _CODAS))


def place_names(rng: np.random.Generator, count: int, form: Form) -> list[str]:
    """Different names, none of which begins another: of two or three syllables, some of two words; or words."""
    if form == "words":
        return [WORDS[place] for place in rng.choice(len(WORDS), count, replace=False)]
    names: list[str] = []
    taken: set[str] = set()
    beginnings: set[str] = set()
    while len(names) < count:
        parts = [_capitalised(rng)]
        if rng.random() < _SECOND_WORD:
            parts.append(_capitalised(rng))
        name = " ".join(parts)
        begins = {name[:end] for end in range(1, len(name) + 1)}
        if name in beginnings or begins & taken:
            continue
        names.append(name)
        taken.add(name)
        beginnings |= begins
    return names


def vocabulary(count: int, seed: int) -> tuple[str, ...]:
    """Different invented words of two or three syllables."""
    rng = np.random.default_rng(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found.setdefault("".join(syllable(rng) for _ in range(int(rng.integers(2, 4)))))
    return tuple(found)


def _capitalised(rng: np.random.Generator) -> str:
    return "".join(syllable(rng) for _ in range(int(rng.integers(2, 4)))).capitalize()
