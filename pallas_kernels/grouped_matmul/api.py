"""The public function and the choice of its implementation."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.grouped_matmul.reference import grouped_matmul_dense
from pallas_kernels.grouped_matmul.xla import grouped_matmul_xla

type Implementation = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

IMPLEMENTATIONS: Mapping[str, Implementation] = MappingProxyType(
    {"xla": grouped_matmul_xla, "dense": grouped_matmul_dense}
)


def grouped_matmul(
    lhs: Float[Array, "M K"],
    rhs: Float[Array, "E K N"],
    group_sizes: Int32[Array, "E"],
    implementation: str = "auto",
) -> Float[Array, "M N"]:
    """Multiply each row by the matrix of its group.

    Args:
      lhs: `[M, K]` rows, sorted by group: the first `group_sizes[0]` rows are of group 0, and so on.
      rhs: `[E, K, N]`, one matrix a group.
      group_sizes: `[E]` int32 rows per group, summing to at most `M`.
      implementation: "xla" is a loop over blocks of one group, of which only the filled ones run (no reverse-mode
        gradient); "dense" multiplies every row by every matrix and masks, `E` times the work and `E * M * K` values
        of memory, differentiable. "auto" is "xla".

    Returns:
      `[M, N]`; rows from `sum(group_sizes)` on are zero.

    Raises:
      ValueError: shapes or types that do not fit, or an unknown implementation.
    """
    if lhs.ndim != 2 or rhs.ndim != 3 or lhs.shape[1] != rhs.shape[1]:
        raise ValueError(f"lhs {lhs.shape} and rhs {rhs.shape} do not fit; [M, K] and [E, K, N] are expected")
    if group_sizes.shape != rhs.shape[:1] or group_sizes.dtype != jnp.int32:
        raise ValueError(
            f"group_sizes is {group_sizes.dtype}{list(group_sizes.shape)}; int32[{rhs.shape[0]}] is expected"
        )
    if lhs.dtype != rhs.dtype:
        raise ValueError(f"lhs is {lhs.dtype} and rhs is {rhs.dtype}; one type is expected")
    name = "xla" if implementation == "auto" else implementation
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is {implementation!r}; known: auto, {', '.join(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[name](lhs, rhs, group_sizes)
