"""Public functions of the grouped matrix product: checks and choice of implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import dispatch
from pallas_kernels.checks import check_array
from pallas_kernels.grouped_matmul import mosaic, reference, xla

_IMPLEMENTATIONS = {
    "mosaic": mosaic.grouped_matmul,
    "xla": xla.grouped_matmul,
    "reference": reference.grouped_matmul,
}


def _gated(product: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The gated product as two plain ones."""

    def gated_grouped_matmul(
        lhs: jax.Array, gate: jax.Array, up: jax.Array, group_sizes: jax.Array
    ) -> Float[Array, "M N"]:
        return jax.nn.silu(product(lhs, gate, group_sizes)) * product(lhs, up, group_sizes)

    return gated_grouped_matmul


_GATED_IMPLEMENTATIONS = {
    "mosaic": mosaic.gated_grouped_matmul,
    "xla": _gated(xla.grouped_matmul),
    "reference": _gated(reference.grouped_matmul),
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
      group_sizes: `[E]` int32 rows per group, none negative and together at most `M`; what others give is undefined.
      implementation: "auto": the first of the following that can; "mosaic": persistent kernel for GPUs of compute
        capability 9.0 (bfloat16 or float16, `K` and `N` multiples of 16; no gradient); "xla": a loop over blocks of one
        group, of which only the filled ones run (no reverse-mode gradient); "reference": multiplies every row by every
        matrix and masks, `E` times the work and `E * M * K` values of memory, differentiable.

    Returns:
      `[M, N]`; rows from `sum(group_sizes)` on are zero.

    Raises:
      ValueError: shapes or types that don't fit, or an unknown implementation.
      NotImplementedError: the chosen implementation can't do these arguments, or there is none of that name; of "auto"
        none can, and the message says why each can't.
    """
    _check(lhs, "rhs", rhs, group_sizes)
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
      NotImplementedError: the chosen implementation can't do these arguments, or there is none of that name; of "auto"
        none can, and the message says why each can't.
    """
    _check(lhs, "gate", gate, group_sizes)
    check_array("up", up, gate.dtype, gate.shape)
    return dispatch.run("gated_grouped_matmul", _GATED_IMPLEMENTATIONS, implementation, lhs, gate, up, group_sizes)


def _check(lhs: Any, name: str, matrices: Any, group_sizes: Any) -> None:
    check_array("lhs", lhs, jnp.floating, ("M", "K"))
    check_array(name, matrices, lhs.dtype, ("E", lhs.shape[1], "N"))
    check_array("group_sizes", group_sizes, jnp.int32, matrices.shape[:1])
