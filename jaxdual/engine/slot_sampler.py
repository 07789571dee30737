"""Sampling for the sequences of an engine: a slot each, whose state lies on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np

from jaxdual.engine import sampler
from jaxdual.engine.dysco_slots import SlotDysco
from jaxdual.engine.request import TokenLogprobs
from jaxdual.engine.sampler import Logprobs, SlotSampling
from jaxdual.engine.steps import Programs

_SCORE_TOKENS = 128  # scored by one program: waste at the end costs less than another program to compile


@dataclass(frozen=True, slots=True)
class SlotBinding:
    """A sequence that runs from a step on: which one, where, how it is sampled, the tokens that penalties look at, and
    how it is decoded, if not as usual.
    """

    seq_id: int
    rank: int
    slot: int
    sampling: SlotSampling
    prompt: Sequence[int]
    output: Sequence[int]
    dysco: SlotDysco | None = None


@dataclass(frozen=True, slots=True)
class SampleRow:
    """A row of the residual stream that gives a token.

    Attributes:
      index: of the row.
      seq_id, rank, slot: its sequence.
      output_index: number of the output token, from 0.
    """

    index: int
    seq_id: int
    rank: int
    slot: int
    output_index: int


@dataclass(slots=True)  # not frozen: one is made for every token
class Sampled:
    """A token that a step gave a sequence, with the log-probabilities of the tokens that are watched there."""

    seq_id: int
    token: int
    logprobs: TokenLogprobs | None
    watched: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class SampleBatch:
    """Tokens under way; `watched` says how many tokens are watched beside each row."""

    rows: tuple[SampleRow, ...]
    tokens: jax.Array
    logprobs: Logprobs | None
    watched: tuple[int, ...]

    def fetch(self) -> Iterator[Sampled]:
        """Waits for the device, and brings the tokens to the host."""
        tokens = np.asarray(self.tokens)
        logprobs = None if self.logprobs is None else Logprobs(*map(np.asarray, self.logprobs))
        for row, count in zip(self.rows, self.watched, strict=True):
            if logprobs is None:
                yield Sampled(row.seq_id, int(tokens[row.index]), None)
                continue
            watched = tuple(logprobs.watched[row.index, :count].tolist()) if count else ()
            yield Sampled(row.seq_id, int(tokens[row.index]), _logprobs_at(logprobs, row.index), watched)


class SlotSampler:
    """Owns the per-sequence sampler state.

    Args:
      programs: of the model.
      max_num_seqs: slots of a rank; one more, `padding_slot`, is padding's.
      vocab_size: of the model.
      ranks: that have slots.
    """

    def __init__(self, programs: Programs, max_num_seqs: int, vocab_size: int, ranks: int = 1) -> None:
        self.padding_slot = max_num_seqs
        self._programs, self._vocab_size, self._ranks = programs, vocab_size, ranks
        slots = ranks * (max_num_seqs + 1)
        self._state = sampler.new_state(slots, vocab_size, programs.slot_sharding)
        self._sampling: dict[tuple[int, int], SlotSampling] = {}

    @property
    def last_token(self) -> jax.Array:
        """`[slots]` int32: the newest sampled token of each."""
        last: jax.Array = self._state.last_token
        return last

    def bind(self, binding: SlotBinding) -> None:
        """Gives a slot to a sequence."""
        params = binding.sampling.params
        self._sampling[binding.rank, binding.slot] = binding.sampling
        if not (params.has_penalties or params.logit_bias):
            return
        in_prompt = np.zeros(self._vocab_size, bool)
        in_prompt[list(binding.prompt)] = True
        bias = np.zeros(self._vocab_size, np.float32)
        for token, value in (params.logit_bias or {}).items():
            bias[token] = value
        counts = np.bincount(np.asarray(binding.output, np.int64), minlength=self._vocab_size).astype(np.int32)
        self._run_set_slot(binding.rank * (self.padding_slot + 1) + binding.slot, counts, in_prompt, bias)

    def sample(self, x: jax.Array, rows: Sequence[SampleRow]) -> SampleBatch:
        """Starts to sample rows of the residual stream `x`, `[rows, hidden]`."""
        packed: list[tuple[int, int, SlotSampling] | None] = [None] * x.shape[0]
        watched = []
        for row in rows:
            sampling = self._sampling[row.rank, row.slot]
            packed[row.index] = (row.slot, row.output_index, sampling)
            watched.append(len(sampling.watched_at(row.output_index)))
        inputs = sampler.pack(packed, self.padding_slot, self._vocab_size)
        tokens, logprobs = self._run_sample(x, inputs)
        return SampleBatch(tuple(rows), tokens, logprobs if inputs.wants_logprobs.any() else None, tuple(watched))

    def score(self, x: jax.Array, first: int, targets: Sequence[int]) -> tuple[TokenLogprobs, ...]:
        """Log-probabilities of `targets` at as many rows of the residual stream `x`, from row `first` on; waits for
        them.
        """
        rows: np.ndarray = self._programs.on_host(x)[first : first + len(targets)]
        scores: list[TokenLogprobs] = []
        for start in range(0, len(targets), _SCORE_TOKENS):
            part = rows[start : start + _SCORE_TOKENS]
            padded = np.zeros((_SCORE_TOKENS, rows.shape[1]), rows.dtype)
            padded[: len(part)] = part
            tokens = np.zeros(_SCORE_TOKENS, np.int32)
            tokens[: len(part)] = targets[start : start + _SCORE_TOKENS]
            logprobs = self._run_score(padded, tokens)
            scores += [_logprobs_at(logprobs, row) for row in range(len(part))]
        return tuple(scores)

    def warm_ups(
        self, hidden: Callable[[int], jax.Array], sizes: Sequence[int]
    ) -> Iterator[tuple[str, Callable[[], object]]]:
        """Name and call of every program in every shape, all on padding.

        Args:
          hidden: a residual stream of so many rows a rank, asked for by the calls.
          sizes: rows a rank of the streams that are sampled.
        """

        def sample(rows: int) -> object:
            empty = [None] * (self._ranks * rows)
            return self._run_sample(hidden(rows), sampler.pack(empty, self.padding_slot, self._vocab_size))

        def score() -> object:
            x = hidden(sizes[0])
            return self._run_score(np.zeros((_SCORE_TOKENS, x.shape[1]), x.dtype), np.zeros(_SCORE_TOKENS, np.int32))

        def set_slot() -> object:
            row = np.zeros(self._vocab_size, np.int32)
            self._run_set_slot(self.padding_slot, row, row.astype(bool), row.astype(np.float32))
            return self._state

        for rows in sizes:
            yield f"sample rows={rows}", partial(sample, rows)
        yield f"score tokens={_SCORE_TOKENS}", score
        yield "set slot", set_slot

    # Programs: each is called in one place, so that warm-up and steps can't differ.

    def _run_sample(self, x: jax.Array, inputs: sampler.SampleInputs) -> tuple[jax.Array, Logprobs]:
        self._state, tokens, logprobs = self._programs.sample(self._programs.leaves, x, self._state, inputs)
        return tokens, logprobs

    def _run_score(self, x: np.ndarray, tokens: np.ndarray) -> Logprobs:
        return Logprobs(*map(np.asarray, self._programs.score(self._programs.leaves, x, tokens)))

    def _run_set_slot(self, slot: int, counts: np.ndarray, in_prompt: np.ndarray, bias: np.ndarray) -> None:
        self._state = self._programs.set_slot(self._state, np.int32(slot), counts, in_prompt, bias)


def _logprobs_at(logprobs: Logprobs, row: int) -> TokenLogprobs:
    return TokenLogprobs(
        chosen=float(logprobs.chosen[row]),
        rank=int(logprobs.rank[row]),
        top=tuple(zip(logprobs.top_tokens[row].tolist(), logprobs.top[row].tolist(), strict=True)),
    )
