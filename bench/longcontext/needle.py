"""Multi-key needle: lines of codes that all look alike, and a question about one, four, or the code of a code."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from bench.longcontext.items import Form, Item, Ratio, Scores, Task
from models.training.retrieval import WORDS, code_line, codes_question, hops_question

HOPS = (2, 3, 4)
ASKED = 4
_CHAINED = 0.4  # of the lines beside a chain, whose codes are keys too
_KEY_BITS = 32
_VALUES = (1_000_000, 10_000_000)
_INTRODUCTION = "Each line below gives the code of a key. Remember the codes; a question follows.\n\n"
_INSTRUCTION = 'Answer with one line for each step, in the form "The code of KEY is CODE.", and nothing else.'
_LINE_TOKENS = {"full": 40, "words": 8}


def make(rng: np.random.Generator, lines: int, form: Form, asked: int, hops: int) -> Item:
    """An item.

    Args:
      rng: draws keys, codes, order and what is asked.
      lines: of the document.
      form: of keys and codes.
      asked: keys that are asked for.
      hops: codes that are to be followed from one key; 1 for the code of a key.
    """
    keys = _keys(rng, lines, form)
    values = _values(rng, lines, form, keys)
    chain = list(zip(keys[:hops], [*keys[1:hops], values[hops - 1]], strict=True))
    others = [(key, value) for key, value in zip(keys[hops:], values[hops:], strict=True)]
    if hops > 1:
        # A code that is a key leads to a line before, so that no chain closes.
        others = [
            (key, others[int(rng.integers(place))][0] if place and rng.random() < _CHAINED else value)
            for place, (key, value) in enumerate(others)
        ]
    pairs = [*chain, *others]
    wanted = chain if hops > 1 else [pairs[place] for place in rng.choice(lines, asked, replace=False)]
    question = hops_question(wanted[0][0], hops) if hops > 1 else codes_question([key for key, _ in wanted])
    document = "\n".join(code_line(*pairs[place]) for place in rng.permutation(lines))
    return Item(
        messages=(("user", _content(document, question, form)),),
        expected=tuple(value for _, value in (wanted[-1:] if hops > 1 else wanted)),
        max_tokens=_LINE_TOKENS[form] * len(wanted) + 8,
        gold=tuple(code_line(*pair) for pair in wanted),
    )


def score(item: Item, reply: str) -> Scores:
    """Part of the expected codes that stand in the reply."""
    found = sum(bool(re.search(rf"\b{re.escape(value)}\b", reply)) for value in item.expected)
    return {"recall": Ratio(found / len(item.expected))}


def _content(document: str, question: str, form: Form) -> str:
    if form == "words":
        return f"{document}\n{question}"
    return f"{_INTRODUCTION}{document}\n\n{question} {_INSTRUCTION}"


def _keys(rng: np.random.Generator, count: int, form: Form) -> list[str]:
    """Different keys: eight hexadecimal digits, or words."""
    if form == "words":
        return [WORDS[place] for place in rng.choice(len(WORDS), count, replace=False)]
    return [f"{key:08x}" for key in _different(rng, 0, 1 << _KEY_BITS, count)]


def _values(rng: np.random.Generator, count: int, form: Form, keys: Sequence[str]) -> list[str]:
    """Codes that are no keys: different numbers of seven digits, or words, which may repeat."""
    if form == "words":
        rest = sorted(set(WORDS) - set(keys))
        return [rest[place] for place in rng.integers(len(rest), size=count)]
    return [str(value) for value in _different(rng, *_VALUES, count)]


def _different(rng: np.random.Generator, low: int, high: int, count: int) -> list[int]:
    found: dict[int, None] = {}
    while len(found) < count:
        found.update(dict.fromkeys(rng.integers(low, high, count - len(found)).tolist()))
    return list(found)


def _largest(form: Form) -> int | None:
    # A document of words leaves one that is no key.
    return len(WORDS) - 1 if form == "words" else None


TASKS = (
    Task("needle", lambda rng, size, form, _: make(rng, size, form, 1, 1), score, 2, _largest),
    Task("needle_multi", lambda rng, size, form, _: make(rng, size, form, ASKED, 1), score, ASKED, _largest),
    Task(
        "needle_hops",
        lambda rng, size, form, number: make(rng, size, form, 1, HOPS[number % len(HOPS)]),
        score,
        max(HOPS),
        _largest,
    ),
)
