"""A bias of the attention scores that is the same for some keys of a sequence and zero for the others."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, UInt32

from pallas_kernels.checks import check_array

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

    def at(self, keys: Array) -> Float32[Array, "batch keys"]:
        """The bias of the keys at positions `keys`, `[keys]`; those past the last word get that of some other key."""
        words = jnp.take(self.bits, keys // WORD, axis=1, mode="clip")
        bit = (words >> (keys % WORD).astype(jnp.uint32)) & 1
        return jnp.where(bit == 1, self.value[:, None], 0)


def check_key_bias(key_bias: Any, batch: int, keys: int) -> None:
    """Raises `ValueError` unless it is None, or has a bit for each of `keys` keys of `batch` sequences."""
    if key_bias is None:
        return
    if not isinstance(key_bias, KeyBias):
        raise ValueError(f"key_bias must be a KeyBias or None, not a {type(key_bias).__name__}")
    check_array("key_bias.bits", key_bias.bits, jnp.uint32, (batch, -(-keys // WORD)))
    check_array("key_bias.value", key_bias.value, jnp.float32, (batch,))


def pack(selected: Bool[Array, "batch keys"]) -> UInt32[Array, "batch words"]:
    """Bits of the selected keys.

    Raises:
      ValueError: anything but booleans, one a key.
    """
    check_array("selected", selected, jnp.bool_, ("batch", "keys"))
    batch, keys = selected.shape
    padded = jnp.pad(selected, ((0, 0), (0, -keys % WORD))).reshape(batch, -1, WORD)
    return jnp.sum(padded.astype(jnp.uint32) << jnp.arange(WORD, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)
