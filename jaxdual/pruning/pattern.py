"""Which weights of a matrix may go: a share of them or of square blocks, or all but N of M neighbouring inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# What weights are compared within, where a share of them goes: those of one output, or all of a matrix.
type Scope = Literal["row", "matrix"]


@dataclass(frozen=True, slots=True)
class Pattern:
    """A share of the weights or of blocks of them, or N of M.

    Attributes:
      share: of the weights that go, above 0 and below 1; None for N of M.
      keep, of: of every `of` neighbouring inputs of an output, `keep` stay.
      block: the share is of blocks of so many outputs by as many inputs, the same number for each `block` outputs; 0
        for single weights.
    """

    share: float | None = None
    keep: int = 0
    of: int = 0
    block: int = 0

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """A pattern as it is written on a command line: "0.5", "2:4", "4:8", "0.5@64" for blocks of 64 by 64.

        Raises:
          ValueError: anything else.
        """
        keep, colon, of = text.partition(":")
        share, at, block = text.partition("@")
        try:
            if colon:
                if 0 < int(keep) < int(of):
                    return cls(keep=int(keep), of=int(of))
            elif at:
                if 0 < float(share) < 1 and int(block) > 0:
                    return cls(share=float(share), block=int(block))
            elif 0 < float(text) < 1:
                return cls(share=float(text))
        except ValueError:
            pass
        raise ValueError(
            f"pattern {text!r} must be a share between 0 and 1, or N:M with 0 < N < M, or a share@size for blocks"
        )

    def __str__(self) -> str:
        if self.share is None:
            return f"{self.keep}:{self.of}"
        return f"{self.share:g}@{self.block}" if self.block else f"{self.share:g}"

    def check(self, name: str, inputs: int, outputs: int | None = None) -> None:
        """Raises `ValueError` if a matrix of so many inputs, and outputs if they are given, can't be pruned so."""
        for count, what in ((inputs, "inputs"), (outputs, "outputs")):
            if self.block and count is not None and count % self.block:
                raise ValueError(f"pattern {self}: {name} has {count} {what}, which are no multiple of {self.block}")
        if self.share is None and inputs % self.of:
            raise ValueError(f"pattern {self}: {name} has {inputs} inputs, which are no multiple of {self.of}")

    def removed(self, outputs: int, inputs: int, scope: Scope) -> int:
        """Weights that go from a matrix."""
        if self.share is None:
            return outputs * inputs // self.of * (self.of - self.keep)
        if self.block:
            return outputs * self._blocks_removed(inputs) * self.block
        return outputs * int(inputs * self.share) if scope == "row" else int(outputs * inputs * self.share)

    def kept(self, score: Float[Array, "outputs inputs"], scope: Scope) -> Bool[Array, "outputs inputs"]:
        """Which weights stay: those of the highest scores; of equal ones the later.

        A block's score is the sum of the squares of its weights', and it is compared with those of the same outputs,
        whatever the scope.
        """
        outputs, inputs = score.shape
        if self.share is None:
            groups = score.reshape(outputs, inputs // self.of, self.of)
            return _kept(groups, self.of - self.keep).reshape(score.shape)
        if self.block:
            self.check("the matrix", inputs, outputs)
            blocks = score.reshape(outputs // self.block, self.block, inputs // self.block, self.block)
            stay = _kept(jnp.sum(blocks**2, axis=(1, 3)), self._blocks_removed(inputs))
            return jnp.broadcast_to(stay[:, None, :, None], blocks.shape).reshape(score.shape)
        if scope == "row":
            return _kept(score, int(inputs * self.share))
        return _kept(score.reshape(-1), int(score.size * self.share)).reshape(score.shape)

    def _blocks_removed(self, inputs: int) -> int:
        """Of each block of outputs."""
        assert self.share is not None
        return int(inputs // self.block * self.share)


def _kept(score: Float[Array, "*rows n"], removed: int) -> Bool[Array, "*rows n"]:
    order = jnp.argsort(score, axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1, stable=True)
    return rank >= removed
