"""What was computed for a request, and what that costs: plain data, no JAX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Work:
    """Tokens that an engine has computed, prompt and output alike, those of preempted sequences each time.

    Attributes:
      lower: that went through the layers below the tap of the model's probe; through all layers where it has none.
      upper: that went through the layers above it; as many where there is no tap.
    """

    lower: int = 0
    upper: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.lower + other.lower, self.upper + other.upper)


@dataclass(frozen=True, slots=True)
class LayerSizes:
    """Parameters that a token meets, of a mixture of experts the chosen ones only; without embedding and output head.

    Attributes:
      lower, upper: of the layers below and above the tap; all of them in `lower` where there is none.
      layers: of the model.
      tap: layers below it; 0 where there is none.
    """

    lower: int = 0
    upper: int = 0
    layers: int = 0
    tap: int = 0

    @classmethod
    def of(cls, layers: Sequence[int], tap: int = 0) -> LayerSizes:
        """Of the parameters of each layer, parted at the tap."""
        below = tap or len(layers)
        return cls(sum(layers[:below]), sum(layers[below:]), len(layers), tap)

    @property
    def parameters(self) -> int:
        """N of the scaling laws: what a token meets in a whole pass."""
        return self.lower + self.upper

    def flops(self, work: Work) -> int:
        """2 N for each token (Kaplan et al. 2020), each part of the layers by the tokens that went through it."""
        return 2 * (self.lower * work.lower + self.upper * work.upper)
