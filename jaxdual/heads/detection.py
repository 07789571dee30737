"""Detection of query-focused retrieval heads (QRHead, arXiv 2506.09944): those that look at what answers a question."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from jaxdual.heads.attention import span_attention
from jaxdual.heads.prompts import ItemPrompts
from jaxdual.heads.scores import document_scores, gold_sum, ndcg10
from models import Decoder

type Score = Literal["sum", "ndcg10"]
SCORES: tuple[Score, ...] = ("sum", "ndcg10")
_DRAWS = 100  # of random heads


@dataclass(frozen=True, slots=True)
class Stability:
    """How far a ranking is to be trusted.

    Attributes:
      overlap: top heads that both halves of the items (even and odd ones) have.
      held_out: mean score, over one half, of the heads that are top by the other half; the mean of both ways.
      top: mean score of the top heads, over all items.
      random_mean, random_best: of 100 draws of as many heads at random, the mean and the highest mean score.
    """

    overlap: int | None
    held_out: float | None
    top: float
    random_mean: float
    random_best: float


@dataclass(frozen=True, slots=True)
class Detection:
    """Scores of heads for each item.

    Attributes:
      scores: by kind of score, `[items, layers, heads]` float64: the calibrated attention to the documents that answer
        ("sum"), and nDCG@10 of all documents in the head's order ("ndcg10").
    """

    scores: Mapping[Score, np.ndarray]

    def mean(self, score: Score) -> np.ndarray:
        """`[layers, heads]`: of all items."""
        mean: np.ndarray = self.scores[score].mean(axis=0)
        return mean

    def ranking(self, score: Score) -> list[tuple[int, int]]:
        """All (layer, head), best first; of equal ones, the first ones first."""
        return ranked(self.mean(score))

    def stability(self, score: Score, top: int, seed: int) -> Stability:
        """Of the `top` best heads; `seed` is that of the random ones. Halves need two items."""
        scores, mean = self.scores[score], self.mean(score)
        halves = [scores[0::2].mean(axis=0), scores[1::2].mean(axis=0)] if len(scores) > 1 else []
        tops = [ranked(half)[:top] for half in halves]
        rng = np.random.default_rng(seed)
        draws = [rng.choice(mean.reshape(-1), top, replace=False).mean() for _ in range(_DRAWS)]
        return Stability(
            overlap=len(set(tops[0]) & set(tops[1])) if halves else None,
            held_out=(_mean_of(halves[1], tops[0]) + _mean_of(halves[0], tops[1])) / 2 if halves else None,
            top=_mean_of(mean, ranked(mean)[:top]),
            random_mean=float(np.mean(draws)),
            random_best=float(np.max(draws)),
        )


def ranked(scores: np.ndarray) -> list[tuple[int, int]]:
    """(layer, head) of scores `[layers, heads]`, highest first; of equal ones, the first ones first."""
    order = np.argsort(-scores.reshape(-1), kind="stable")
    return [(int(place) // scores.shape[1], int(place) % scores.shape[1]) for place in order]


def detect(
    model: Decoder, prompts: Sequence[ItemPrompts], layers: int, done: Callable[[], object] = lambda: None
) -> Detection:
    """Scores the heads of the first `layers` layers; `done` is called after each item.

    Raises:
      ValueError: attention that is not finite.
    """
    rows: dict[Score, list[list[np.ndarray]]] = {score: [] for score in SCORES}
    for item in prompts:
        scores = item_document_scores(model, item, layers)
        rows["sum"].append([gold_sum(of_layer, item.gold) for of_layer in scores])
        rows["ndcg10"].append([ndcg10(of_layer, item.gold) for of_layer in scores])
        done()
    return Detection({score: np.array(values) for score, values in rows.items()})


def item_document_scores(model: Decoder, item: ItemPrompts, layers: int) -> list[np.ndarray]:
    """`[heads, documents]` of each of the first `layers` layers; see `document_scores`, and `detect` for errors."""
    spans = item.tokens, item.query_start, item.null_tokens, item.null_query_start
    scores = []
    for layer, (asked, unasked) in enumerate(span_attention(model, *spans, layers)):
        if not (np.isfinite(asked).all() and np.isfinite(unasked).all()):
            dtype = model.embedding[...].dtype.name
            raise ValueError(f"item {item.id!r}: attention of layer {layer} is not finite, computed in {dtype}")
        scores.append(document_scores(asked, unasked, item.documents))
    return scores


def _mean_of(scores: np.ndarray, heads: Sequence[tuple[int, int]]) -> float:
    return float(np.mean([scores[head] for head in heads]))
