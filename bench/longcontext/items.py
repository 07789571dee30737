"""What a task asks, and what replies are worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

# "full" as published, for any model; "words" in the words that the retrieval model is trained on.
type Form = Literal["full", "words"]
FORMS: tuple[Form, ...] = ("full", "words")


@dataclass(frozen=True, slots=True)
class Item:
    """One question.

    Attributes:
      messages: of the chat that asks it, as (role, content).
      expected: what the task's score needs to know.
      max_tokens: of a reply.
      gold: lines of the last user message that answer, in order; where a task has lines.
      reply_start: what the reply begins with already.
    """

    messages: tuple[tuple[str, str], ...]
    expected: Any
    max_tokens: int
    gold: tuple[str, ...] = ()
    reply_start: str = ""


@dataclass(frozen=True, slots=True)
class Ratio:
    """A figure of one reply, as numerator and denominator: a cell's is the ratio of their sums."""

    value: float
    of: float = 1.0


type Scores = Mapping[str, Ratio]


@dataclass(frozen=True, slots=True)
class Task:
    """Items of one kind.

    Attributes:
      name: of the task.
      make: `(generator, size, form, number) -> item`; the size is a number of lines or turns, and the item's number
        within its cell chooses between variants.
      score: of a reply, by the names of figures; the first one is the main one.
      smallest: size.
      largest: size, by form; None for any.
    """

    name: str
    make: Callable[[np.random.Generator, int, Form, int], Item]
    score: Callable[[Item, str], Scores]
    smallest: int
    largest: Callable[[Form], int | None]

    def items(self, count: int, size: int, form: Form, seed: int) -> list[Item]:
        """The same ones for the same arguments; of two counts, those of the smaller one are the first of the other.

        Raises:
          ValueError: a size out of range.
        """
        self.check(size, form)
        # A name's letters, since hash() differs between processes.
        root = [seed, size, *self.name.encode()]
        return [self.make(np.random.default_rng([*root, number]), size, form, number) for number in range(count)]

    def check(self, size: int, form: Form) -> None:
        """Raises ValueError for a size out of range."""
        largest = self.largest(form)
        if size < self.smallest or (largest is not None and size > largest):
            bound = "" if largest is None else f" and at most {largest} in the form {form!r}"
            raise ValueError(f"{self.name}: size={size} must be at least {self.smallest}{bound}")
