"""Training of small models: steps of an optimiser over batches that lie ready, many steps a call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx


def train(
    model: nnx.Module,
    loss: Callable[[Any, Any], jax.Array],
    optimizer: optax.GradientTransformation,
    chunks: Iterable[Any],
) -> Iterator[float]:
    """Trains a model in place; after each chunk of batches, the mean of their losses.

    Args:
      model: whose parameters are trained.
      loss: of a model on a batch.
      optimizer: of all parameters.
      chunks: trees of arrays whose leading axis is that of batches; shapes that come again compile once.
    """
    graph, parameters = nnx.split(model)
    state = optimizer.init(parameters)

    @jax.jit
    def steps(carry: tuple[Any, Any], batches: Any) -> tuple[tuple[Any, Any], jax.Array]:
        def step(carry: tuple[Any, Any], batch: Any) -> tuple[tuple[Any, Any], jax.Array]:
            parameters, state = carry
            value, gradient = jax.value_and_grad(lambda now: loss(nnx.merge(graph, now), batch))(parameters)
            updates, state = optimizer.update(gradient, state, parameters)
            return (optax.apply_updates(parameters, updates), state), value

        return jax.lax.scan(step, carry, batches)

    for batches in chunks:
        (parameters, state), losses = steps((parameters, state), batches)
        nnx.update(model, parameters)
        yield float(losses.mean())


def shuffled(arrays: Any, batch: int, rng: np.random.Generator) -> Any:
    """One pass over examples in a new order, as `[batches, batch, ...]`; what fills no batch is left out this time.

    Args:
      arrays: tree of arrays `[examples, ...]`.
      batch: examples of a batch.
      rng: of the order.
    """
    (count,) = {len(leaf) for leaf in jax.tree.leaves(arrays)}
    order = rng.permutation(count)[: count // batch * batch]
    return jax.tree.map(lambda leaf: leaf[order].reshape(-1, batch, *leaf.shape[1:]), arrays)


def num_parameters(model: nnx.Module) -> int:
    """Numbers that a model has."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
