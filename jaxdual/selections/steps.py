"""What the steps of an output selected, as figures and in few bytes."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxdual.outputs import SelectionStep

LEVELS_PER_OCTAVE = 6
TOP_LEVEL = 127
SELECTED = 128


@dataclass(frozen=True, slots=True)
class StepFigures:
    """Of a step.

    Attributes:
      position: of its token.
      selected: how many tokens it selected.
      raised: how many are raised: those of them that no template has put there, and its own.
      mass: part of the relevance that the selected tokens have.
      likeness: Jaccard index of its selection and that of the step before; None for the first.
      most: the greatest relevance of a token.
    """

    position: int
    selected: int
    raised: int
    mass: float
    likeness: float | None
    most: float


def step_figures(steps: Sequence[SelectionStep], template: Sequence[bool]) -> list[StepFigures]:
    """Figures of all steps.

    Args:
      steps: of one output, in order.
      template: of each token of the prompt, whether it is never raised.
    """
    never = {position for position, is_template in enumerate(template) if is_template}
    out: list[StepFigures] = []
    before: set[int] | None = None
    for step in steps:
        chosen, total = set(step.selected), float(step.relevance.sum(dtype=np.float64))
        mass = float(step.relevance[step.selected].sum(dtype=np.float64))
        likeness = None
        if before is not None:
            either = len(before | chosen)
            likeness = len(before & chosen) / either if either else 1.0
        out.append(
            StepFigures(
                position=step.position,
                selected=len(chosen),
                raised=len((chosen - never) | {step.position}),
                mass=mass / total if total else 0.0,
                likeness=likeness,
                most=float(step.relevance.max()),
            )
        )
        before = chosen
    return out


def packed_levels(steps: Sequence[SelectionStep], tokens: int) -> str:
    """Relevance and selection of each token at each step, a byte each, compressed.

    The lower seven bits are 0 for no relevance, and else `TOP_LEVEL` for the greatest of the step, less
    `LEVELS_PER_OCTAVE` for each halving, 1 at least. `SELECTED` is added for a selected token.

    Args:
      steps: of one output.
      tokens: of prompt and output; a row is that long, and zero behind the token of the step.

    Returns:
      Base64 of a zlib stream of `[steps, tokens]` bytes.
    """
    levels = np.zeros((len(steps), tokens), np.uint8)
    for row, step in zip(levels, steps, strict=True):
        relevance = step.relevance.astype(np.float64)
        real = relevance > 0
        below = LEVELS_PER_OCTAVE * np.log2(relevance[real] / relevance.max(initial=0.0))
        row[: len(relevance)][real] = np.clip(TOP_LEVEL + np.rint(below), 1, TOP_LEVEL)
        row[step.selected] |= SELECTED
    return base64.b64encode(zlib.compress(levels.tobytes(), 9)).decode()
