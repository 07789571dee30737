"""Multi-round co-reference, after OpenAI's MRCR: a chat in which the same piece of writing is asked for several times.

The last turn asks for one of these answers again, with a string of ten characters in front.
"""

from __future__ import annotations

import difflib
import functools
import string
from collections.abc import Callable, Sequence

import numpy as np

from bench.longcontext.items import Form, Item, Ratio, Scores, Task
from bench.longcontext.names import vocabulary
from models.training.retrieval import WORDS

NEEDLES = (2, 4, 8)
KINDS = ("poem", "story", "letter", "speech", "recipe", "song", "riddle", "essay", "review", "report", "fable", "toast")
_TOPICS, _VOCABULARY = 200, 2000
_ALPHABET = np.array([*string.ascii_letters, *string.digits])
_STRING_LENGTH = 10
_SENTENCES = (
    "The {} {} will {} the {} before the {} is {}.",
    "No {} can {} a {} without its {}.",
    "When {} meets {}, every {} begins to {}.",
    "It was {} and {}, but the {} had to {}.",
    "Ask the {} why {} and {} never {}.",
)
_LENGTHS = {"full": (60, 150), "words": (15, 30)}  # of an answer, in words
_TOKENS_PER_WORD = 5
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")


def make(rng: np.random.Generator, turns: int, form: Form, needles: int) -> Item:
    """An item.

    Args:
      rng: draws all.
      turns: requests before the last one, the repeated ones among them.
      form: "words" has short answers of the retrieval model's words.
      needles: how often the same request is made.
    """
    topics, entries = _word_lists(form)
    kind, topic = KINDS[rng.integers(len(KINDS))], topics[rng.integers(len(topics))]
    requests = [_request(kind, topic)] * needles
    while len(requests) < turns:
        # Kind or topic is the one that is asked for again, or neither, never both.
        share = rng.integers(3)
        other = (
            kind if share == 0 else KINDS[rng.integers(len(KINDS))],
            topic if share == 1 else topics[rng.integers(len(topics))],
        )
        if other != (kind, topic):
            requests.append(_request(*other))
    order = rng.permutation(len(requests))
    # No two of the answers that could be confused share a content word.
    fresh = iter(rng.permutation(len(entries)))
    messages: list[tuple[str, str]] = []
    repeated: list[str] = []
    for place in order:
        words = fresh if place < needles else iter(rng.permutation(len(entries)))
        answer = _answer(rng, lambda words=words: entries[next(words)], form)  # type: ignore[misc]
        messages += [("user", requests[place]), ("assistant", answer)]
        if place < needles:
            repeated.append(answer)
    chosen = int(rng.integers(needles))
    prefix = "".join(rng.choice(_ALPHABET, _STRING_LENGTH))
    last = (
        f"Write {prefix} and behind it, word for word, the {_ORDINALS[chosen]} {kind} about {topic}. "
        "Write nothing else."
    )
    messages.append(("user", last))
    expected = prefix + repeated[chosen]
    return Item(
        messages=tuple(messages),
        expected=(prefix, expected),
        max_tokens=_TOKENS_PER_WORD * _LENGTHS[form][1] + 4 * _STRING_LENGTH,
    )


def score(item: Item, reply: str) -> Scores:
    """0 for a reply that does not begin with the string, else `difflib`'s ratio of what stands behind it."""
    prefix, expected = item.expected
    if not reply.startswith(prefix):
        return {"ratio": Ratio(0.0), "prefixed": Ratio(0.0)}
    matcher = difflib.SequenceMatcher(None, reply.removeprefix(prefix), expected.removeprefix(prefix))
    return {"ratio": Ratio(matcher.ratio()), "prefixed": Ratio(1.0)}


def _request(kind: str, topic: str) -> str:
    return f"Write a {kind} about {topic}."


def _answer(rng: np.random.Generator, word: Callable[[], str], form: Form) -> str:
    """Sentences until there are as many words as were drawn."""
    wanted = int(rng.integers(_LENGTHS[form][0], _LENGTHS[form][1] - _longest(_SENTENCES) + 1))
    sentences: list[str] = []
    count = 0
    while count < wanted:
        frame = _SENTENCES[rng.integers(len(_SENTENCES))]
        sentences.append(frame.format(*(word() for _ in range(frame.count("{}")))))
        count += len(frame.split())
    return " ".join(sentences)


def _longest(sentences: Sequence[str]) -> int:
    return max(len(sentence.split()) for sentence in sentences)


@functools.cache
def _word_lists(form: Form) -> tuple[Sequence[str], Sequence[str]]:
    """Topics, and the words that answers are made of."""
    if form == "words":
        return WORDS[:_TOPICS], WORDS[_TOPICS:]
    words = vocabulary(_TOPICS + _VOCABULARY, seed=0)
    return words[:_TOPICS], words[_TOPICS:]


def _task(needles: int) -> Task:
    return Task(
        f"mrcr_{needles}",
        lambda rng, size, form, _: make(rng, size, form, needles),
        score,
        needles,
        lambda _form: None,
    )


TASKS = tuple(_task(needles) for needles in NEEDLES)
