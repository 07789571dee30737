"""Scores of documents and heads (arXiv 2506.09944, and its authors' code)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_OUTLIERS = 2.0  # standard deviations below the mean
_RANKS = 10


def document_scores(
    attention: np.ndarray, null_attention: np.ndarray, documents: Sequence[tuple[int, int]]
) -> np.ndarray:
    """What heads make of documents: attention beyond that of the null query, summed over their tokens.

    Of each document, tokens at or below its mean - 2 standard deviations (of a sample) are left out.

    Args:
      attention: `[heads, tokens]`, mean over the query's rows.
      null_attention: `[heads, tokens]` likewise; of the two, what both have counts.
      documents: first token of each, and the one behind its last.

    Returns:
      `[heads, documents]` float64.
    """
    common = min(attention.shape[1], null_attention.shape[1])
    calibrated = attention[:, :common].astype(np.float64) - null_attention[:, :common]
    scores = np.empty((len(attention), len(documents)))
    for place, (begin, end) in enumerate(documents):
        inside = calibrated[:, begin:end]
        kept = np.ones(inside.shape, bool)
        if inside.shape[1] > 1:  # one token has no deviation
            lowest = inside.mean(axis=1) - _OUTLIERS * inside.std(axis=1, ddof=1)
            kept = inside > lowest[:, None]
        scores[:, place] = np.where(kept, inside, 0).sum(axis=1)
    return scores


def gold_sum(scores: np.ndarray, gold: Sequence[int]) -> np.ndarray:
    """`[heads]`: scores `[heads, documents]` of the documents that answer, summed."""
    total: np.ndarray = scores[:, list(gold)].sum(axis=1)
    return total


def ndcg10(scores: np.ndarray, gold: Sequence[int]) -> np.ndarray:
    """`[heads]`: nDCG@10, with gains of 0 and 1, of the documents in the order of each head's scores.

    Equal scores rank in the order of the documents.
    """
    gains = np.zeros(scores.shape[1])
    gains[list(gold)] = 1
    order = np.argsort(-scores, axis=1, kind="stable")[:, :_RANKS]
    discounts = 1 / np.log2(np.arange(2, order.shape[1] + 2))
    best = discounts[: len(gold)].sum()
    found: np.ndarray = (gains[order] * discounts).sum(axis=1) / best
    return found
