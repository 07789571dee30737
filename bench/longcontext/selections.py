"""What DySCO has selected, in figures."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from jaxdual import SelectionStep


def selection_figures(
    replies: Sequence[tuple[Sequence[SelectionStep], Collection[int]]], top_k: int | None, top_p: float | None
) -> dict[str, Any]:
    """Means over the steps of some replies.

    "size": tokens that were selected. "relevance": part of the relevance that lies on them. "limited": part of the
    steps in which `top_k` and not `top_p` ended the selection. "jaccard": tokens in common with the step before, by
    those in either. "gold": part of the tokens of the lines that answer that was selected.

    Args:
      replies: steps of each, and positions of the lines that answer, where the task has lines.
      top_k, top_p: the limits; None for none.
    """
    sizes: list[int] = []
    covered: list[float] = []
    limited: list[bool] = []
    jaccard: list[float] = []
    gold: list[float] = []
    for steps, wanted in replies:
        before: set[int] | None = None
        for step in steps:
            now = set(step.selected)
            total = float(step.relevance.sum())
            mass = float(step.relevance[step.selected].sum()) / total if total else 0.0
            sizes.append(len(now))
            covered.append(mass)
            limited.append(len(now) == top_k and (top_p is None or mass < top_p))
            if before is not None:
                jaccard.append(len(now & before) / max(1, len(now | before)))
            if wanted:
                gold.append(len(now.intersection(wanted)) / len(wanted))
            before = now
    named = {"size": sizes, "relevance": covered, "limited": limited, "jaccard": jaccard, "gold": gold}
    return {"steps": len(sizes), **{name: float(np.mean(of)) if of else None for name, of in named.items()}}
