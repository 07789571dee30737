"""Training data: documents from source files, chat-form examples made from them, and packed windows of tokens."""

import ast
import copy
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32
from tokenizers import Tokenizer

from models.training.tokenizer import END_OF_TEXT, render_chat

_MAX_FUNCTION_BYTES = 1800
_ROTATION = 3


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run stands in its data.

    Attributes:
        epoch: which shuffle of the documents.
        window: next window of that epoch.
        length: tokens in a window; another length starts the next epoch.
    """

    epoch: int
    window: int
    length: int


def chat_examples(source: str) -> list[str]:
    """Makes one chat transcript of each function with a docstring.

    The user asks for the function by name and first line of its docstring; the assistant answers with its source.

    Returns:
        Rendered transcripts, in source order; empty if the source does not parse. Functions above 1,800 bytes are left
        out, since their end would not fit into a window, and so are those without a one-line description.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return []
    lines = source.splitlines(keepends=True)
    transcripts = []
    for node, owner in _functions(tree):
        first_line = (ast.get_docstring(node) or "").strip().partition("\n")[0].strip()
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        code = textwrap.dedent("".join(lines[first - 1 : node.end_lineno])).strip()
        if (
            len(first_line) < 10
            or len(code.encode()) > _MAX_FUNCTION_BYTES
            or not code.startswith(("def", "async", "@"))
        ):
            continue
        subject = f"function `{node.name}`" if owner is None else f"method `{node.name}` of the class `{owner}`"
        request = f"Write a Python {subject}: {first_line}"
        transcripts.append(render_chat([{"role": "user", "content": request}, {"role": "assistant", "content": code}]))
    return transcripts


class WindowStream:
    """Endless shuffled windows over tokenized files and the chat transcripts made from them.

    An epoch takes every file and every third transcript (the next epoch another third, so that chat is about an eighth
    of the tokens), shuffles them, joins them with one ``<|endoftext|>`` after each, cuts the stream into windows of
    ``length + 1`` tokens (neighbours share one, so that every token is predicted once) and shuffles the windows. All of
    it follows from the seed and the `Position`.
    """

    def __init__(self, tokenizer: Tokenizer, texts: Mapping[str, str], seed: int) -> None:
        """Tokenizes ``texts`` (path -> source); raises ValueError if there are none."""
        if not texts:
            raise ValueError("texts: no document")
        transcripts = [transcript for text in texts.values() for transcript in chat_examples(text)]
        self._files = _tokenize(tokenizer, list(texts.values()))
        self._transcripts = _tokenize(tokenizer, transcripts)
        self._seed = seed
        self._cached: tuple[tuple[int, int], Int32[np.ndarray, "windows window"]] | None = None

    def reseeded(self, seed: int) -> "WindowStream":
        """The same documents in the order of another seed."""
        other = copy.copy(self)
        other._seed, other._cached = seed, None
        return other

    def batch(self, position: Position, rows: int) -> tuple[Int32[np.ndarray, "rows window"], Position]:
        """The next ``rows`` windows and the position after them; a remainder of an epoch below ``rows`` is skipped.

        Raises:
            ValueError: an epoch has fewer than ``rows`` windows.
        """
        windows = self._epoch(position.epoch, position.length)
        if rows > len(windows):
            raise ValueError(f"rows={rows}: an epoch has {len(windows)} windows of {position.length} tokens")
        if position.window + rows > len(windows):
            return self.batch(Position(position.epoch + 1, 0, position.length), rows)
        chosen = windows[position.window : position.window + rows]
        return chosen, Position(position.epoch, position.window + rows, position.length)

    def _epoch(self, epoch: int, length: int) -> Int32[np.ndarray, "windows window"]:
        if self._cached is None or self._cached[0] != (epoch, length):
            generator = np.random.default_rng([self._seed, epoch])
            documents = self._files + self._transcripts[epoch % _ROTATION :: _ROTATION]
            stream = np.concatenate([documents[index] for index in generator.permutation(len(documents))])
            starts = np.arange((len(stream) - 1) // length) * length
            windows = stream[starts[:, None] + np.arange(length + 1)]
            self._cached = ((epoch, length), generator.permutation(windows))
        return self._cached[1]


def _tokenize(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Int32[np.ndarray, "tokens"]]:
    end = tokenizer.token_to_id(END_OF_TEXT)
    return [np.array([*encoding.ids, end], np.int32) for encoding in tokenizer.encode_batch_fast(list(texts))]


def _functions(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, str | None]]:
    """Functions of a module and methods of its classes, with the class name; functions inside functions are not."""
    stack: list[tuple[ast.stmt, str | None]] = [(node, None) for node in reversed(tree.body)]
    while stack:
        node, owner = stack.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node, owner
        elif isinstance(node, ast.ClassDef):
            stack.extend((child, node.name) for child in reversed(node.body))
        elif isinstance(node, ast.If | ast.Try):
            stack.extend((child, owner) for child in reversed([*node.body, *node.orelse]))
