"""Texts that need retrieval, and the windows that the retrieval model is trained on.

A document has a line for each code (``The code of dako is mive.``), or for each connection (``From dako go to mive by
bus.``); questions about it follow, as turns of a chat. Documents, questions and answers are random, so only reading
them helps; only answers are predicted. `bench.longcontext` asks in the same words.

A part of the windows are drills, whose lines come again and again: predicted is the end of each line that has been
there before. They have more tokens that must be looked up than conversations.
"""

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int32
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models

from models.training.data import Position
from models.training.tokenizer import END_OF_TEXT, IM_END, IM_START, SPECIAL_TOKENS, SPLIT

VOCAB_SIZE = 803
MODES = ("bus", "train", "plane", "ferry")
HOPS = (2, 3, 4)
ASKED = (1, 2, 3, 4)
_ROUTE_STEPS = (1, 2, 3, 4, 5)
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_FEWEST_LINES = 3
_LINE_TOKENS = 8
_DOCUMENT_SHARES = (0.3, 0.85)  # of a window, at most
DRILLS = 0.25  # of the windows


def words(count: int = 512, seed: int = 0) -> tuple[str, ...]:
    """Different invented words of four letters, so that none begins another."""
    syllables = [a + b for a in _CONSONANTS for b in _VOWELS]
    pairs = [a + b for a, b in itertools.product(syllables, syllables) if a != b]
    chosen = np.random.default_rng(seed).choice(len(pairs), count, replace=False)
    return tuple(pairs[place] for place in chosen)


WORDS = words()


def code_line(key: str, value: str) -> str:
    """A line of a document of codes."""
    return f"The code of {key} is {value}."


def codes_question(keys: Sequence[str]) -> str:
    """Asks for the codes of one key or several."""
    if len(keys) == 1:
        return f"What is the code of {keys[0]}?"
    return f"What are the codes of {', '.join(keys[:-1])} and {keys[-1]}?"


def hops_question(key: str, hops: int) -> str:
    """Asks for the code of the code of ... a key."""
    return f"Which code is {hops} steps from {key}?"


def route_line(source: str, destination: str, mode: str) -> str:
    """A line of a document of connections, and of a route."""
    return f"From {source} go to {destination} by {mode}."


def route_question(source: str, destination: str) -> str:
    """Asks for a route."""
    return f"Which route leads from {source} to {destination}?"


def route_answer(lines: Sequence[str]) -> str:
    """The route whose lines these are."""
    return "\n".join(["<Route>", *lines, "</Route>"])


def build_tokenizer() -> Tokenizer:
    """Bytes, each word of these texts as one token (with the space before it), and the special tokens of all models."""
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    pair = ("x", "y")
    texts = [
        *(f" {word}" for word in WORDS),
        code_line(*pair) + "\n",
        codes_question(pair[:1]),
        codes_question((*pair, "x", "y")),
        hops_question("x", 2),
        *(route_line(*pair, mode) + "\n" for mode in MODES),
        route_question(*pair),
        route_answer([route_line(*pair, MODES[0])]),
        *("user\n", "assistant\n", "system\n"),
    ]
    pieces = (piece for text in texts for piece, _ in split.pre_tokenize_str(text))
    entries = dict.fromkeys([*sorted(pre_tokenizers.ByteLevel.alphabet()), *pieces])
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    tokenizer = Tokenizer(tokenizer_models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


class RetrievalStream:
    """Endless windows of conversations about random documents; all follows from the seed and the `Position`.

    A window is filled with whole conversations, the last one cut, or is a drill. A token that is only read is `~token`,
    below zero.
    """

    def __init__(self, tokenizer: Tokenizer, seed: int, drills: float = DRILLS) -> None:
        """`drills` is the share of windows that are drills."""
        self._tokenizer = tokenizer
        self._seed = seed
        self._drills = drills

    def batch(self, position: Position, rows: int) -> tuple[Int32[np.ndarray, "rows window"], Position]:
        """The next ``rows`` windows of ``position.length + 1`` tokens, and the position after them."""
        rng = np.random.default_rng([self._seed, position.epoch, position.window])
        windows = [self._window(rng, position.length + 1) for _ in range(rows)]
        return np.stack(windows), Position(position.epoch, position.window + rows, position.length)

    def _window(self, rng: np.random.Generator, size: int) -> Int32[np.ndarray, "window"]:
        drill = rng.random() < self._drills
        tokens: list[int] = []
        while len(tokens) < size:
            most_lines = int(rng.choice(_DOCUMENT_SHARES) * (size - len(tokens)) / _LINE_TOKENS)
            pieces = _drill(rng, size // _LINE_TOKENS) if drill else _turns(conversation(rng, most_lines))
            encoded = self._tokenizer.encode_batch_fast([text for text, _ in pieces])
            for (_, predicted), encoding in zip(pieces, encoded, strict=True):
                tokens += [token if predicted else ~token for token in encoding.ids]
        return np.array(tokens[:size], np.int32)


def looked_up(tokenizer: Tokenizer, windows: Int32[np.ndarray, "rows window"]) -> Bool[np.ndarray, "rows window"]:
    """Tokens that are predicted and are a word or a mode: of answers, what the text around does not tell."""
    pieces = [f" {word}" for word in (*WORDS, *MODES)]
    tokens = [token for encoding in tokenizer.encode_batch_fast(pieces) for token in encoding.ids]
    return np.isin(windows, tokens)


def _turns(turns: Sequence[tuple[str, str]]) -> list[tuple[str, bool]]:
    """A conversation as pieces of text, and whether each is predicted."""
    pieces = []
    for question, answer in turns:
        pieces.append((f"{IM_START}user\n{question}{IM_END}\n{IM_START}assistant\n", False))
        pieces += [(f"{answer}{IM_END}", True), ("\n", False)]
    return [*pieces, (END_OF_TEXT, False)]


def _drill(rng: np.random.Generator, lines: int) -> list[tuple[str, bool]]:
    """Lines of which each comes about twice or more, in random order, as pieces of text; see `_turns`."""
    different = int(rng.integers(_FEWEST_LINES, max(_FEWEST_LINES, lines // 2) + 1))
    keys, values = rng.permutation(len(WORDS))[:different], rng.integers(len(WORDS), size=different)
    modes = rng.choice(MODES, different) if rng.random() < 0.5 else None
    pieces: list[tuple[str, bool]] = []
    seen: set[int] = set()
    for place in rng.integers(different, size=lines).tolist():
        key, value = WORDS[keys[place]], WORDS[values[place]]
        line = code_line(key, value) if modes is None else route_line(key, value, str(modes[place]))
        begins = line.index(key) + len(key)
        pieces += [(line[:begins], False), (line[begins:] + "\n", place in seen)]
        seen.add(place)
    return pieces


def conversation(rng: np.random.Generator, most_lines: int) -> list[tuple[str, str]]:
    """Questions and answers about one document, which the first question brings.

    Args:
      rng: draws all.
      most_lines: of the document; few and many lines are about as likely.
    """
    most = max(_FEWEST_LINES, most_lines)
    low, high = np.log([_FEWEST_LINES, most + 1])
    lines = int(rng.integers(_FEWEST_LINES, most + 1)) if rng.random() < 0.5 else int(np.exp(rng.uniform(low, high)))
    document, turns = (_codes if rng.random() < 0.5 else _connections)(rng, lines)
    (question, answer), *more = turns
    return [(f"{document}\n{question}", answer), *more]


def _codes(rng: np.random.Generator, lines: int) -> tuple[str, list[tuple[str, str]]]:
    keys, rest = np.split(rng.permutation(len(WORDS)), [lines])
    follower = _forest(rng, keys, rest, chained=0.4)
    turns = []
    asked = list(rng.permutation(keys))
    while asked:
        count = int(rng.choice(ASKED))
        some, asked = asked[:count], asked[count:]
        deep = [hops for hops in HOPS if len(_walk(follower, some[0], hops)) == hops]
        if deep and rng.random() < 0.5:
            steps = _walk(follower, some[0], int(rng.choice(deep)))
            question = hops_question(WORDS[some[0]], len(steps))
        else:
            steps = [(key, follower[key]) for key in some]
            question = codes_question([WORDS[key] for key in some])
        turns.append((question, "\n".join(code_line(WORDS[key], WORDS[value]) for key, value in steps)))
    return "\n".join(code_line(WORDS[key], WORDS[follower[key]]) for key in rng.permutation(keys)), turns


def _connections(rng: np.random.Generator, lines: int) -> tuple[str, list[tuple[str, str]]]:
    sources, rest = np.split(rng.permutation(len(WORDS)), [lines])
    follower = _forest(rng, sources, rest, chained=0.9)
    mode = {source: str(rng.choice(MODES)) for source in sources}

    def render(steps: Sequence[tuple[int, int]]) -> list[str]:
        return [route_line(WORDS[source], WORDS[destination], mode[source]) for source, destination in steps]

    turns = []
    for source in rng.permutation(sources)[: max(2, lines // 2)]:
        steps = _walk(follower, source, int(rng.choice(_ROUTE_STEPS)))
        turns.append((route_question(WORDS[source], WORDS[steps[-1][1]]), route_answer(render(steps))))
    return "\n".join(render([(source, follower[source]) for source in rng.permutation(sources)])), turns


def _forest(rng: np.random.Generator, nodes: np.ndarray, rest: np.ndarray, chained: float) -> dict[int, int]:
    """What follows each node: one before it, by a probability, else one of the rest; so there is no cycle."""
    follower: dict[int, int] = {}
    for place, node in enumerate(nodes):
        # Mostly the last one, so that there are long ways.
        before = place - 1 if rng.random() < 0.6 else int(rng.integers(max(place, 1)))
        follower[node] = int(nodes[before] if place and rng.random() < chained else rest[rng.integers(len(rest))])
    return follower


def _walk(follower: dict[int, int], start: int, steps: int) -> list[tuple[int, int]]:
    """At most that many steps, as (node, what follows it)."""
    way: list[tuple[int, int]] = []
    while start in follower and len(way) < steps:
        way.append((start, follower[start]))
        start = follower[start]
    return way
