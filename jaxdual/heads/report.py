"""What was detected, as data and as a table for people."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from jaxdual.heads.detection import SCORES, Detection, Score


def figures(detection: Detection, rank_by: Score, top: int, seed: int) -> dict[str, Any]:
    """Scores, the best heads, and how far they are to be trusted.

    Args:
      detection: of all items.
      rank_by: the score that heads are ranked by.
      top: how many are the best ones.
      seed: of random heads.
    """
    means = {score: detection.mean(score) for score in SCORES}
    tops = [set(detection.ranking(score)[:top]) for score in SCORES]
    return {
        "rank_by": rank_by,
        "heads": [
            {"layer": layer, "head": head, **{score: float(means[score][layer, head]) for score in SCORES}}
            for layer, head in detection.ranking(rank_by)[:top]
        ],
        "top_of_both_scores": len(tops[0] & tops[1]),
        "stability": {score: dataclasses.asdict(detection.stability(score, top, seed)) for score in SCORES},
        "scores": {score: means[score].tolist() for score in SCORES},
    }


def format_report(report: Mapping[str, Any]) -> str:
    """The report of `python -m jaxdual.heads detect`."""
    return "\n".join([*_heading(report), "", *_heads(report), "", *_stability(report)])


def _heading(report: Mapping[str, Any]) -> Iterator[str]:
    items, scored = report["items"], len(report["scores"]["sum"])
    part = "all" if scored == report["num_layers"] else f"the first {scored}"
    yield f"model  {report['model']}: {report['num_layers']} layers of {report['num_heads']} heads, {part} scored"
    yield (
        f"items  {items['source']}: {items['count']}, of {_range(items['documents'])} documents and "
        f"{_range(items['tokens'])} tokens"
    )


def _range(ends: Mapping[str, int]) -> str:
    return str(ends["min"]) if ends["min"] == ends["max"] else f"{ends['min']} to {ends['max']}"


def _heads(report: Mapping[str, Any]) -> Iterator[str]:
    yield f"rank  layer  head  {'sum':>9}  ndcg@10"
    for rank, one in enumerate(report["heads"], 1):
        yield f"{rank:>4}  {one['layer']:>5}  {one['head']:>4}  {one['sum']:>9.5f}  {one['ndcg10']:>7.4f}"


def _stability(report: Mapping[str, Any]) -> Iterator[str]:
    top = len(report["heads"])
    yield f"top by both scores  {report['top_of_both_scores']} of {top}"
    for score, one in report["stability"].items():
        if one["overlap"] is None:
            halves = "one item has no halves"
        else:
            halves = f"halves share {one['overlap']} of {top}, and score {one['held_out']:.5f} on each other"
        yield (
            f"{score:<18}  top {one['top']:.5f}; {halves}; random heads {one['random_mean']:.5f}, "
            f"at best {one['random_best']:.5f}"
        )
