"""Public function of the product with packed weights: checks and choice of implementation."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt16

from pallas_kernels import dispatch
from pallas_kernels.checks import check_array, show
from pallas_kernels.sparse_matmul import mosaic, reference, xla
from pallas_kernels.sparse_matmul.packing import WORD, check_pattern

_IMPLEMENTATIONS = {
    "mosaic": mosaic.sparse_matmul,
    "xla": xla.sparse_matmul,
    "reference": reference.sparse_matmul,
}


def sparse_matmul(
    x: Float[Array, "M K"],
    values: Float[Array, "V N G"],
    mask: UInt16[Array, "N G"],
    *,
    of: int,
    implementation: str = "auto",
) -> Float[Array, "M N"]:
    """`x @ weights` with weights that `pack` made.

    What is read of the weights is `keep / of` of their values and one bit each: 0.5625 of the bytes of dense ones in 16
    bits for 2:4 and 4:8. The operations are those of dense weights. So it is for decode, whose few rows wait for
    weights.

    Args:
      x: `[M, K]` rows.
      values: `[16 * keep / of, N, K / 16]` of the type of `x`.
      mask: `[N, K / 16]` uint16; see `packing.Packed`.
      of: M of the pattern N:M.
      implementation: "auto": the first of the following that can; "mosaic": a kernel for GPUs of compute capability 9.0
        (bfloat16 or float16, at most 64 rows, `K` a multiple of 256, `N` of 8; no gradient); "xla": unpacks and
        multiplies a sixteenth of the inputs at a time, or all at once if there are more than 64 rows; "reference":
        unpacks all weights, and multiplies.

    Returns:
      `[M, N]` of the type of `x`.

    Raises:
      ValueError: shapes or types that don't fit, a pattern that can't be packed, or an unknown implementation.
      NotImplementedError: the chosen implementation can't do these arguments, or there is none of that name.
    """
    check_array("x", x, jnp.floating, ("M", "K"))
    check_pattern(1, of, x.shape[1])
    check_array("mask", mask, jnp.uint16, ("N", x.shape[1] // WORD))
    check_array("values", values, x.dtype, ("V", *mask.shape))
    if values.shape[0] % (WORD // of) or not 0 < values.shape[0] < WORD:
        raise ValueError(f"values must have N * {WORD // of} planes for N of {of}, N below {of}: {show(values)}")
    return dispatch.run("sparse_matmul", _IMPLEMENTATIONS, implementation, x, values, mask, of=of)
