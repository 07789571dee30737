"""What routers choose, counted on the device while steps run."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import Sharding
from jaxtyping import Array, Bool, Int32


class RouterCounts(NamedTuple):
    """Counts of each rank since they were last taken.

    Attributes:
      tokens: `[ranks]` that were routed, padding not among them.
      activations: `[ranks, layers, experts]` tokens that chose each expert of each layer with experts.
      transitions: `[ranks, layers - 1, experts, experts]` tokens that chose expert i in a layer and j in the next one
        with experts; None where they are not counted.
    """

    tokens: Int32[Array, " ranks"]
    activations: Int32[Array, "ranks layers experts"]
    transitions: Int32[Array, "ranks gaps experts experts"] | None


def no_counts(ranks: int, layers: int, experts: int, sharding: Sharding, *, transitions: bool) -> RouterCounts:
    """Counts of nothing yet.

    Args:
      sharding: of the ranks.
      transitions: whether they are counted.
    """
    return RouterCounts(
        jnp.zeros((ranks,), jnp.int32, device=sharding),
        jnp.zeros((ranks, layers, experts), jnp.int32, device=sharding),
        jnp.zeros((ranks, layers - 1, experts, experts), jnp.int32, device=sharding) if transitions else None,
    )


def count(counts: RouterCounts, chosen: Sequence[Int32[Array, "T k"]], real: Bool[Array, " T"]) -> RouterCounts:
    """Adds the choices of one rank's tokens.

    Args:
      counts: of that rank, all leading axes 1.
      chosen: experts of each token in each layer that has some.
      real: which tokens are no padding.
    """
    experts = counts.activations.shape[2]
    # A choice of padding is one of no expert. Products of zeros and ones are exact, and faster than scattered sums.
    hot = [
        jnp.any(jnp.where(real[:, None], of_layer, experts)[:, :, None] == jnp.arange(experts), axis=1).astype(
            jnp.float32
        )
        for of_layer in chosen
    ]
    activations = jnp.stack([of_layer.sum(axis=0) for of_layer in hot])
    transitions = counts.transitions
    if transitions is not None and len(hot) > 1:
        pairs = jnp.stack([before.T @ after for before, after in itertools.pairwise(hot)])
        transitions = transitions + pairs.astype(jnp.int32)[None]
    return RouterCounts(
        counts.tokens + jnp.sum(real, dtype=jnp.int32),
        counts.activations + activations.astype(jnp.int32)[None],
        transitions,
    )
