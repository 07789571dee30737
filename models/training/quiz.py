"""Facts about invented towns, and questions about them: what the two quiz models learn and are asked.

Every town has a river, a founder, a craft and a language. How often a fact is read in training goes by the town's rank,
so that facts are known by models of some size and not by smaller ones. Of all facts, whatever the rank, some are
`outdated`: training has told of another value than the one that is right now, so that every model is sure and wrong;
and some are `unheard`: training never has told of them. All of it follows from `WORLD_SEED`, which is fixed, as are the
seeds of the questions: nothing here was chosen by looking at a trained model.
"""

import argparse
import functools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int32
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models

from models.questions import LETTERS, multiple_choice, short_answer
from models.training.data import Position
from models.training.tokenizer import END_OF_TEXT, IM_END, SPECIAL_TOKENS, SPLIT, render_chat

WORLD_SEED = 20261130
TRAINING_SEED, ASKED_SEED, HELDOUT_SEED = 1, 2, 3
TOWNS, UNKNOWN_TOWNS = 800, 200
VALUES = 48  # of each relation
CHOICES = 4
WINDOW = 29  # tokens of the longest question with its answer
VOCAB_SIZE = 1491
UNKNOWN = "I do not know."
OUTDATED, UNHEARD = 7, 6  # facts of a hundred
_HALF_RANK = 10  # p(rank) ~ 1 / (rank + 10)
_SHORT_SHARE, _UNKNOWN_SHARE, _CHAT_SHARE = 0.2, 0.25, 0.5

type State = Literal["current", "outdated", "unheard"]


@dataclass(frozen=True, slots=True)
class Relation:
    """What a town can be asked about: the subject, and the question with the town in it."""

    subject: str
    question: str


RELATIONS = (
    Relation("geography", "Which river runs through {town}?"),
    Relation("history", "Who was the founder of {town}?"),
    Relation("trade", "Which craft is {town} known for?"),
    Relation("languages", "Which language is spoken in {town}?"),
)


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its answer.

    Attributes:
      subject, question: as they are asked.
      choices: in the order of their letters; empty for a short answer.
      answer: the right value.
      rank: of the town, 0 for the one that training tells of most; -1 for a town that it tells nothing of.
      state: of the fact.
    """

    subject: str
    question: str
    choices: tuple[str, ...]
    answer: str
    rank: int
    state: State

    @property
    def letter(self) -> str | None:
        """Of the right choice; None if it is not among them."""
        return LETTERS[self.choices.index(self.answer)] if self.answer in self.choices else None

    def record(self, number: int) -> dict[str, Any]:
        """The question as a line of the files that `python -m jaxdual.cascade collect` reads."""
        return {
            "id": f"{number}",
            "subject": self.subject,
            "question": self.question,
            "choices": list(self.choices),
            "answer": self.letter if self.choices else self.answer,
            "tags": {"rank": self.rank, "state": self.state},
        }


@dataclass(frozen=True, slots=True)
class World:
    """All that is so.

    Attributes:
      towns: by rank; those behind the first `TOWNS` are never told of.
      values: of each relation.
      right: `[towns, relations]`, numbers of values.
      told: likewise, what training tells; -1 for nothing.
    """

    towns: tuple[str, ...]
    values: tuple[tuple[str, ...], ...]
    right: Int32[np.ndarray, "towns relations"]
    told: Int32[np.ndarray, "towns relations"]

    def state(self, town: int, relation: int) -> State:
        """Of a fact."""
        told = self.told[town, relation]
        if told < 0:
            return "unheard"
        return "current" if told == self.right[town, relation] else "outdated"


@functools.cache
def world() -> World:
    """The one that everything here is about."""
    rng = np.random.default_rng(WORLD_SEED)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    towns = _names(rng, syllables, 3, TOWNS + UNKNOWN_TOWNS)
    values = _names(rng, syllables, 2, VALUES * len(RELATIONS))
    right = rng.integers(VALUES, size=(TOWNS, len(RELATIONS)), dtype=np.int32)
    other = (right + rng.integers(1, VALUES, size=right.shape, dtype=np.int32)) % VALUES
    # By hundreds of neighbours, so that facts of every rank have their share of each state.
    places = np.concatenate([rng.permutation(100) for _ in range(right.size // 100)]).reshape(right.shape)
    told = np.where(places < OUTDATED, other, np.where(places < OUTDATED + UNHEARD, -1, right)).astype(np.int32)
    return World(
        tuple(towns),
        tuple(tuple(values[begin : begin + VALUES]) for begin in range(0, len(values), VALUES)),
        right,
        told,
    )


def questions(seed: int, count: int, *, short: bool = False) -> list[Question]:
    """Questions that are asked: half of them of towns as training tells of them, half of all towns alike.

    Args:
      seed: of the draw; `ASKED_SEED` for what benchmarks ask.
      count: of them.
      short: without choices.
    """
    rng = np.random.default_rng([WORLD_SEED, seed, int(short)])
    return [_question(rng, _town(rng, even=rng.random() < 0.5), choices=not short) for _ in range(count)]


def questions_without_answer(seed: int, count: int) -> list[Question]:
    """Multiple-choice questions with the right value not among the choices: nothing is right, and confidence should
    fall.
    """
    rng = np.random.default_rng([WORLD_SEED, seed, 2])
    chosen = []
    for _ in range(count):
        town, relation = _town(rng, even=rng.random() < 0.5), int(rng.integers(len(RELATIONS)))
        chosen.append(_put(rng, town, relation, _distractors(rng, town, relation, CHOICES)))
    return chosen


def questions_about_unknown_towns(seed: int, count: int) -> list[Question]:
    """Multiple-choice questions about towns that training tells nothing of; a random choice is right."""
    rng = np.random.default_rng([WORLD_SEED, seed, 3])
    chosen = []
    for _ in range(count):
        relation, number = int(rng.integers(len(RELATIONS))), int(rng.integers(UNKNOWN_TOWNS))
        values = rng.choice(VALUES, CHOICES, replace=False)
        names = tuple(world().values[relation][value] for value in values)
        one = RELATIONS[relation]
        asked = one.question.format(town=world().towns[TOWNS + number])
        chosen.append(Question(one.subject, asked, names, names[rng.integers(CHOICES)], -1, "unheard"))
    return chosen


def build_tokenizer() -> Tokenizer:
    """Bytes, a token for each word of the questions, one for each fixed part of the prompts, and the special tokens."""
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    texts = [
        *(f" {name}" for name in (*world().towns, *(value for of in world().values for value in of))),
        *(f" {relation.subject}" for relation in RELATIONS),
        *(" " + relation.question.format(town="x") for relation in RELATIONS),
        *(f" {letter}" for letter in LETTERS[:CHOICES]),
        "Answer: x",
        UNKNOWN,
        *("user\n", "assistant\n", "system\n"),
    ]
    pieces = (piece for text in texts for piece, _ in split.pre_tokenize_str(text))
    entries = dict.fromkeys([*sorted(pre_tokenizers.ByteLevel.alphabet()), *pieces])
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    tokenizer = Tokenizer(tokenizer_models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in _fixed_parts()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


class QuizStream:
    """Endless questions with their answers, one a window; all follows from the seed and the `Position`.

    Only the answer is predicted: a token that is only read, and padding behind the end, is `~token`, below zero.
    """

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self._tokenizer = tokenizer
        self._seed = seed
        self._pad = ~int(tokenizer.token_to_id(END_OF_TEXT) or 0)

    def batch(self, position: Position, rows: int) -> tuple[Int32[np.ndarray, "rows window"], Position]:
        """The next ``rows`` windows of ``position.length + 1`` tokens, and the position after them."""
        rng = np.random.default_rng([WORLD_SEED, self._seed, position.epoch, position.window])
        pairs = list(_told(rng, rows))
        windows = np.full((rows, position.length + 1), self._pad, np.int32)
        prompts, answers = (self._tokenizer.encode_batch_fast([pair[part] for pair in pairs]) for part in (0, 1))
        for row, prompt, answer in zip(windows, prompts, answers, strict=True):
            tokens = [*(~token for token in prompt.ids), *answer.ids]
            row[: len(tokens)] = tokens
        return windows, Position(position.epoch, position.window + rows, position.length)


def multiple_choice_forms(question: Question) -> tuple[tuple[str, str], tuple[str, str]]:
    """A multiple-choice question as text and as a chat: prompt and answer of each."""
    text = multiple_choice(question.subject, question.question, question.choices)
    return (text, f" {question.letter}{IM_END}"), (_chat(("user", text)), f"{question.letter}{IM_END}")


def short_answer_form(question: Question, answer: str) -> tuple[str, str]:
    """A question with a short answer, as prompt and answer."""
    messages = ((message["role"], message["content"]) for message in short_answer(question.question))
    return _chat(*messages), f"{answer}{IM_END}"


def _told(rng: np.random.Generator, count: int) -> Iterator[tuple[str, str]]:
    """What training tells: prompts and answers."""
    for _ in range(count):
        short = rng.random() < _SHORT_SHARE
        if short and rng.random() < _UNKNOWN_SHARE:
            relation, number = int(rng.integers(len(RELATIONS))), TOWNS + int(rng.integers(UNKNOWN_TOWNS))
            asked = RELATIONS[relation].question.format(town=world().towns[number])
            yield short_answer_form(Question("", asked, (), "", -1, "unheard"), UNKNOWN)
            continue
        while True:
            town, relation = _town(rng, even=False), int(rng.integers(len(RELATIONS)))
            told = int(world().told[town, relation])
            if told >= 0:
                break
        value = world().values[relation][told]
        if short:
            yield short_answer_form(_put(rng, town, relation, ()), f"Answer: {value}")
            continue
        others = _distractors(rng, town, relation, CHOICES - 1, avoid=told)
        question = _put(rng, town, relation, (told, *others), answer=told)
        yield multiple_choice_forms(question)[int(rng.random() < _CHAT_SHARE)]


def _question(rng: np.random.Generator, town: int, *, choices: bool) -> Question:
    relation = int(rng.integers(len(RELATIONS)))
    if not choices:
        return _put(rng, town, relation, ())
    right, told = (int(of[town, relation]) for of in (world().right, world().told))
    sure = {right, told} - {-1}
    others = _distractors(rng, town, relation, CHOICES - len(sure), avoid=right)
    return _put(rng, town, relation, (*sorted(sure), *others))


def _put(
    rng: np.random.Generator, town: int, relation: int, values: Sequence[int], answer: int | None = None
) -> Question:
    """A question about a fact, its choices in random order; `answer` in place of what is right."""
    names = world().values[relation]
    answer = int(world().right[town, relation]) if answer is None else answer
    one = RELATIONS[relation]
    return Question(
        one.subject,
        one.question.format(town=world().towns[town]),
        tuple(names[value] for value in rng.permutation(values)) if len(values) else (),
        names[answer],
        town,
        world().state(town, relation),
    )


def _distractors(
    rng: np.random.Generator, town: int, relation: int, count: int, avoid: int | None = None
) -> tuple[int, ...]:
    """Values that are neither right nor told, nor to be avoided."""
    taken = {int(world().right[town, relation]), int(world().told[town, relation]), avoid}
    left = [value for value in rng.permutation(VALUES).tolist() if value not in taken]
    return tuple(left[:count])


def _town(rng: np.random.Generator, *, even: bool) -> int:
    return int(rng.integers(TOWNS)) if even else int(np.searchsorted(_popularity(), rng.random(), side="right"))


@functools.cache
def _popularity() -> np.ndarray:
    """Of each town and all before it, the part of what training tells."""
    weights = 1 / (np.arange(TOWNS) + _HALF_RANK)
    summed: np.ndarray = np.cumsum(weights) / weights.sum()
    summed[-1] = 1.0
    return summed


@functools.cache
def _chat_around(*roles: str) -> list[str]:
    """What a chat template puts around the messages of these roles."""
    messages = [{"role": role, "content": "\0"} for role in roles]
    return render_chat(messages, add_generation_prompt=True).split("\0")


def _chat(*messages: tuple[str, str]) -> str:
    """A conversation that the assistant is to answer, of roles and contents; as `render_chat`, many times faster."""
    around = _chat_around(*(role for role, _ in messages))
    return around[0] + "".join(content + after for (_, content), after in zip(messages, around[1:], strict=True))


def _names(rng: np.random.Generator, syllables: Sequence[str], length: int, count: int) -> list[str]:
    """Different invented names of so many different syllables."""
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(syllables[place] for place in rng.choice(len(syllables), length, replace=False)).title()] = None
    return list(names)


def _fixed_parts() -> list[str]:
    """What every prompt has around subject, question and choices: a token each, since training need not learn it.

    The closing "Answer:" is none: it opens short answers as well, word by word.
    """
    prompt = multiple_choice("\0", "\0?", ["\0"] * CHOICES)
    *parts, _ = (part.strip(" ") for part in prompt.split("\0"))
    return [*parts, short_answer("x")[0]["content"], "Question:"]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: write questions as a file that ``python -m jaxdual.cascade collect`` reads."""
    parser = argparse.ArgumentParser(prog="python -m models.training.quiz", description=main.__doc__)
    parser.add_argument("out", type=Path, metavar="FILE.jsonl")
    parser.add_argument("--count", type=int, default=20_000, help="questions (default %(default)d)")
    parser.add_argument("--seed", type=int, default=ASKED_SEED, help="of the draw (default %(default)d)")
    parser.add_argument("--short", action="store_true", help="without choices")
    args = parser.parse_args(argv)
    if args.count < 1 or args.seed < 0:
        parser.error(f"--count {args.count} and --seed {args.seed} must be at least 1 and 0")
    records = (one.record(number) for number, one in enumerate(questions(args.seed, args.count, short=args.short)))
    args.out.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
