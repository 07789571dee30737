"""Public functions of the grouped matrix product: checks and choice of implementation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import dispatch
from pallas_kernels.grouped_matmul import mosaic, reference, xla

_IMPLEMENTATIONS = {
    "mosaic": mosaic.grouped_matmul,
    "xla": xla.grouped_matmul,
    "reference": reference.grouped_matmul,
}
_GATED_IMPLEMENTATIONS = {
    "mosaic": mosaic.gated_grouped_matmul,
    "xla": xla.gated_grouped_matmul,
    "reference": reference.gated_grouped_matmul,
}


def grouped_matmul(
    lhs: Float[Array, "M K"],
    rhs: Float[Array, "E K N"],
    group_sizes: Int32[Array, " E"],
    *,
    implementation: str = "auto",
) -> Float[Array, "M N"]:
    """Multiplies each row by the matrix of its group.

    Args:
      lhs: `[M, K]` rows, sorted by group: the first `group_sizes[0]` rows are of group 0, and so on.
      rhs: `[E, K, N]`, one matrix a group; those of groups without rows are not looked at.
      group_sizes: `[E]` int32 rows per group, summing to at most `M`.
      implementation: "auto": the first of the following that can; "mosaic": persistent kernel for GPUs of compute
        capability 9.0 (bfloat16 or float16, `K` and `N` multiples of 16; no gradient); "xla": a loop over blocks of one
        group, of which only the filled ones run (no reverse-mode gradient); "reference": multiplies every row by every
        matrix and masks, `E` times the work and `E * M * K` values of memory, differentiable.

    Returns:
      `[M, N]`; rows from `sum(group_sizes)` on are zero.

    Raises:
      ValueError: shapes or types that don't fit, or an unknown implementation.
      NotImplementedError: the chosen implementation can't do these arguments.
    """
    _check(lhs, rhs, group_sizes)
    return dispatch.run("grouped_matmul", _IMPLEMENTATIONS, implementation, lhs, rhs, group_sizes)


def gated_grouped_matmul(
    lhs: Float[Array, "M K"],
    gate: Float[Array, "E K N"],
    up: Float[Array, "E K N"],
    group_sizes: Int32[Array, " E"],
    *,
    implementation: str = "auto",
) -> Float[Array, "M N"]:
    """`silu(lhs @ gate) * (lhs @ up)` with the matrices of each row's group: the first half of a gated MLP.

    Args:
      lhs, group_sizes: as of `grouped_matmul`.
      gate, up: `[E, K, N]`, one matrix each a group.
      implementation: as of `grouped_matmul`. "mosaic" rounds once, at the end; "xla" and "reference" round both
        products to the type of `lhs` and go on in that.

    Returns:
      `[M, N]`; rows from `sum(group_sizes)` on are zero.

    Raises:
      ValueError: shapes or types that don't fit, or an unknown implementation.
      NotImplementedError: the chosen implementation can't do these arguments.
    """
    _check(lhs, gate, group_sizes)
    if up.shape != gate.shape or up.dtype != gate.dtype:
        raise ValueError(f"gate {gate.dtype}{list(gate.shape)} and up {up.dtype}{list(up.shape)} must be alike")
    return dispatch.run("gated_grouped_matmul", _GATED_IMPLEMENTATIONS, implementation, lhs, gate, up, group_sizes)


def _check(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array) -> None:
    if lhs.ndim != 2 or rhs.ndim != 3 or lhs.shape[1] != rhs.shape[1]:
        raise ValueError(f"lhs {lhs.shape} and rhs {rhs.shape} do not fit; [M, K] and [E, K, N] are expected")
    if group_sizes.shape != rhs.shape[:1] or group_sizes.dtype != jnp.int32:
        raise ValueError(
            f"group_sizes is {group_sizes.dtype}{list(group_sizes.shape)}; int32[{rhs.shape[0]}] is expected"
        )
    if lhs.dtype != rhs.dtype:
        raise ValueError(f"lhs is {lhs.dtype} and rhs is {rhs.dtype}; one type is expected")
