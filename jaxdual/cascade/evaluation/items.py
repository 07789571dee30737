"""Questions with their answers, from files in the manner of MMLU, and how they are split."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from models.questions import LETTERS

type Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split.__value__)
SPLIT_SEED = 42


@dataclass(frozen=True, slots=True)
class Item:
    """A question.

    Attributes:
      id: of the question.
      question: of it.
      choices: in the order of their letters; empty where a short text is the answer.
      answer: index of the right choice, None where none of them is right; the text, of a short answer.
      subject: what it is about.
      tags: whatever else is known of it.
    """

    id: str
    question: str
    choices: tuple[str, ...]
    answer: int | str | None
    subject: str
    tags: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def read_items(path: Path) -> list[Item]:
    """Items of a file with a JSON object a line: "question", "answer", of multiple choice "choices", and if it likes
    "subject", "id" and "tags".

    The answer of multiple choice is an index from 0, a letter, the text of a choice, or null where none is right.

    Raises:
      ValueError: the file can't be read, has no items, or one that can't be used; the message names file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: can't be read: {error}") from None
    items, lines_of = [], dict[str, int]()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise ValueError("must be a JSON object")
            item = item_of(entry, str(number))
        except (KeyError, TypeError, ValueError) as error:
            told = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"{path}:{number}: {told}") from None
        if item.id in lines_of:
            raise ValueError(f"{path}:{number}: id {item.id!r} is also that of line {lines_of[item.id]}")
        lines_of[item.id] = number
        items.append(item)
    if not items:
        raise ValueError(f"{path}: has no items")
    kinds = {bool(item.choices) for item in items}
    if len(kinds) > 1:
        raise ValueError(f"{path}: has questions with and without choices; they go into files of their own")
    return items


def item_of(entry: Mapping[str, Any], id: str) -> Item:
    """The item of a JSON object.

    Args:
      entry: see `read_items`.
      id: where the entry has none.

    Raises:
      KeyError: a field that is missing.
      ValueError: one that can't be used.
    """
    choices = entry.get("choices") or []
    if not isinstance(choices, list) or not all(isinstance(one, str) and one.strip() for one in choices):
        raise ValueError(f"choices={choices!r} must be a list of texts")
    if choices and not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"{len(choices)} choices; from 2 to {len(LETTERS)} can be asked for")
    tags = entry.get("tags", {})
    if not isinstance(tags, dict):
        raise ValueError(f"tags={tags!r} must be an object")
    answer = entry["answer"]
    return Item(
        id=str(entry.get("id", id)),
        question=_text(entry, "question"),
        choices=tuple(choices),
        answer=_choice(answer, choices) if choices else _text(entry, "answer"),
        subject=_text(entry, "subject") if "subject" in entry else "general knowledge",
        tags=tags,
    )


def split_items(items: Sequence[Item], seed: int = SPLIT_SEED) -> list[Split]:
    """Which part each item belongs to: 80 % train, 10 % validation, 10 % test of each subject.

    Of each subject, the tenths are rounded up, as the paper's 1430 test questions of MMLU's 14,042 suggest; test comes
    first, so that a subject of one item has it there. The order of items within a subject matters, that of subjects
    doesn't.
    """
    places: dict[str, list[int]] = {}
    for place, item in enumerate(items):
        places.setdefault(item.subject, []).append(place)
    splits: list[Split] = ["train"] * len(items)
    for subject in sorted(places):
        shuffled = np.random.default_rng([seed, *subject.encode()]).permutation(places[subject])
        tenth = -(-len(shuffled) // 10)
        for place in shuffled[:tenth]:
            splits[place] = "test"
        for place in shuffled[tenth : 2 * tenth]:
            splits[place] = "validation"
    return splits


def _choice(answer: object, choices: Sequence[str]) -> int | None:
    """Index of the right choice. A text that is a choice is that one, even if it also is a letter."""
    if answer is None:
        return None
    if isinstance(answer, str) and answer.strip() in choices:
        if choices.count(answer.strip()) > 1:
            raise ValueError(f"answer={answer!r} is the text of several choices; an index or a letter is expected")
        return list(choices).index(answer.strip())
    letters = LETTERS[: len(choices)]
    if isinstance(answer, str) and len(answer.strip()) == 1 and answer.strip().upper() in letters:
        return letters.index(answer.strip().upper())
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    raise ValueError(
        f"answer={answer!r} must be 0 to {len(choices) - 1}, a letter from A to {letters[-1]}, or one of the choices"
    )


def _text(entry: Mapping[str, Any], key: str) -> str:
    value = entry[key]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key}={value!r} must be a text")
    return value.strip()
