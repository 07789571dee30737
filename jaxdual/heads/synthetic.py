"""Items made from a seed: descriptions of invented places, and questions that one of them answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxdual.heads.items import Document, Item

_KINDS = ("mill", "museum", "lighthouse", "castle", "harbour", "theatre", "library", "brewery", "chapel", "garden")
_ONSETS, _VOWELS = tuple("bdfghklmnprstvz"), tuple("aeiou")
_CODAS = ("", "", "l", "n", "r", "s", "m", "nd", "rk")
_COLOURS = ("red", "green", "blue", "yellow", "white", "black", "orange", "purple", "grey", "brown")
_MONTHS = ("January", "March", "April", "May", "June", "July", "August", "September", "October", "November")
_STONES = ("granite", "sandstone", "marble", "limestone", "basalt", "slate", "brick", "flint", "gneiss", "tuff")
_TREES = ("walnut", "chestnut", "maple", "cherry", "lime", "beech", "pear", "mulberry", "cedar", "poplar")


@dataclass(frozen=True, slots=True)
class _Attribute:
    """Something that documents say.

    Attributes:
      sentence: that says it of a kind, with a value: 15 or 16 words.
      question: that it answers.
      values: what it may be: words, or the least and the greatest number; None for invented names.
    """

    sentence: str
    question: str
    values: Sequence[str] | tuple[int, int] | None


_ATTRIBUTES = (
    _Attribute(
        "According to the oldest surviving register, the {kind} was founded in {value} by a merchant.",
        "In which year was the {kind} {name} founded?",
        (1400, 1950),
    ),
    _Attribute(
        "In an ordinary year the {kind} counts about {value} visitors, most of them in early autumn.",
        "How many visitors does the {kind} {name} count in an ordinary year?",
        (1000, 99999),
    ),
    _Attribute(
        "For some years now the {kind} has been looked after by {value}, a retired clockmaker.",
        "Who has been looking after the {kind} {name}?",
        None,
    ),
    _Attribute(
        "Every spring the wooden gate of the {kind} is painted {value}, as an old custom demands.",
        "In which colour is the gate of the {kind} {name} painted?",
        _COLOURS,
    ),
    _Attribute(
        "The yearly feast of the {kind} takes place in {value} and goes on for three days.",
        "In which month is the feast of the {kind} {name}?",
        _MONTHS,
    ),
    _Attribute(
        "Most walls of the {kind} are made of {value}, which was carried here from the coast.",
        "What are the walls of the {kind} {name} made of?",
        _STONES,
    ),
    _Attribute(
        "Surveyors say that the {kind} lies {value} metres above the sea, measured at its main door.",
        "How many metres above the sea does the {kind} {name} lie?",
        (10, 2999),
    ),
    _Attribute(
        "In the middle of its yard the {kind} has an old {value} that gives some shade.",
        "Which tree is in the yard of the {kind} {name}?",
        _TREES,
    ),
    _Attribute(
        "Papers of the {kind} are kept in the archive under number {value}, where anybody reads them.",
        "Under which number are papers of the {kind} {name} kept in the archive?",
        (10000, 99999),
    ),
    _Attribute(
        "A footpath of about an hour leads from the {kind} to {value}, the nearest railway station.",
        "Which railway station is nearest to the {kind} {name}?",
        None,
    ),
)
_OPENING = "{name} is a {kind} of the {region} district, described here after the records of its neighbours."


def synthetic_items(count: int, documents: tuple[int, int], seed: int) -> list[Item]:
    """Questions about one attribute of a place, each over documents of 60 to 100 words, one of which answers.

    Of the other documents, a third is of places of the same kind, a third says the attribute of places of other kinds,
    and a third is of any. The place of the one that answers is uniform. An item depends on its number and the seed.

    Args:
      count: items.
      documents: the fewest and the most of an item.
      seed: with another one, all items are others.

    Raises:
      ValueError: no item, or numbers of documents that are no range from 1.
    """
    if count < 1:
        raise ValueError(f"count={count} must be at least 1")
    if not 1 <= documents[0] <= documents[1]:
        raise ValueError(f"documents={documents} must be the fewest and the most of an item, from 1")
    return [_item(number, documents, np.random.default_rng([seed, number])) for number in range(count)]


def _item(number: int, documents: tuple[int, int], rng: np.random.Generator) -> Item:
    size = int(rng.integers(documents[0], documents[1] + 1))
    gold, kind, asked = int(rng.integers(size)), int(rng.integers(len(_KINDS))), int(rng.integers(len(_ATTRIBUTES)))
    names = _names(size, rng)
    written = []
    for place, name in enumerate(names):
        if place == gold:
            written.append(_document(place, name, kind, asked, rng))
            continue
        relation = rng.integers(3)
        other = (kind + int(rng.integers(1, len(_KINDS)))) % len(_KINDS)
        of_kind = (kind, other, int(rng.integers(len(_KINDS))))[relation]
        written.append(_document(place, name, of_kind, asked if relation == 1 else None, rng))
    question = _ATTRIBUTES[asked].question.format(kind=_KINDS[kind], name=names[gold])
    return Item(f"synthetic-{number}", question, tuple(written), (gold,))


def _document(place: int, name: str, kind: int, attribute: int | None, rng: np.random.Generator) -> Document:
    """Of a place: three to five attributes, among them a given one."""
    said = [int(one) for one in rng.permutation(len(_ATTRIBUTES))[: rng.integers(3, 6)]]
    if attribute is not None and attribute not in said:
        said[rng.integers(len(said))] = attribute
    opening = _OPENING.format(name=name, kind=_KINDS[kind], region=_word(rng))
    facts = (_ATTRIBUTES[one] for one in said)
    sentences = (fact.sentence.format(kind=_KINDS[kind], value=_value(fact, rng)) for fact in facts)
    return Document(str(place), name, " ".join([opening, *sentences]))


def _value(attribute: _Attribute, rng: np.random.Generator) -> str:
    values = attribute.values
    if values is None:
        return _word(rng)
    if isinstance(values[0], int):
        return str(rng.integers(values[0], int(values[1]) + 1))
    return str(values[int(rng.integers(len(values)))])


def _names(count: int, rng: np.random.Generator) -> list[str]:
    """Names of one or two words, none of which begins another."""
    names: list[str] = []
    while len(names) < count:
        name = " ".join(_word(rng) for _ in range(rng.integers(1, 3)))
        if not any(name.startswith(one) or one.startswith(name) for one in names):
            names.append(name)
    return names


def _word(rng: np.random.Generator) -> str:
    """An invented one, of two or three syllables."""
    parts = [
        str(sounds[rng.integers(len(sounds))])
        for _ in range(rng.integers(2, 4))
        for sounds in (_ONSETS, _VOWELS, _CODAS)
    ]
    return "".join(parts).capitalize()
