"""What some heads of a pass look at, noted layer by layer while it is traced."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.retrieval_scores import retrieval_scores


@dataclass(slots=True)
class Watched:
    """Attention of retrieval heads, layer by layer, while a pass is traced.

    Attributes:
      weights: of the heads of each watched layer.
      layers: these.
      rows: which rows of the pass these are; None for all.
      is_biased: whether something is added to the pass's scores, which heads are watched without.
    """

    weights: Float32[Array, "rows layers heads"] | Float32[np.ndarray, "rows layers heads"]
    layers: tuple[int, ...]
    rows: Int32[Array, " rows"] | Int32[np.ndarray, " rows"] | None = None
    is_biased: bool = False
    _parts: list[Array] = field(default_factory=list)

    def of(self, layer: int) -> Float32[Array, "rows heads"] | None:
        """Weights of a layer's heads; None for one that is not watched."""
        return jnp.asarray(self.weights)[:, self.layers.index(layer)] if layer in self.layers else None

    def look(
        self,
        layer: int,
        q: Float[Array, "seqs heads head_dim"],
        arena: Array,
        table: Int32[Array, "seqs width"],
        lengths: Int32[Array, " seqs"],
        lse: Float32[Array, "seqs heads"] | None,
    ) -> Array:
        """See `paged.Look`."""
        weights = self.of(layer)
        if weights is None:
            return arena
        if self.rows is not None:
            q, table, lengths = at_rows(self.rows, (q, table, lengths))
            lse = None if lse is None else at_rows(self.rows, lse)
        if lse is None or self.is_biased:
            _, lse = decode_attention(q, arena, arena, table, lengths, v_page_table=table + 1, return_lse=True)
        # The layer behind writes into the arena. Unless it does so after it was read here, XLA copies the whole arena.
        attention, arena = jax.lax.optimization_barrier(
            (retrieval_scores(q, arena, table, lengths, lse, weights), arena)
        )
        self.note(attention)
        return arena

    def note(self, attention: Array) -> None:
        """Takes what a layer's heads look at; where they lie on several devices, a part of each on the second axis."""
        self._parts.append(attention)

    @property
    def attention(self) -> Array:
        """Mean over the heads of the probabilities that they give each key, in the parts that were noted."""
        return sum(self._parts[1:], start=self._parts[0])


def at_rows(rows: Int32[Array, " rows"] | Int32[np.ndarray, " rows"], arrays: Any) -> Any:
    """Some rows of arrays that have one for each sequence; padding gets zeros, and so no length."""
    return jax.tree.map(lambda one: one.at[rows].get(mode="fill", fill_value=0), arrays)
