"""The jitted programs of a prefill that goes layer by layer.

The arena of such an engine holds a few layers of each page at a time: layer `l` lies in layer slot `l % slots`, and
takes the place of an earlier one whose keys and values have gone elsewhere. A forward pass is `begin`, `layer` for each
layer in turn, `end`; between two layers the caller moves keys and values in and out.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32

from jaxdual.engine.paged import Arena, GroupPrefill, GroupTable
from jaxdual.engine.steps import Leaves
from models import Decoder

Rope = Any  # of `Decoder.rope`


class LayerKind(NamedTuple):
    """What the program of a layer depends on besides the shapes of a step; layers that agree in it share one."""

    graph: Any
    structure: Any
    window: int | None
    weights: tuple[tuple[int, ...], ...]


class LayerPrograms:
    """Compiled per padded shape on first use; residual stream and arena are donated.

    Layers of one kind share their programs: weights and the layer slot are arguments.

    Args:
      model: whose weights are handed to each call.
      page_size: tokens a page.
      slots: layers of which a page of the arena holds rows: `(page * slots + slot) * 2` is that of the keys.
    """

    def __init__(self, model: Decoder, *, page_size: int, slots: int) -> None:
        self.num_layers = model.config.num_layers
        self._model, self._page_size, self._slots = model, page_size, slots
        self._kinds: list[LayerKind] = []
        self._leaves: list[Leaves] = []
        for index, layer in enumerate(model.layers):
            graph, state = nnx.split(layer)
            leaves, structure = jax.tree.flatten(state)
            weights = tuple(leaf.shape for leaf in leaves)
            self._kinds.append(LayerKind(graph, structure, model.config.window_of(index), weights))
            self._leaves.append(leaves)
        self.embedding: jax.Array = model.embedding.get_value()
        self.begin = jax.jit(self._begin)
        self.end = jax.jit(self._end)
        self.layer_program = jax.jit(self._layer, static_argnames="kind", donate_argnames=("x", "arena"))

    def layer(
        self,
        index: int,
        x: Float[Array, "tokens hidden"],
        arena: Arena,
        rope: Rope,
        starts: Int32[Array, " seqs"] | Int32[np.ndarray, " seqs"],
        counts: Int32[Array, " seqs"] | Int32[np.ndarray, " seqs"],
        table: GroupTable,
    ) -> tuple[Arena, Float[Array, "tokens hidden"]]:
        """Runs layer `index` on `seqs` chunks laid side by side, whose earlier keys and values lie in its slot.

        Args:
          index: from 0.
          x, rope: of `begin`, or of the layer before.
          starts, counts: first position and real tokens of each chunk.
          table: pages of each sequence.
        """
        return self.layer_program(  # type: ignore[no-any-return]
            self.kind_of(index),
            **self.arrays_of(index),
            x=x,
            arena=arena,
            rope=rope,
            starts=starts,
            counts=counts,
            table=table,
        )

    @property
    def one_of_each_kind(self) -> tuple[int, ...]:
        """Layers that together run in all programs."""
        return tuple({kind: layer for layer, kind in reversed(list(enumerate(self._kinds)))}.values())

    def kind_of(self, index: int) -> LayerKind:
        """Which program layer `index` runs in."""
        return self._kinds[index]

    def arrays_of(self, index: int) -> dict[str, Any]:
        """What makes that program the one of layer `index`: its weights and its slot."""
        return {"leaves": self._leaves[index], "slot": np.int32(index % self._slots)}

    def _begin(
        self,
        embedding: Float[Array, "vocab hidden"],
        tokens: Int32[Array, "seqs chunk"],
        starts: Int32[Array, " seqs"],
    ) -> tuple[Float[Array, "tokens hidden"], Rope]:
        """Residual stream before the first layer, and the rotations of the positions."""
        positions = starts[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
        return embedding[tokens.reshape(-1)], self._model.rope(positions.reshape(-1))

    def _layer(
        self,
        kind: LayerKind,
        *,
        leaves: Leaves,
        slot: Int32[Array, ""],
        x: Float[Array, "tokens hidden"],
        arena: Arena,
        rope: Rope,
        starts: Int32[Array, " seqs"],
        counts: Int32[Array, " seqs"],
        table: GroupTable,
    ) -> tuple[Arena, Float[Array, "tokens hidden"]]:
        prefill = GroupPrefill(
            page_size=self._page_size,
            layers=self._slots,
            starts=starts,
            counts=counts,
            table=table,
            chunk=x.shape[0] // starts.shape[0],
            window=kind.window,
        )
        layer = nnx.merge(kind.graph, jax.tree.unflatten(kind.structure, leaves))
        x, arena = layer(x, rope, partial(prefill.attend, slot), arena)
        return arena, x

    def _end(self, x: Float[Array, "tokens hidden"], counts: Int32[Array, " seqs"]) -> Float[Array, "seqs hidden"]:
        """Residual stream of the last token of each chunk."""
        seqs = counts.shape[0]
        last: jax.Array = x[jnp.arange(seqs, dtype=jnp.int32) * (x.shape[0] // seqs) + jnp.maximum(counts - 1, 0)]
        return last
