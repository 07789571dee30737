"""Weights unpacked by selections alone, plane by plane for few rows, and dense products."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt16

from pallas_kernels.sparse_matmul.packing import WORD, in_order

MAX_PLANE_ROWS = 64  # of x for products plane by plane: numbers in their order cost more than small products


def sparse_matmul(
    x: Float[Array, "M K"], values: Float[Array, "V N G"], mask: UInt16[Array, "N G"], *, of: int
) -> Float[Array, "M N"]:
    """One product of the weights in order if there are many rows, else one a plane; see `api.sparse_matmul`."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    made = planes(values, mask, of)
    if x.shape[0] > MAX_PLANE_ROWS:
        return jnp.dot(x, in_order(jnp.stack(made)), precision=precision)
    of_plane = x.reshape(x.shape[0], -1, WORD)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    out = jnp.zeros((x.shape[0], mask.shape[0]), wide)
    for place, plane in enumerate(made):
        out += jnp.einsum("mg,ng->mn", of_plane[:, :, place], plane, precision=precision, preferred_element_type=wide)
    return out.astype(x.dtype)


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
            later = [*waiting[1:], waiting[-1]]
            waiting = [jnp.where(there, after, now) for now, after in zip(waiting, later, strict=True)]
            waiting = waiting[: of - place - 1]
    return found
