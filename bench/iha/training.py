"""Training of small models: steps of an optimiser over batches that lie ready, many steps a call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
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
      loss: of a model on a batch. With the same function and the same optimizer, models that differ in nothing but
        their numbers share one program.
      optimizer: of all parameters.
      chunks: trees of arrays whose leading axis is that of batches.
    """
    graph, parameters = nnx.split(model)
    carry = (parameters, optimizer.init(parameters))
    for batches in chunks:
        carry, losses = _steps(carry, batches, graph, loss, optimizer)
        nnx.update(model, carry[0])
        yield float(losses.mean())


@partial(jax.jit, static_argnums=(2, 3, 4))
def _steps(
    carry: tuple[Any, Any], batches: Any, graph: Any, loss: Callable[..., jax.Array], optimizer: Any
) -> tuple[tuple[Any, Any], jax.Array]:
    """Parameters and state after a step on each batch, and the losses."""

    def step(carry: tuple[Any, Any], batch: Any) -> tuple[tuple[Any, Any], jax.Array]:
        parameters, state = carry
        value, gradient = jax.value_and_grad(lambda now: loss(nnx.merge(graph, now), batch))(parameters)
        updates, state = optimizer.update(gradient, state, parameters)
        return (optax.apply_updates(parameters, updates), state), value

    return jax.lax.scan(step, carry, batches)


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
