"""One pass of a model over each question, in batches of equal shapes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float32, Int32

from jaxdual.cascade.evaluation.item_prompts import (
    Form,
    answer_of,
    p_true_prompt,
    prompt_of,
    same_answer,
)
from jaxdual.cascade.evaluation.items import Item, Split
from jaxdual.cascade.evaluation.rules import letter_probabilities
from jaxdual.cascade.evaluation.signals import Header, Signals
from jaxdual.cascade.letters import confidence_of
from jaxdual.cascade.options import ConfidenceSpec
from jaxdual.cascade.work import LayerSizes
from jaxdual.tokenizer import Tokenizer
from models import Decoder
from models.attention import dense_attend
from models.fingerprint import model_fingerprint
from models.questions import LETTERS, OPENING
from models.shapes import active_parameters

BATCH = 64
MAX_OUTPUT = 16  # tokens of a short answer
_LEAST_LENGTH = 16  # of the buckets


class Read(NamedTuple):
    """What a pass gives of each row, of its last token.

    Attributes:
      hidden: residual stream behind the tap layer.
      logprobs: of the tokens that are watched, over the whole vocabulary.
      likeliest: token.
    """

    hidden: Float32[Array, "B D"]
    logprobs: Float32[Array, "B W"]
    likeliest: Int32[Array, " B"]


@dataclass(frozen=True, slots=True)
class Pass:
    """`Read` of many prompts, in their order, and the seconds of each."""

    hidden: Float32[np.ndarray, "N D"]
    logprobs: Float32[np.ndarray, "N W"]
    likeliest: Int32[np.ndarray, " N"]
    seconds: np.ndarray


class Reader:
    """Passes of one model.

    Args:
      model: of which kind ever.
      tap: layers below the tap.
      batch: prompts of a pass, at most.
    """

    def __init__(self, model: Decoder, tap: int, batch: int = BATCH) -> None:
        self._graphdef, self._state = nnx.split(model)
        self._longest = model.config.max_position_embeddings
        self._tap, self._batch = tap, batch
        self._compiled: set[tuple[int, ...]] = set()

    def read(
        self, prompts: Sequence[Sequence[int]], watched: Sequence[int], done: Callable[[int], object] = lambda _: None
    ) -> Pass:
        """A pass over each prompt.

        Args:
          prompts: tokens.
          watched: tokens whose log-probabilities are wanted.
          done: is told of prompts that are done.

        Raises:
          ValueError: an empty prompt, or one that is longer than the model's context.
        """
        longest = max(map(len, prompts), default=0)
        if longest > self._longest or not all(prompts):
            raise ValueError(f"prompts have up to {longest} tokens; 1 to {self._longest} can be read")
        rows: list[tuple[np.ndarray, ...]] = [()] * len(prompts)
        ids = jnp.asarray(watched, jnp.int32)
        for chosen, tokens, lengths in _batches(prompts, self._batch):
            if (tokens.shape + ids.shape) not in self._compiled:
                jax.block_until_ready(self._run(tokens, lengths, ids))
                self._compiled.add(tokens.shape + ids.shape)
            begin = time.perf_counter()
            found = [np.asarray(part) for part in self._run(tokens, lengths, ids)]
            seconds = np.array((time.perf_counter() - begin) / len(chosen))
            for row, place in enumerate(chosen):
                rows[place] = (*(part[row] for part in found), seconds)
            done(len(chosen))
        return Pass(*(np.stack(column) for column in zip(*rows, strict=True)))

    def _run(self, tokens: np.ndarray, lengths: np.ndarray, watched: jax.Array) -> Read:
        inputs = jnp.asarray(tokens), jnp.asarray(lengths), watched
        found: Read = _read(self._graphdef, self._state, self._tap, *inputs)
        return found


def collect(
    folder: Path,
    name: str,
    model: Decoder,
    tokenizer: Tokenizer,
    items: Sequence[Item],
    splits: Sequence[Split],
    *,
    source: str,
    tap: int,
    form: Form,
    batch: int = BATCH,
    max_output: int = MAX_OUTPUT,
    p_true: bool = False,
    done: Callable[[int], object] = lambda _: None,
) -> Signals:
    """Signals of one model over items, which all have choices or all have none.

    Args:
      folder, name: of the model.
      model, tokenizer: of the folder.
      items, splits: questions, and which part each belongs to.
      source: where the items are from.
      tap: layers below the tap.
      form: of the prompts.
      batch: prompts of a pass.
      max_output: tokens of a short answer, at most.
      p_true: takes P(True) as well, by one more pass.
      done: is told of questions that are done.

    Raises:
      ValueError: a tap that the model has not, letters that are no tokens, or prompts that are too long.
    """
    if not 1 <= tap <= model.config.num_layers:
        raise ValueError(f"tap={tap} must be 1 to {model.config.num_layers}, the model's layers")
    reader = Reader(model, tap, batch)
    prompts = [prompt_of(tokenizer, item, form) for item in items]
    if items[0].choices:
        letters = tuple(LETTERS[: max(len(item.choices) for item in items)])
        tokens = confidence_of(ConfidenceSpec(letters=letters), tokenizer, name).tokens
        answers = _choose(reader, items, prompts, tokens, done)
    else:
        tokens = confidence_of(ConfidenceSpec(kind="opening", opening=OPENING), tokenizer, name).tokens
        answers = _answer(reader, tokenizer, items, prompts, tokens, model.config.eos_token_ids, max_output, done)
    asked = _p_true(reader, tokenizer, name, items, answers.given, form) if p_true else (None, None)
    dtype = jnp.dtype(model.embedding[...].dtype).name
    return Signals(
        header=Header(
            model=name,
            folder=str(folder),
            fingerprint=model_fingerprint(folder, dtype).hex(),
            dtype=dtype,
            sizes=LayerSizes.of(active_parameters(model.config), tap),
            hidden_size=model.config.hidden_size,
            form=form,
            kind="choices" if items[0].choices else "opening",
            tokens=tokens,
            items=source,
        ),
        ids=np.array([item.id for item in items]),
        subjects=np.array([item.subject for item in items]),
        splits=np.array(splits),
        given=np.array(answers.given),
        right=np.array([_right(item) for item in items]),
        correct=np.array([_is_right(item, given) for item, given in zip(items, answers.given, strict=True)]),
        hidden=answers.first.hidden,
        logprobs=answers.logprobs,
        prompt_tokens=np.array([len(prompt) for prompt in prompts]),
        output_tokens=np.array(answers.output_tokens),
        judged_tokens=np.array(answers.judged_tokens),
        seconds=answers.seconds,
        p_true=asked[0],
        p_true_tokens=asked[1],
    )


@dataclass(frozen=True, slots=True)
class _Answers:
    given: list[str]
    first: Pass
    logprobs: np.ndarray
    output_tokens: list[int]
    judged_tokens: list[int]
    seconds: np.ndarray


def _choose(
    reader: Reader,
    items: Sequence[Item],
    prompts: Sequence[Sequence[int]],
    tokens: tuple[tuple[int, ...], ...],
    done: Callable[[int], object],
) -> _Answers:
    first = reader.read(prompts, [token for letter in tokens for token in letter], done)
    logprobs = _grouped(first.logprobs, tokens)
    for row, item in zip(logprobs, items, strict=True):
        row[len(item.choices) :] = -np.inf
    given = [LETTERS[place] for place in letter_probabilities(logprobs).argmax(axis=1)]
    ones = [1] * len(items)
    return _Answers(given, first, logprobs, ones, ones, first.seconds)


def _answer(
    reader: Reader,
    tokenizer: Tokenizer,
    items: Sequence[Item],
    prompts: Sequence[Sequence[int]],
    tokens: tuple[tuple[int, ...], ...],
    ends: Sequence[int],
    max_output: int,
    done: Callable[[int], object],
) -> _Answers:
    """Greedy answers, the whole sequence computed anew for each token: for prompts of small models."""
    watched = [token for place in tokens for token in place]
    outputs: list[list[int]] = [[] for _ in items]
    logprobs = np.full((len(items), len(tokens), max(map(len, tokens))), -np.inf, np.float32)
    logprobs[:, :, 0] = 0
    judged, seconds = np.zeros(len(items), int), np.zeros(len(items))
    going, opening = np.arange(len(items)), np.ones(len(items), bool)
    first = reader.read(prompts, watched, done)
    found = first
    for step in range(max_output):
        if step:
            found = reader.read([[*prompts[place], *outputs[place]] for place in going.tolist()], watched)
        seconds[going] += found.seconds
        if step < len(tokens):
            # Whoever has left the opening is judged by what it was up to there.
            rows = opening[going]
            places = going[rows]
            logprobs[places, step] = _grouped(found.logprobs[rows], tokens)[:, step]
            judged[places] += 1
            opening[places] = np.isin(found.likeliest[rows], tokens[step])
        for place, token in zip(going, found.likeliest.tolist(), strict=True):
            outputs[place].append(token)
        going = np.array([place for place in going if outputs[place][-1] not in ends], int)
        if not len(going):
            break
    texts = [tokenizer.decode([token for token in output if token not in ends]) for output in outputs]
    given = [answer_of(text) for text in texts]
    lengths = [len(output) for output in outputs]
    return _Answers(given, first, logprobs, lengths, judged.tolist(), seconds)


def _p_true(
    reader: Reader, tokenizer: Tokenizer, name: str, items: Sequence[Item], given: Sequence[str], form: Form
) -> tuple[np.ndarray, np.ndarray]:
    """P(True) of what was given, between the letters of true and false, and the tokens of the passes.

    Raises:
      ValueError: items without choices.
    """
    if not items[0].choices:
        raise ValueError("P(True) is asked of questions with choices")
    prompts = [
        p_true_prompt(tokenizer, item, LETTERS.index(letter), form) for item, letter in zip(items, given, strict=True)
    ]
    tokens = confidence_of(ConfidenceSpec(letters=tuple(LETTERS[:2])), tokenizer, name).tokens
    logprobs = reader.read(prompts, [token for letter in tokens for token in letter]).logprobs
    shares = letter_probabilities(_grouped(logprobs, tokens), "choices")
    return shares[:, 0], np.array([len(prompt) for prompt in prompts])


def _right(item: Item) -> str:
    if isinstance(item.answer, str):
        return item.answer
    return "" if item.answer is None else LETTERS[item.answer]


def _is_right(item: Item, given: str) -> bool:
    if isinstance(item.answer, str):
        return same_answer(given, item.answer)
    return item.answer is not None and given == LETTERS[item.answer]


def _grouped(logprobs: np.ndarray, tokens: Sequence[Sequence[int]]) -> np.ndarray:
    """`[N, watched]` as `[N, places, variants]`, with -inf where a place has fewer variants."""
    grouped = np.full((len(logprobs), len(tokens), max(map(len, tokens))), -np.inf, np.float32)
    begin = 0
    for place, variants in enumerate(tokens):
        grouped[:, place, : len(variants)] = logprobs[:, begin : begin + len(variants)]
        begin += len(variants)
    return grouped


def _batches(
    prompts: Sequence[Sequence[int]], batch: int
) -> Iterator[tuple[list[int], Int32[np.ndarray, "B L"], Int32[np.ndarray, " B"]]]:
    """Places of prompts of like length, their tokens padded on the right, and their lengths; both sizes are powers of
    two, rows beyond the prompts are of one token."""
    buckets: dict[int, list[int]] = {}
    for place, prompt in enumerate(prompts):
        buckets.setdefault(max(_LEAST_LENGTH, _power_of_two(len(prompt))), []).append(place)
    for length, places in sorted(buckets.items()):
        for begin in range(0, len(places), batch):
            chosen = places[begin : begin + batch]
            rows = min(batch, _power_of_two(len(chosen)))
            tokens, lengths = np.zeros((rows, length), np.int32), np.ones(rows, np.int32)
            for row, place in enumerate(chosen):
                tokens[row, : len(prompts[place])] = prompts[place]
                lengths[row] = len(prompts[place])
            yield chosen, tokens, lengths


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


@partial(jax.jit, static_argnums=(0, 2))
def _read(
    graphdef: Any,
    state: Any,
    tap: int,
    tokens: Int32[Array, "B L"],
    lengths: Int32[Array, " B"],
    watched: Int32[Array, " W"],
) -> Read:
    model: Decoder = nnx.merge(graphdef, state)
    batch, length = tokens.shape
    attend = dense_attend(batch, length, model.config.layer_windows)
    positions, rows = jnp.tile(jnp.arange(length), batch), jnp.arange(batch) * length + lengths - 1
    tapped, _ = model.run(range(tap), model.embed(tokens.reshape(-1)), positions, attend, None)
    x, _ = model.run(range(tap, model.config.num_layers), tapped, positions, attend, None)
    logprobs = jax.nn.log_softmax(model.head(x[rows]), axis=-1)
    likeliest = jnp.argmax(logprobs, axis=-1).astype(jnp.int32)
    return Read(tapped[rows].astype(jnp.float32), logprobs[:, watched], likeliest)
