"""Learns scales of a layer's inputs, so that the layer gives what it gave once weights are masked by scaled scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from jaxdual.pruning.induction.absorb import absorb, input_scales
from jaxdual.pruning.induction.masks import straight_through
from jaxdual.pruning.induction.regularizers import alpha_of, first_vectors, regularizer
from jaxdual.pruning.induction.settings import MOST, Induction
from jaxdual.pruning.layer_state import write_layer
from jaxdual.pruning.linears import Linear
from jaxdual.pruning.methods import Method
from jaxdual.pruning.moments import Moments
from jaxdual.pruning.pattern import Pattern
from jaxdual.pruning.stream import run_layer
from jaxdual.pruning.ways import Example, relative_error
from models import ModelConfig
from models.moe import MoE
from models.rope import Rope
from models.shapes import parameters_of

# Experts that fewer tokens go to keep scales of one.
_LEAST_TOKENS = 256

type Logs = dict[str, Float[Array, "stack size"]]


@dataclass(frozen=True, slots=True)
class Problem:
    """What is the same for all steps, and for all layers of a kind: a program is compiled for each.

    Attributes:
      config, window: of the model, and the layer's sliding window.
      method, pattern: how weights are chosen.
      settings: how scales are learned.
      steps: of the optimiser.
      kinds: the group of each stack of matrices, by path.
    """

    config: ModelConfig
    window: int | None
    method: Method
    pattern: Pattern
    settings: Induction
    steps: int
    kinds: tuple[tuple[str, str], ...]

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """Adam, whose rate falls to zero."""
        return optax.adam(optax.cosine_decay_schedule(self.settings.rate, self.steps))


def batched(examples: Sequence[Example], batch: int) -> list[Example]:
    """Several windows each; those that are left over are not taken."""
    if batch == 1:
        return list(examples)
    return [
        Example(*(jnp.concatenate([getattr(one, side) for one in part]) for side in ("before", "after")))
        for part in (examples[i : i + batch] for i in range(0, len(examples) - batch + 1, batch))
    ]


def learn_scales(
    layer: nnx.Module,
    problem: Problem,
    linears: Sequence[Linear],
    moments: Mapping[str, Moments],
    first: Mapping[str, Float[Array, "stack size"]],
    rope: Rope,
    examples: Sequence[Example],
    held_out: Sequence[Example],
) -> Logs:
    """The scales of the epoch with the least error on held-out text.

    Args:
      layer: as it was trained.
      problem: see there.
      linears: all of the layer.
      moments: of their inputs.
      first: scales to begin with.
      rope: of one window.
      examples: to learn from.
      held_out: to choose by; of as many windows each.

    Returns:
      Scales: in mode "score" of the inputs of each kind of group, in mode "fold" as `absorb` takes them.
    """
    if isinstance(getattr(layer, "mlp", None), MoE):
        # The one with gradients.
        layer = nnx.clone(layer)
        layer.mlp.implementation = "reference"  # type: ignore[attr-defined]
    graph, state = nnx.split(layer)
    of_inputs = {
        path: jnp.stack([problem.method.of_inputs(moments[one.group]) for one in linears if one.path == path])
        for path, _ in problem.kinds
    }
    free = {
        key: jnp.ones(first[key].shape[0]) if tokens is None else (tokens >= _LEAST_TOKENS).astype(jnp.float32)
        for key, tokens in _expert_tokens(first, linears, moments).items()
    }
    logs = _gauged({key: jnp.log(scale) for key, scale in first.items()}, free)
    vectors, alpha = {}, jnp.float32(0)
    if problem.settings.regularizer != "none":
        scaled = _scaled(problem, parameters_of(layer), {key: jnp.exp(log) for key, log in logs.items()})
        vectors = first_vectors(scaled)
        alpha = alpha_of(scaled, vectors)
    optimizer_state = problem.optimizer.init(logs)
    fixed = (of_inputs, free, alpha)

    def held_out_error(logs: Logs) -> float:
        errors = [_error(graph, problem, state, logs, fixed, rope, one.before, one.after) for one in held_out]
        return float(np.mean(jax.device_get(errors)))

    best, least = logs, held_out_error(logs)
    for _ in range(problem.settings.epochs):
        for one in examples:
            logs, optimizer_state, vectors = _step(
                graph, problem, state, logs, optimizer_state, vectors, fixed, rope, one.before, one.after
            )
        error = held_out_error(logs)
        if error < least:
            best, least = logs, error
    return {key: jnp.exp(log) for key, log in best.items()}


def _expert_tokens(
    scales: Mapping[str, Array], linears: Sequence[Linear], moments: Mapping[str, Moments]
) -> dict[str, Array | None]:
    """Tokens of each expert, for scales that experts have one by one; None for others."""
    tokens: dict[str, Array | None] = {}
    for key, scale in scales.items():
        groups = list(dict.fromkeys(one.group for one in linears if one.kind == key and one.expert is not None))
        stacked = len(groups) == scale.shape[0] and len(groups) > 0
        tokens[key] = jnp.stack([moments[group].tokens for group in groups]) if stacked else None
    return tokens


def _gauged(logs: Logs, free: Mapping[str, Float[Array, " stack"]]) -> Logs:
    """With a mean of zero in every row, since a common factor changes no choice within it; and within bounds."""
    most = math.log(MOST)
    return {
        key: free[key][:, None] * jnp.clip(log - jnp.mean(log, axis=1, keepdims=True), -most, most)
        for key, log in logs.items()
    }


def _stack(kernel: Array) -> Float[Array, "stack outputs inputs"]:
    stack = kernel if kernel.ndim == 3 else kernel[None]
    return jnp.swapaxes(stack, 1, 2)


def _scaled(
    problem: Problem, parameters: Mapping[str, Array], scales: Mapping[str, Array]
) -> dict[str, Float[Array, "stack outputs inputs"]]:
    """Weights of every stack with their scales in them."""
    if problem.settings.mode == "fold":
        parameters = absorb(problem.config, parameters, scales)
        return {path: _stack(parameters[path]) for path, _ in problem.kinds}
    return {path: _stack(parameters[path]) * scales[kind][:, None, :] for path, kind in problem.kinds}


def _masked(
    problem: Problem, parameters: Mapping[str, Array], scales: Mapping[str, Array], of_inputs: Mapping[str, Array]
) -> dict[str, Array]:
    """All parameters of the layer, those that a pruner would choose by scaled scores masked."""
    method, settings = problem.method, problem.settings
    out, divided = dict(parameters), {}
    if settings.mode == "fold":
        out, divided = absorb(problem.config, parameters, scales), input_scales(problem.config, scales)
    for path, kind in problem.kinds:
        weights = _stack(out[path])
        columns = of_inputs[path]
        if settings.mode == "score":
            columns = columns * scales[kind]
        elif kind in divided:
            columns = columns / divided[kind] ** method.power

        def mask(weights: Array, columns: Array) -> Array:
            log_scores = jnp.log(method.of_weights(weights) + 1e-20) + jnp.log(columns + 1e-20)
            return straight_through(log_scores, problem.pattern, method.scope, method.columns, settings.temperature)

        masked = jnp.swapaxes(weights * jax.vmap(mask)(weights, columns), 1, 2)
        out[path] = masked if out[path].ndim == 3 else masked[0]
    return out


type _Fixed = tuple[Mapping[str, Array], Mapping[str, Array], Array]


def _relative_error(
    graph: Any, problem: Problem, state: Any, logs: Logs, fixed: _Fixed, rope: Rope, before: Array, after: Array
) -> Float[Array, ""]:
    """Mean square of what the layer's output changes, relative to what the layer adds to the stream."""
    layer = nnx.merge(graph, state)
    scales = {key: jnp.exp(log) for key, log in logs.items()}
    write_layer(layer, _masked(problem, parameters_of(layer), scales, fixed[0]))
    found = run_layer(layer, problem.window, before, rope)
    return relative_error(found, before, after)


_error = jax.jit(_relative_error, static_argnums=(0, 1))


@partial(jax.jit, static_argnums=(0, 1))
def _step(
    graph: Any,
    problem: Problem,
    state: Any,
    logs: Logs,
    optimizer_state: optax.OptState,
    vectors: Mapping[str, Array],
    fixed: _Fixed,
    rope: Rope,
    before: Float[Array, "T D"],
    after: Float[Array, "T D"],
) -> tuple[Logs, optax.OptState, dict[str, Array]]:
    _, free, alpha = fixed
    settings = problem.settings

    def loss(logs: Logs) -> tuple[Array, dict[str, Array]]:
        error = _relative_error(graph, problem, state, logs, fixed, rope, before, after)
        if settings.regularizer == "none":
            return error, dict(vectors)
        scales = {key: jnp.exp(log) for key, log in logs.items()}
        parameters = parameters_of(nnx.merge(graph, state))
        value, new = regularizer(settings.regularizer, _scaled(problem, parameters, scales), vectors, alpha)
        return error + settings.weight * value, new

    gradients, new = jax.grad(loss, has_aux=True)(logs)
    updates, optimizer_state = problem.optimizer.update(gradients, optimizer_state)
    moved = optax.apply_updates(logs, updates)
    return _gauged(moved, free), optimizer_state, new  # type: ignore[arg-type]
