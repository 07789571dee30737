"""Which weights of a matrix may go: a share of them, or all but N of every M neighbouring inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# What weights are compared within, where a share of them goes: those of one output, or all of a matrix.
type Scope = Literal["row", "matrix"]


@dataclass(frozen=True, slots=True)
class Pattern:
    """A share of the weights, or N of M.

    Attributes:
      share: of the weights that go, above 0 and below 1; None for N of M.
      keep, of: of every `of` neighbouring inputs of an output, `keep` stay.
    """

    share: float | None = None
    keep: int = 0
    of: int = 0

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """A pattern as it is written on a command line: "0.5", "2:4", "4:8".

        Raises:
          ValueError: anything else.
        """
        keep, colon, of = text.partition(":")
        try:
            if colon:
                if 0 < int(keep) < int(of):
                    return cls(keep=int(keep), of=int(of))
            elif 0 < float(text) < 1:
                return cls(share=float(text))
        except ValueError:
            pass
        raise ValueError(f"pattern {text!r} must be a share between 0 and 1, or N:M with 0 < N < M")

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}" if self.share is None else f"{self.share:g}"

    def check(self, name: str, inputs: int) -> None:
        """Raises `ValueError` if a matrix of so many inputs can't be pruned so."""
        if self.share is None and inputs % self.of:
            raise ValueError(f"pattern {self}: {name} has {inputs} inputs, which are no multiple of {self.of}")

    def removed(self, outputs: int, inputs: int, scope: Scope) -> int:
        """Weights that go from a matrix."""
        if self.share is None:
            return outputs * inputs // self.of * (self.of - self.keep)
        return outputs * int(inputs * self.share) if scope == "row" else int(outputs * inputs * self.share)

    def kept(self, score: Float[Array, "outputs inputs"], scope: Scope) -> Bool[Array, "outputs inputs"]:
        """Which weights stay: those of the highest scores; of equal ones the later."""
        outputs, inputs = score.shape
        if self.share is None:
            groups = score.reshape(outputs, inputs // self.of, self.of)
            return _kept(groups, self.of - self.keep).reshape(score.shape)
        if scope == "row":
            return _kept(score, int(inputs * self.share))
        return _kept(score.reshape(-1), int(score.size * self.share)).reshape(score.shape)


def _kept(score: Float[Array, "*rows n"], removed: int) -> Bool[Array, "*rows n"]:
    order = jnp.argsort(score, axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1, stable=True)
    return rank >= removed
