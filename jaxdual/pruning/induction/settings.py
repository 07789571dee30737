"""How scales are learned."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

type Mode = Literal["score", "fold"]
type Start = Literal["ones", "rms", "paper"]
type Regularizer = Literal["none", "paper", "stable_rank"]

MODES, STARTS, REGULARIZERS = (get_args(kind.__value__) for kind in (Mode, Start, Regularizer))

# Bounds of a scale: a fold changes how both partners are rounded.
MOST = 32.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Induction:
    """Settings of Sparsity Induction.

    Attributes:
      mode: "score": scales count in the scores of weights alone (equation 11 of the paper); "fold": they go into the
        weights, whose function stays the same (equation 3).
      start: scales at first: "ones"; "rms": root of the inputs' root mean squares, half-way from magnitudes to Wanda;
        "paper": squares of median less mean (equation 5), within 1/8 and 8. None is "rms" for magnitudes, else "ones".
      regularizer: "paper": `exp(-alpha sum ||W s||_2)` (equation 8); "stable_rank": mean of
        `||W s||_F^2 / ||W s||_2^2 / min(outputs, inputs)`.
      weight: of the regularizer beside the error of the layer's output.
      epochs: passes over the calibration text.
      rate: of Adam, falling to zero by a cosine.
      temperature: of the soft step of masks.
      batch: windows of text in a step.

    Raises:
      ValueError: a field outside its range.
    """

    mode: Mode = "score"
    start: Start | None = None
    regularizer: Regularizer = "none"
    weight: float = 1.0
    epochs: int = 3
    rate: float = 5e-3
    temperature: float = 0.03
    batch: int = 1

    def __post_init__(self) -> None:
        for name, known in (("mode", MODES), ("start", (None, *STARTS)), ("regularizer", REGULARIZERS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; known: {', '.join(map(str, known))}")
        for name in ("weight", "rate", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be a positive number")
        for name in ("epochs", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
