"""A bias of the attention scores that is the same for some keys of a sequence and zero for the others."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, UInt32

WORD = 32  # keys of a word


class KeyBias(NamedTuple):
    """`value` is added to the scaled scores of the keys whose bit is set, for all heads and queries of the sequence.

    Attributes:
      bits: `[batch, words]`; bit `j % 32`, counted from the lowest, of word `j // 32` is that of the key at position j
        of the page table.
      value: `[batch]`, finite.
    """

    bits: UInt32[Array, "batch words"]
    value: Float32[Array, " batch"]

    def check(self, batch: int, keys: int) -> None:
        """Raises `ValueError` unless there is a bit for each of `keys` keys of `batch` sequences."""
        words = -(-keys // WORD)
        if self.bits.shape != (batch, words) or self.bits.dtype != jnp.uint32:
            raise ValueError(f"bits of the bias must be uint32[{batch}, {words}]: {_show(self.bits)}")
        if self.value.shape != (batch,) or self.value.dtype != jnp.float32:
            raise ValueError(f"values of the bias must be float32[{batch}]: {_show(self.value)}")

    def at(self, keys: Array) -> Float32[Array, "batch keys"]:
        """The bias of the keys at positions `keys`, `[keys]`; those past the last word get that of some other key."""
        words = jnp.take(self.bits, keys // WORD, axis=1, mode="clip")
        bit = (words >> (keys % WORD).astype(jnp.uint32)) & 1
        return jnp.where(bit == 1, self.value[:, None], 0)


def pack(selected: Bool[Array, "batch keys"]) -> UInt32[Array, "batch words"]:
    """Bits of the selected keys."""
    batch, keys = selected.shape
    padded = jnp.pad(selected, ((0, 0), (0, -keys % WORD))).reshape(batch, -1, WORD)
    return jnp.sum(padded.astype(jnp.uint32) << jnp.arange(WORD, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)


def _show(array: Array) -> str:
    return f"{array.dtype}{list(array.shape)}"
