"""How much prefill enters one forward: the compute quota of DualPath 6.2.

Engines of one expert-parallel group wait for each other between attention and experts, so the forward lasts as long as
the longest attention in the group. Batches are therefore cut at equal predicted attention time, not at equal tokens.

Times are of all layers of one forward. The paper leaves open whether its 300 ms are, but 300 ms a layer would be 18 s
for its model of 61 layers. Who reads it otherwise gives attention shapes of one layer, and profiles one layer.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

DEFAULT_QUOTA_SECONDS = 0.3  # DualPath A.4


class AttentionShape(Protocol):
    """Attention of a model, as far as its work depends on it. FLOPs are whole numbers of operations, all layers."""

    def flops(self, cached: int, bsz: int) -> int:
        """Work of `bsz` new tokens behind `cached` ones."""

    def token_flops(self, context: int) -> int:
        """Work of one new token that sees `context` tokens."""


@dataclass(frozen=True, slots=True)
class GroupedAttention:
    """Multi-head and grouped-query attention: `4 * heads * head_dim * (bsz * cached + bsz^2 / 2)` a layer.

    Attributes:
      layers: how many.
      heads: query heads; the number of key-value heads does not change the work.
      head_dim: of one head.
    """

    layers: int
    heads: int
    head_dim: int

    def flops(self, cached: int, bsz: int) -> int:
        return 2 * self.layers * self.heads * self.head_dim * bsz * (2 * cached + bsz)

    def token_flops(self, context: int) -> int:
        return 4 * self.layers * self.heads * self.head_dim * context


@dataclass(frozen=True, slots=True)
class SparseLatentAttention:
    """Latent attention over the tokens that an indexer picks, in its absorbed form (DeepSeek-V3.2).

    A layer takes `2 * indexer_heads * indexer_dim * (bsz * cached + bsz^2 / 2)` for the indexer, which sees all tokens,
    and `2 * heads * (key_dim + value_dim)` for each token attended to, at most `top_k` a query.

    Attributes:
      layers, heads: how many.
      key_dim, value_dim: of the latent cache entry: 512 + 64 and 512.
      indexer_heads, indexer_dim: of the indexer.
      top_k: tokens that a query attends to.
    """

    layers: int
    heads: int
    indexer_heads: int
    indexer_dim: int
    top_k: int
    key_dim: int = 576
    value_dim: int = 512

    def flops(self, cached: int, bsz: int) -> int:
        indexer = self.indexer_heads * self.indexer_dim * bsz * (2 * cached + bsz)
        # Query i of bsz, from 1, sees cached + i tokens; the first `short` of them see at most top_k.
        short = min(max(self.top_k - cached, 0), bsz)
        attended = short * cached + short * (short + 1) // 2 + (bsz - short) * self.top_k
        return self.layers * (indexer + 2 * self.heads * (self.key_dim + self.value_dim) * attended)

    def token_flops(self, context: int) -> int:
        indexer = 2 * self.indexer_heads * self.indexer_dim * context
        attention = 2 * self.heads * (self.key_dim + self.value_dim) * min(context, self.top_k)
        return self.layers * (indexer + attention)


@dataclass(frozen=True, slots=True)
class ProfileSample:
    """A measured batch: its attention FLOPs, number of items, and seconds of attention."""

    flops: int
    items: int
    seconds: float


@dataclass(frozen=True, slots=True)
class AttentionCost:
    """Predicted attention time of a batch: `base + per_flop * flops + per_item * items`.

    Attributes:
      shape: gives the FLOPs.
      base, per_item: seconds.
      per_flop: seconds an operation.

    Raises:
      ValueError: a coefficient is negative: time would fall where work grows.
    """

    shape: AttentionShape
    base: float
    per_flop: float
    per_item: float

    def __post_init__(self) -> None:
        if min(self.base, self.per_flop, self.per_item) < 0:
            raise ValueError(f"{self.base=}, {self.per_flop=} and {self.per_item=} must be at least 0")

    @classmethod
    def fit(cls, shape: AttentionShape, samples: Sequence[ProfileSample]) -> AttentionCost:
        """The coefficients of least squared error that are not negative.

        Args:
          shape: of the profiled model.
          samples: at least 3, that tell the three coefficients apart: FLOPs and items must not go together.

        Raises:
          ValueError: there are too few, or they don't.
        """
        if len(samples) < 3:
            raise ValueError(f"{len(samples)} samples are too few: 3 coefficients need at least 3")
        rows = np.array([[1.0, float(sample.flops), float(sample.items)] for sample in samples])
        seconds = np.array([sample.seconds for sample in samples])
        scale = np.abs(rows).max(axis=0)
        if not scale.all() or np.linalg.matrix_rank(rows / scale) < 3:
            raise ValueError("samples don't tell the coefficients apart: FLOPs and items must vary independently")
        coefficients = _least_squares(rows / scale, seconds) / scale
        return cls(shape, *map(float, coefficients))

    def seconds(self, flops: int, items: int) -> float:
        """Predicted attention time of a batch of `items` with these FLOPs together."""
        return self.base + self.per_flop * flops + self.per_item * items


def _least_squares(rows: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Least squares without negative coefficients: the best of the solutions in each subset of columns."""
    columns = range(rows.shape[1])
    best, least = np.zeros(rows.shape[1]), float(values @ values)
    for count in range(1, rows.shape[1] + 1):
        for subset in itertools.combinations(columns, count):
            found = np.zeros(rows.shape[1])
            found[list(subset)] = np.linalg.lstsq(rows[:, list(subset)], values, rcond=None)[0]
            error = rows @ found - values
            if found.min() >= 0 and float(error @ error) < least:
                best, least = found, float(error @ error)
    return best


@dataclass(frozen=True, slots=True)
class PrefillWork:
    """What is left of a prompt.

    Attributes:
      request_id: whose.
      cached: tokens whose KV is there already, from the store or an earlier forward.
      remaining: tokens to compute, at least 1.

    Raises:
      ValueError: a number is out of range.
    """

    request_id: int
    cached: int
    remaining: int

    def __post_init__(self) -> None:
        if self.cached < 0 or self.remaining < 1:
            raise ValueError(f"{self.cached=} must be at least 0 and {self.remaining=} at least 1")


@dataclass(frozen=True, slots=True)
class ChunkRules:
    """How prompts may be cut.

    Attributes:
      min_chunk: tokens that a piece cut from a prompt has at least; a piece costs more than its tokens, since under
        layerwise prefill the next one streams all earlier KV again.
      align: a piece ends at a multiple of this many tokens of the prompt, as with the block size; 1 for anywhere.
      max_tokens: tokens of a batch at most; None for no limit.

    Raises:
      ValueError: a number is below 1.
    """

    min_chunk: int = 1
    align: int = 1
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if min(self.min_chunk, self.align, 1 if self.max_tokens is None else self.max_tokens) < 1:
            raise ValueError(f"{self.min_chunk=}, {self.align=} and {self.max_tokens=} must be at least 1")


def pack(
    queue: Iterable[PrefillWork],
    quota_seconds: float,
    cost: AttentionCost,
    rules: ChunkRules = ChunkRules(),
) -> list[tuple[PrefillWork, int]]:
    """Fills one forward from the head of the queue (DualPath 6.2).

    Whole prompts are taken while the predicted attention time stays within the quota and the tokens within their limit.
    Of the first that doesn't fit, the longest piece that does is cut off, and nothing comes after it. A batch is never
    empty while anything waits: the first prompt gives at least a piece of the least size, whatever it takes; only the
    limit of tokens still holds, before alignment.

    Args:
      queue: first come first.
      quota_seconds: attention time of a forward, all layers.
      cost: predicts it.
      rules: how prompts may be cut.

    Returns:
      Each request of the batch with the tokens that it computes. The caller adds these to `cached` of the one that was
      cut, and leaves it at the head.
    """
    batch: list[tuple[PrefillWork, int]] = []
    flops = tokens = 0
    for work in queue:
        room = work.remaining if rules.max_tokens is None else rules.max_tokens - tokens
        whole = flops + cost.shape.flops(work.cached, work.remaining)
        if work.remaining <= room and cost.seconds(whole, len(batch) + 1) <= quota_seconds:
            batch.append((work, work.remaining))
            flops, tokens = whole, tokens + work.remaining
            continue
        pieces = _pieces(work, room, rules)
        fitting = _num_fitting(pieces, work, quota_seconds, cost, flops, len(batch) + 1)
        if fitting:
            batch.append((work, pieces[fitting - 1]))
        elif not batch:
            batch.append((work, pieces[0] if pieces else min(work.remaining, room)))
        break
    return batch


def _pieces(work: PrefillWork, room: int, rules: ChunkRules) -> range:
    """Lengths that may be cut off a prompt, shortest first; never all of it."""
    to_boundary = -(work.cached + rules.min_chunk) % rules.align
    return range(rules.min_chunk + to_boundary, min(work.remaining - 1, room) + 1, rules.align)


def _num_fitting(
    pieces: range, work: PrefillWork, quota_seconds: float, cost: AttentionCost, flops: int, items: int
) -> int:
    """How many of the lengths keep the batch within the quota: time grows with length, so these are the first ones."""
    return bisect.bisect_right(
        pieces, quota_seconds, key=lambda bsz: cost.seconds(flops + cost.shape.flops(work.cached, bsz), items)
    )
