"""The form that weights of a pattern N:M are stored in: a bit for each weight, and the values that are there.

A word of 16 bits says of 16 neighbouring inputs of an output which are there. One form so covers 2:4 and 4:8, at the
same 9 bits a weight of 16; two positions of 2 bits for each group of 4, the usual form of 2:4, take the same 9 bits and
cover nothing else. Bits, and values by their place in the word, are planes `[outputs, inputs / 16]`: a kernel makes
plane p of the weights, those of the inputs `16 g + p`, number by number, without moving any across lanes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt16

WORD = 16  # inputs of a word of the mask


class Packed(NamedTuple):
    """Packed weights.

    Attributes:
      values: `[16 * keep / of, N, K / 16]`, of each word in the order of its inputs.
      mask: `[N, K / 16]` uint16; bit i of a word is input `16 g + i`. Of each `of` bits exactly `keep` are set.
    """

    values: Any
    mask: Any


def check_pattern(keep: int, of: int, inputs: int) -> None:
    """Raises `ValueError` if weights of so many inputs can't be packed so: 16 a multiple of M, and they of 16."""
    if of < 1 or WORD % of or not 0 < keep < of:
        raise ValueError(f"pattern {keep}:{of} can't be packed: M must be 2, 4, 8 or 16, and N from 1 to M - 1")
    if inputs % WORD:
        raise ValueError(f"{inputs} inputs can't be packed: they must be a multiple of {WORD}")


def pack(weights: Any, keep: int, of: int) -> Packed:
    """Packs weights on the host; where a group has fewer than `keep` values, zeros are stored among them.

    Args:
      weights: `[K, N]` of any floating-point type.
      keep, of: N and M of the pattern N:M, over neighbouring inputs of an output.

    Raises:
      ValueError: a pattern or a size that can't be packed, or a group with more than `keep` values.
    """
    dense = np.asarray(weights)
    if dense.ndim != 2:
        raise ValueError(f"weights must be [K, N]: {dense.dtype}{list(dense.shape)}")
    inputs, outputs = dense.shape
    check_pattern(keep, of, inputs)
    grouped = dense.reshape(inputs // of, of, outputs)
    there = grouped != 0
    counts = there.sum(axis=1)
    if (counts > keep).any():
        group, output = np.argwhere(counts > keep)[0]
        raise ValueError(
            f"weights don't follow {keep}:{of}: output {output} has {counts[group, output]} values among its inputs "
            f"{group * of} to {group * of + of - 1}"
        )
    # Those with values, then the first zeros, in the order of their inputs.
    places = np.sort(np.argsort(~there, axis=1, kind="stable")[:, :keep], axis=1)
    values = np.take_along_axis(grouped, places, axis=1)
    bits = (1 << places.astype(np.uint32)).sum(axis=1).reshape(-1, WORD // of, outputs)
    shifts = np.arange(0, WORD, of, dtype=np.uint32)[None, :, None]
    mask = (bits << shifts).sum(axis=1).astype(np.uint16)
    values = values.reshape(inputs // WORD, -1, outputs)
    return Packed(np.ascontiguousarray(values.transpose(1, 2, 0)), np.ascontiguousarray(mask.T))


def unpack(values: Float[Array, "V N G"], mask: UInt16[Array, "N G"], of: int) -> Float[Array, "K N"]:
    """The weights `[K, N]`, zeros where none are stored: `pack` undone, but for the sign of zeros.

    Args:
      values, mask: as `Packed` says.
      of: M of the pattern.
    """
    groups = WORD // of
    bits = (mask[None] >> jnp.arange(WORD, dtype=mask.dtype)[:, None, None]) & 1
    bits = bits.reshape(groups, of, *mask.shape).astype(jnp.int32)
    rank = jnp.maximum(jnp.cumsum(bits, axis=1) - 1, 0)
    stored = values.reshape(groups, values.shape[0] // groups, *mask.shape)
    weights = jnp.where(bits != 0, jnp.take_along_axis(stored, rank, axis=1), 0)
    return in_order(weights.reshape(WORD, *mask.shape))


def in_order(planes: Float[Array, "16 N G"]) -> Float[Array, "K N"]:
    """Weights `[K, N]` from their planes."""
    return jnp.transpose(planes, (2, 0, 1)).reshape(-1, planes.shape[1])


def packed_bytes(inputs: int, outputs: int, keep: int, of: int, dtype: Any) -> int:
    """Bytes of packed weights."""
    return inputs * outputs * keep // of * jax.dtypes.canonicalize_dtype(dtype).itemsize + inputs * outputs // 8
