"""The operations of `pallas_kernels` on their named workloads, as measurements take them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_matmul import arg_specs as block_specs
from pallas_kernels.block_sparse_matmul import block_sparse_matmul
from pallas_kernels.block_sparse_matmul import mosaic as block_mosaic
from pallas_kernels.decode_attention import arg_specs as decode_specs
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.decode_attention import mosaic as decode_mosaic
from pallas_kernels.grouped_matmul import arg_specs as matmul_specs
from pallas_kernels.grouped_matmul import mosaic as matmul_mosaic
from pallas_kernels.iha_decode import arg_specs as iha_decode_specs
from pallas_kernels.iha_decode import iha_decode
from pallas_kernels.iha_decode import mosaic as iha_decode_mosaic
from pallas_kernels.iha_decode.absorbed import absorbed_is_faster
from pallas_kernels.iha_prefill import arg_specs as iha_prefill_specs
from pallas_kernels.iha_prefill import iha_prefill
from pallas_kernels.kv_blocks import arg_specs as kv_specs
from pallas_kernels.kv_blocks import mosaic as kv_mosaic
from pallas_kernels.prefill_attention import arg_specs as prefill_specs
from pallas_kernels.prefill_attention import mosaic as prefill_mosaic
from pallas_kernels.prefill_attention import prefill_attention
from pallas_kernels.retrieval_scores import arg_specs as scores_specs
from pallas_kernels.retrieval_scores import mosaic as scores_mosaic
from pallas_kernels.retrieval_scores import retrieval_scores
from pallas_kernels.sparse_matmul import arg_specs as sparse_specs
from pallas_kernels.sparse_matmul import mosaic as sparse_mosaic
from pallas_kernels.sparse_matmul import sparse_matmul


class Spec(Protocol):
    """A named workload; see the `arg_specs` of an operation."""

    @property
    def options(self) -> dict[str, Any]: ...
    @property
    def bytes_moved(self) -> int: ...
    @property
    def flops(self) -> int: ...
    def make(self, key: jax.Array) -> dict[str, Any]: ...


class Case(NamedTuple):
    """An operation on a workload.

    Attributes:
      function: takes what `spec.make` returns, `spec.options` and `implementation`.
      implementations: those that are looked at, in the order of "auto"; in float32 the last says what is right. That is
        the "reference" of attention. The grouped product's is left out, since it takes as many times the memory and
        work as there are experts: its "xla" stands in, which tests compare with loops in float64. That of the block
        moves and of retrieval scores is their "xla".
      tolerance: the error that may be, as `bench.kernels.error_of` has it. Rounding to bfloat16, of weights and
        results, stays below 0.015; that of pseudo keys came to 0.042, of the smallest workload on a CPU. What is exact
        has none.
      exact: results are copies: nothing may differ.
      donated: the argument that is written in place.
      candidates: forms of the Mosaic kernel that are tried beside its default; empty where it is another operation's.
    """

    function: Callable[..., Any]
    spec: Spec
    implementations: tuple[str, ...]
    tolerance: float = 0.03
    exact: bool = False
    donated: str | None = None
    candidates: tuple[Any, ...] = ()

    def call(self, implementation: str) -> Callable[..., Any]:
        """Jitted, of the arrays alone."""

        def run(**arrays: Any) -> Any:
            return self.function(**arrays, **self.spec.options, implementation=implementation)

        return jax.jit(run, donate_argnames=self.donated)

    def expected(self, arrays: dict[str, Any]) -> jax.Array:
        """The result, computed in float32 where the operation rounds."""

        def run(**arrays: Any) -> Any:
            if not self.exact:
                arrays = {name: _widened(value) for name, value in arrays.items()}
            return self.function(**arrays, **self.spec.options, implementation=self.implementations[-1])

        result: jax.Array = jax.jit(run)(**arrays)
        return result


def _widened(value: Any) -> Any:
    is_number = isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jnp.floating)
    return value.astype(jnp.float32) if is_number else value


def operations() -> Mapping[str, Mapping[str, Case]]:
    """Cases by operation and workload."""
    attention = ("mosaic", "cudnn", "xla", "reference")
    return {
        "prefill_attention": {
            name: Case(prefill_attention, spec, attention, candidates=prefill_mosaic.CANDIDATES)
            for name, spec in prefill_specs.SPECS.items()
        },
        "decode_attention": {
            name: Case(decode_attention, spec, attention, candidates=decode_mosaic.CANDIDATES)
            for name, spec in decode_specs.SPECS.items()
        },
        "iha_prefill": {
            name: Case(iha_prefill, spec, attention, tolerance=0.1) for name, spec in iha_prefill_specs.SPECS.items()
        },
        "iha_decode": {
            name: Case(iha_decode, spec, attention, tolerance=0.1, candidates=_candidates_of_iha_decode(spec))
            for name, spec in iha_decode_specs.SPECS.items()
        },
        "retrieval_scores": {
            name: Case(retrieval_scores, spec, ("mosaic", "xla"), candidates=scores_mosaic.CANDIDATES)
            for name, spec in scores_specs.SPECS.items()
        },
        "grouped_matmul": {
            name: Case(spec.function, spec, ("mosaic", "xla"), candidates=matmul_mosaic.candidates(1 + spec.gated))
            for name, spec in matmul_specs.SPECS.items()
        },
        "sparse_matmul": {
            name: Case(
                sparse_matmul,
                spec,
                ("mosaic", "xla", "reference"),
                candidates=sparse_mosaic.candidates(spec.planes, spec.rows, spec.of),
            )
            for name, spec in sparse_specs.SPECS.items()
        },
        "block_sparse_matmul": {
            name: Case(
                block_sparse_matmul,
                spec,
                ("mosaic", "xla", "reference"),
                candidates=block_mosaic.candidates(spec.size),
            )
            for name, spec in block_specs.SPECS.items()
        },
        "kv_blocks": {
            name: Case(
                spec.function,
                spec,
                ("mosaic", "xla"),
                tolerance=0,
                exact=True,
                donated="arena" if spec.direction == "scatter" else None,
                candidates=kv_mosaic.CANDIDATES,
            )
            for name, spec in kv_specs.SPECS.items()
        },
    }


def _candidates_of_iha_decode(spec: iha_decode_specs.Spec) -> tuple[Any, ...]:
    """None where `decode_attention`'s kernel runs, whose forms are tried on its own workloads."""
    own = absorbed_is_faster(spec.q_heads, spec.kv_heads, spec.pseudo_heads)
    return iha_decode_mosaic.CANDIDATES if own else ()


def in_turns(
    cases: Mapping[str, Mapping[str, Case]], ops: Container[str] | None, wanted: Callable[[str], bool]
) -> list[tuple[str, str, Case]]:
    """Operation, workload and case, one of each operation after the other: none is left out where time runs short.

    Args:
      cases: of `operations`.
      ops: only these operations; None for all.
      wanted: whether a workload of this name is.
    """
    chosen = [
        [(op, name, case) for name, case in named.items() if wanted(name)]
        for op, named in cases.items()
        if ops is None or op in ops
    ]
    return [one for turn in itertools.zip_longest(*chosen) for one in turn if one is not None]
