"""What goes from one layer: neurons of its MLP, groups of its attention, experts of its mixture."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxdual.pruning.layer_state import write_layer
from jaxdual.pruning.linears import MLP, MLP_OUT, inputs_of
from jaxdual.pruning.moments import Moments
from jaxdual.pruning.structured.refit import refit, second_moments
from models.layers import LayerAttend
from models.rope import Rope
from models.shapes import parameters_of


def neuron_importance(
    layer: Any, moments: Moments, *, shift: bool = False, scale: Float[Array, " neurons"] | None = None
) -> Float[np.ndarray, " neurons"]:
    """Root mean square of each neuron times the norm of the weights that read it.

    Args:
      layer: with a dense MLP.
      moments: of the neurons, with all products.
      shift: whether a bias makes up for means; of a neuron that is always the same, nothing is lost then.
      scale: a further factor of each, as Sparsity Induction learns for the inputs of the down projection.
    """
    squares = np.maximum(np.diagonal(second_moments(moments, shift=shift)[0]), 0)
    importance = np.sqrt(squares) * np.linalg.norm(np.asarray(layer.mlp.down.kernel[...], np.float64), axis=1)
    return importance if scale is None else importance * np.asarray(scale, np.float64)


def remove_neurons(
    layer: Any,
    moments: Moments,
    keep: int,
    *,
    shift: bool = False,
    scale: Float[Array, " neurons"] | None = None,
) -> None:
    """Leaves the `keep` neurons of highest importance in a dense MLP, and fits its down projection to them.

    With a shift the MLP has biases at all three projections afterwards, as a checkpoint holds them together.

    Args:
      layer: changed in place.
      moments, shift, scale: as of `neuron_importance`.
      keep: at most as many as there are.
    """
    kept = most_important(neuron_importance(layer, moments, shift=shift, scale=scale), keep)
    before = parameters_of(layer)
    weights, bias = refit(before["mlp.down.kernel"].T, kept, moments, shift=shift)
    changed: dict[str, Any] = {"mlp.down.kernel": weights.T}
    for name in ("gate", "up"):
        changed[f"mlp.{name}.kernel"] = before[f"mlp.{name}.kernel"][:, kept]
        if f"mlp.{name}.bias" in before:
            changed[f"mlp.{name}.bias"] = before[f"mlp.{name}.bias"][kept]
        elif shift:
            changed[f"mlp.{name}.bias"] = jnp.zeros(keep)
    if shift:
        changed["mlp.down.bias"] = bias + before.get("mlp.down.bias", 0)
    write_layer(layer, changed)


def group_importance(layer: Any, moments: Moments, *, shift: bool = False) -> Float[np.ndarray, " kv_heads"]:
    """Mean square of what each key-value head, with the query heads that share it, adds to the residual stream.

    Args:
      layer: of a decoder.
      moments: of the inputs of its output projection, with all products.
      shift: whether a bias makes up for means.
    """
    weights = np.asarray(layer.attention.o.kernel[...], np.float64)
    products, _ = second_moments(moments, shift=shift)
    groups = _columns_of_groups(layer)
    return np.array([np.sum(weights[one].T @ products[np.ix_(one, one)] * weights[one].T) for one in groups])


def remove_kv_groups(layer: Any, moments: Moments, count: int, *, shift: bool = False) -> None:
    """Takes `count` key-value heads out of a layer, with their query heads, and fits its output projection to the rest.

    Args:
      layer: changed in place.
      moments, shift: as of `group_importance`.
      count: fewer than there are.
    """
    groups = _columns_of_groups(layer)
    kept = most_important(group_importance(layer, moments, shift=shift), len(groups) - count)
    queries = np.concatenate([groups[group] for group in kept])
    keys = np.concatenate([np.arange(layer.attention.head_dim) + group * layer.attention.head_dim for group in kept])
    before = parameters_of(layer)
    weights, bias = refit(before["attention.o.kernel"].T, queries, moments, shift=shift)
    changed: dict[str, Any] = {"attention.o.kernel": weights.T}
    for name, columns in (("q", queries), ("k", keys), ("v", keys)):
        changed[f"attention.{name}.kernel"] = before[f"attention.{name}.kernel"][:, columns]
        if f"attention.{name}.bias" in before:
            changed[f"attention.{name}.bias"] = before[f"attention.{name}.bias"][columns]
    if shift:
        changed["attention.o.bias"] = bias + before.get("attention.o.bias", 0)
    write_layer(layer, changed)


def expert_importance(layer: Any, x: Float[Array, "T D"], rope: Rope, attend: LayerAttend) -> Float[Array, " experts"]:
    """Sum over tokens of each expert's weight times the norm of its output, both zero where it isn't chosen.

    Args:
      layer: with a mixture of experts.
      x, rope, attend: as of the layer.
    """
    down = layer.mlp.experts.down[...]
    found, routed = [], jnp.zeros((x.shape[0], down.shape[0]))
    for group, values, _ in inputs_of(layer, x, rope, attend):
        kind, _, expert = group.partition(".")
        if kind == MLP and int(expert) == 0:
            chosen, weights = layer.mlp.route(values)
            routed = routed.at[jnp.arange(x.shape[0])[:, None], chosen].set(weights)
        elif kind == MLP_OUT:
            norms = jnp.linalg.norm(values @ down[int(expert)], axis=-1)
            found.append(jnp.sum(routed[:, int(expert)] * norms))
    return jnp.stack(found)


def remove_experts(layer: Any, importance: Float[np.ndarray, " experts"], keep: int) -> None:
    """Leaves the `keep` experts of highest importance in a mixture; tokens of the others go to these.

    Args:
      layer: changed in place.
      importance: of each expert.
      keep: at least as many as a token is sent to.
    """
    kept = most_important(np.asarray(importance), keep)
    before = parameters_of(layer)
    changed = {f"mlp.experts.{name}": before[f"mlp.experts.{name}"][kept] for name in ("gate", "up", "down")}
    write_layer(layer, changed | {"mlp.router.kernel": before["mlp.router.kernel"][:, kept]})


def most_important(importance: Float[np.ndarray, " n"], keep: int) -> Int[np.ndarray, " keep"]:
    """Places of the `keep` highest values, in order; of equal ones the first."""
    return np.sort(np.argsort(-importance, stable=True)[:keep])


def _columns_of_groups(layer: Any) -> list[Int[np.ndarray, " columns"]]:
    """For each key-value head, the inputs of the output projection that are its query heads'."""
    attention = layer.attention
    inputs = np.arange(attention.o.kernel.shape[0])
    return np.split(inputs, attention.k.kernel.shape[1] // attention.head_dim)
