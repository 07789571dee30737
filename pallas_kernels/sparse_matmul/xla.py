"""Weights unpacked by selections alone, which XLA fuses into one pass, and a dense product."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt16

from pallas_kernels.sparse_matmul.packing import WORD, in_order


def sparse_matmul(
    x: Float[Array, "M K"], values: Float[Array, "V N G"], mask: UInt16[Array, "N G"], *, of: int
) -> Float[Array, "M N"]:
    """Takes the memory of the dense weights while it runs; see `api.sparse_matmul`."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.dot(x, in_order(jnp.stack(planes(values, mask, of))), precision=precision)


def planes(values: Float[Array, "V N G"], mask: UInt16[Array, "N G"], of: int) -> list[Float[Array, "N G"]]:
    """The 16 planes of the weights: each takes the first value of its group that no plane before it took."""
    keep = values.shape[0] * of // WORD
    found = []
    for first in range(0, WORD, of):
        waiting = [values[first // of * keep + i] for i in range(keep)]
        for place in range(of):
            there = (mask >> (first + place)) & 1 != 0
            found.append(jnp.where(there, waiting[0], 0))
            # As many as places are left; what stands behind the last value is never taken.
            waiting = [
                jnp.where(there, later, now) for now, later in zip(waiting, [*waiting[1:], waiting[-1]], strict=True)
            ][: of - place - 1]
    return found
