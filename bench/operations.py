"""The operations of `pallas_kernels` on their named workloads, as measurements take them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention import arg_specs as decode_specs
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.grouped_matmul import arg_specs as matmul_specs
from pallas_kernels.kv_blocks import arg_specs as kv_specs
from pallas_kernels.prefill_attention import arg_specs as prefill_specs
from pallas_kernels.prefill_attention import prefill_attention


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
      implementations: names that `function` knows, in the order of "auto"; in float32 the last says what is right.
      exact: results are copies: nothing may differ.
      donated: the argument that is written in place.
    """

    function: Callable[..., Any]
    spec: Spec
    implementations: tuple[str, ...]
    exact: bool = False
    donated: str | None = None

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
        "prefill_attention": {n: Case(prefill_attention, s, attention) for n, s in prefill_specs.SPECS.items()},
        "decode_attention": {n: Case(decode_attention, s, attention) for n, s in decode_specs.SPECS.items()},
        "grouped_matmul": {
            name: Case(spec.function, spec, ("mosaic", "xla")) for name, spec in matmul_specs.SPECS.items()
        },
        "kv_blocks": {
            name: Case(
                spec.function,
                spec,
                ("mosaic", "xla"),
                exact=True,
                donated="arena" if spec.direction == "scatter" else None,
            )
            for name, spec in kv_specs.SPECS.items()
        },
    }
